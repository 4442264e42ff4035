"""What a way to sample gives, tried on a client's own images: recognised, how far off, copied.

All ways begin with the same draws and the same noise, which come from the run's seed. Nothing of
this leaves the client.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import torch

from fedpdm.data import denormalize
from fedpdm.data.client_images import ClientImages
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.from_gaussians import begin, likeliest, read_level
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import (
    SamplerSettings,
    refine,
    refining,
    sample_in_batches,
    stages,
    steps_of,
)
from fedpdm.evaluation.features import SmallClassifier, fit_classifier, predict
from fedpdm.evaluation.measures import group_labels
from fedpdm.evaluation.metrics import kernel_distance, near_copy_fraction
from fedpdm.jobs.progress import sum_progress, work_progress
from fedpdm.rng import Purpose, seed_sequence, torch_generator
from fedpdm.setup.build import sampler_settings
from fedpdm.setup.choice import SamplingChoice
from fedpdm.setup.run_setup import RunSetup

__all__ = ["FEW", "IMAGES", "NUM_STEPS", "OWN_STEPS", "Likeness", "Trials"]

IMAGES: Final = 96  # drawn for the classes that are judged by fidelity and distance
FEW: Final = 48  # and for those judged by near-copies
NUM_STEPS: Final = 8  # calls of the fine model for an image, at most
OWN_STEPS: Final = 25  # where it is compared with the own model alone, which goes a longer way
CLASSIFIER_STEPS: Final = 300  # of 64 images
NEIGHBORS: Final = 50


class Likeness(NamedTuple):
    """Of a way to sample: the share of images taken for the class that was asked for, and the mean
    distance over the judged classes."""

    fidelity: float
    distance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Trials:
    """`labels` int64 (N,) of the images that are drawn: those of `classes` first, then the rare
    ones; `most` candidates for each at most. `real` are features of held-out images by class."""

    setup: RunSetup
    coarse: GaussianDenoiser
    device: torch.device
    where: str
    seed: tuple[int, int]
    most: int
    classes: Sequence[int]
    labels: np.ndarray
    num_judged: int
    training: np.ndarray
    classifier: SmallClassifier
    real: dict[int, np.ndarray]
    copies_of_real: float

    @classmethod
    def of(
        cls,
        setup: RunSetup,
        held: ClientImages,
        coarse: GaussianDenoiser,
        classes: Sequence[int],
        rare: Sequence[int],
        heldout: np.ndarray,
        *,
        device: torch.device,
        most: int,
        where: str,
    ) -> Trials:
        images, seed = held.images, (setup.config.run.seed, held.client_id)
        training, own = images.images[held.train], held.train_labels
        classifier, _ = fit_classifier(
            training, own, num_classes=images.num_classes, num_steps=CLASSIFIER_STEPS,
            seed=seed_sequence(seed[0], Purpose.CHOICE, client=seed[1]), device=device,
            what="classifier of the choice", progress=work_progress(f"{where} choice, classifier"),
        )  # fmt: skip
        features = predict(classifier, images.images[heldout], features=True).astype(np.float64)
        labels = [group_labels(classes, IMAGES), group_labels(rare, FEW)]
        return cls(
            setup=setup,
            coarse=coarse,
            device=device,
            where=where,
            seed=seed,
            most=most,
            classes=classes,
            labels=np.concatenate(labels),
            num_judged=IMAGES,
            training=training,
            classifier=classifier,
            real={k: features[images.labels[heldout] == k] for k in classes},
            copies_of_real=_copies(images.images[heldout[:IMAGES]], training),
        )

    def copies_without(self, count: int) -> float:
        """The share of near-copies without copying: of held-out images, or of draws of
        the rare classes that nothing has refined, the best of `count`; whichever is more."""
        labels = self._labels(self._rare)
        gaussians, generator = self.coarse.gaussians, self._generator()
        x_0 = gaussians.draw(labels.repeat_interleave(count), generator=generator)
        kept = x_0[self._best(x_0, labels, count)].view(-1, *self.setup.spec.shape)
        return max(self.copies_of_real, _copies(self._pixels(kept), self.training))

    def near_copies(self, fine: DenoisingFunction, tried: Sequence[SamplingChoice]) -> list[float]:
        """Of each way to sample, the share of near-copies among images of the rare classes."""
        drawn = self._drawn(fine, tried, rows=self._rare, what="near-copies")
        return [_copies(pixels, self.training) for pixels in drawn]

    def likeness(
        self,
        fine: DenoisingFunction,
        tried: Sequence[SamplingChoice],
        *,
        num_steps: int = NUM_STEPS,
    ) -> list[Likeness]:
        """Of each way to sample, judged in `num_steps` steps."""
        drawn = self._drawn(fine, tried, rows=self._judged, what="likeness", num_steps=num_steps)
        return [self._likeness(pixels) for pixels in drawn]

    def own_model(self, fine: DenoisingFunction) -> tuple[Likeness, float]:
        """Of the fine model alone, in `OWN_STEPS` steps, on the judged classes: its likeness and
        its share of near-copies."""
        settings = sampler_settings(self.setup)
        settings = replace(settings, num_steps=min(settings.num_steps, OWN_STEPS))
        labels = self._labels(self._judged)
        steps = len(labels) * steps_of(stages(None, fine, settings), settings)
        show = sum_progress(f"{self.where} choice, own model", "step", steps)
        drawn = sample_in_batches(
            None, fine, replace(settings, watch=show), image_shape=self.setup.spec.shape,
            labels=labels, generator=self._generator(),
        )  # fmt: skip
        pixels = self._pixels(drawn.images)
        return self._likeness(pixels), _copies(pixels, self.training)

    def _likeness(self, pixels: np.ndarray) -> Likeness:
        """Of images uint8 (N, C, H, W) of the judged classes."""
        of_class = self.labels[self._judged]
        taken = predict(self.classifier, pixels).argmax(axis=1)
        features = predict(self.classifier, pixels, features=True).astype(np.float64)
        parts = [kernel_distance(features[of_class == k], self.real[k]) for k in self.classes]
        return Likeness(float((taken == of_class).mean()), float(np.mean(parts)))

    @property
    def _judged(self) -> slice:
        return slice(0, self.num_judged)

    @property
    def _rare(self) -> slice:
        return slice(self.num_judged, None)

    def _labels(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self.labels[rows]).to(self.device)

    def _best(self, images: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
        abar = read_level(self.setup.schedule)
        return likeliest(self.coarse.gaussians, images, labels, count=count, abar=abar)

    def _pixels(self, x: torch.Tensor) -> np.ndarray:
        return denormalize(x.cpu(), shift=self.setup.spec.shift).numpy()

    def _generator(self) -> torch.Generator:
        """The same at every call: all combinations begin with the same noise."""
        seed, client = self.seed
        return torch_generator(seed, Purpose.CHOICE, client=client, device=self.device)

    def _drawn(
        self,
        fine: DenoisingFunction,
        tried: Sequence[SamplingChoice],
        *,
        rows: slice,
        what: str,
        num_steps: int = NUM_STEPS,
    ) -> Iterator[np.ndarray]:
        """For each way to sample the images uint8 (N, C, H, W) of the labels at `rows`.

        Ways that differ in their candidates alone stand together and share what is drawn.
        """
        ways = [
            (self._settings(same[0], num_steps), [one.candidates for one in same])
            for same in (
                list(group)
                for _, group in itertools.groupby(tried, lambda o: (o.handover, o.fine_labels))
            )
        ]
        labels = self._labels(rows)
        total = sum(
            max(counts) * steps_of([refining(fine, settings, t=settings.t0)], settings)
            for settings, counts in ways
        )
        show = sum_progress(f"{self.where} choice, {what}", "step", len(labels) * total)
        for settings, counts in ways:
            settings = replace(settings, watch=show)
            images = self._refined(fine, settings, rows=rows, count=max(counts))
            for count in counts:
                first = images[:, :count].flatten(0, 1)
                yield self._pixels(first[self._best(first, labels, count)])

    def _settings(self, choice: SamplingChoice, num_steps: int) -> SamplerSettings:
        settings = sampler_settings(self.setup, choice=choice)
        return replace(settings, num_steps=min(settings.num_steps, num_steps))

    def _refined(
        self, fine: DenoisingFunction, settings: SamplerSettings, *, rows: slice, count: int
    ) -> torch.Tensor:
        """The first `count` candidates for each label at `rows`: float32 (N, count, C, H, W)."""
        generator, level, shape = self._generator(), settings.t0, self.setup.spec.shape
        labels = self._labels(slice(None)).repeat_interleave(self.most)
        _, x = begin(
            self.coarse.gaussians, settings, image_shape=shape, labels=labels, generator=generator
        )
        x = x.view(-1, self.most, *shape)[rows, :count].flatten(0, 1)
        wanted = self._labels(rows).repeat_interleave(count)
        parts = zip(x.split(settings.batch_size), wanted.split(settings.batch_size), strict=True)
        refined = [
            refine(fine, part, settings, t=level, labels=told, generator=generator)
            for part, told in parts
        ]
        return torch.cat(refined).view(-1, count, *shape)


def _copies(images: np.ndarray, training: np.ndarray) -> float:
    return near_copy_fraction(images, training, n=min(NEIGHBORS, len(training)))
