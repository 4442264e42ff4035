"""A client of class statistics chooses how to sample, on its own held-out images.

What is open in the config (hand-over, labels under it, candidates) is tried in all combinations. A
combination is judged three times (docs/method.md section 5):

* On the classes of which the client has few images, by the share of near-copies of its training
  images. More than `COPIES` and a standard error above what is there without copying is not
  accepted: that of held-out images, or of the Gaussians' draws of these classes that nothing has
  refined, whichever is more.
* On the classes of which it holds out enough images, by the share of images that a small classifier
  takes for the class that was asked for. The client trains it on its own training images. Less than
  the best share and a standard error under it is not accepted.
* On the same classes, by the kernel distance between what is drawn for a class and the held-out
  images of that class, as a mean over these classes, in the classifier's features. Pixels would
  not do: their first two moments are those of the Gaussians before any refining.

Of what is accepted the smallest distance wins; what copies is not judged any further. All
combinations begin with the same draws and the same noise, which come from the run's seed. Nothing
of this leaves the client.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from fedpdm.data import denormalize
from fedpdm.data.client_images import ClientImages
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.from_gaussians import begin, likeliest, read_level
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import SamplerSettings, refine, refining, steps_of
from fedpdm.evaluation.features import SmallClassifier, fit_classifier, predict
from fedpdm.evaluation.measures import group_labels
from fedpdm.evaluation.metrics import kernel_distance, near_copy_fraction
from fedpdm.jobs.progress import sum_progress, work_progress
from fedpdm.rng import Purpose, seed_sequence, torch_generator
from fedpdm.setup.build import sampler_settings
from fedpdm.setup.choice import CANDIDATES, SamplingChoice, fallback
from fedpdm.setup.run_setup import RunSetup

__all__ = ["choose_sampling", "most_calls"]

LEVELS: Final = (0.10, 0.15, 0.20, 0.25, 0.30)  # of T
LEAST_OF_CLASS: Final = 5  # held-out images, for a class to be judged on
LEAST: Final = 20  # of these in all, of at least two classes
MOST_CLASSES: Final = 16
IMAGES: Final = 96  # drawn for the classes that are judged by fidelity and distance
FEW: Final = 48  # and for those judged by near-copies
NUM_STEPS: Final = 8  # calls of the fine model for an image, at most
CLASSIFIER_STEPS: Final = 300  # of 64 images
COPIES: Final = 0.08
NEIGHBORS: Final = 50


def most_calls() -> int:
    """The most that a choice asks of the fine model, in images that it denoises once.

    Half of it is for near-copies, of every combination; the rest for distances, of those that are
    accepted."""
    return len(LEVELS) * 2 * CANDIDATES * (IMAGES + FEW) * NUM_STEPS


def choose_sampling(
    setup: RunSetup,
    held: ClientImages,
    coarse: GaussianDenoiser,
    fine: DenoisingFunction,
    *,
    device: torch.device,
    where: str,
) -> SamplingChoice:
    """The choice of a client that holds these images, with its finished models.

    `where` names the client in what is shown of progress. Where there is nothing to choose by (few
    images are held out, or they are too large for the classifier), `fallback`, which says so.
    """
    if setup.config.sampling.coarse_worth is not None:
        return fallback(setup, "sampling.coarse_worth mixes both models")
    if not 4 <= setup.spec.resolution <= 128:
        return fallback(setup, "nothing is chosen on images of this size")
    there = _judged_classes(held, coarse)
    judged = there[:MOST_CLASSES]
    heldout = held.heldout[np.isin(held.images.labels[held.heldout], judged)]
    if len(judged) < 2 or len(heldout) < LEAST:
        return fallback(
            setup,
            f"too few held-out images to choose on: {len(heldout)} of {len(judged)} classes, "
            f"needed {LEAST} of 2, {LEAST_OF_CLASS} of each",
        )
    rare = sorted(set(held.train_labels.tolist()) - set(there)) or judged
    levels, told, counts = _options(setup)
    judge = _Judge.of(
        setup, held, coarse, judged, rare, heldout, device=device, most=max(counts), where=where
    )
    tried = [
        SamplingChoice(handover=level, fine_labels=labels, candidates=count, why="")
        for level, labels, count in itertools.product(levels, told, counts)
    ]
    without = {count: judge.copies_without(count) for count in counts}
    copies = judge.near_copies(fine, tried)
    over = [c - _accepted(without[one.candidates]) for one, c in zip(tried, copies, strict=True)]
    kept = np.flatnonzero(np.array(over) <= max(0.0, min(over))).tolist()
    fidelities, distances = judge.likeness(fine, [tried[k] for k in kept])
    least = _recognised(max(fidelities))
    of_kept = [d if f >= least else math.inf for f, d in zip(fidelities, distances, strict=True)]
    chosen = int(np.argmin(of_kept))
    best = kept[chosen]
    return replace(
        tried[best],
        why=f"chosen among {len(tried)} on {len(heldout)} held-out images of {len(judged)} classes",
        scores={
            "fidelity": fidelities[chosen],
            "distance": distances[chosen],
            "near_copies": copies[best],
            "near_copies_without_copying": without[tried[best].candidates],
        },
    )


def _options(setup: RunSetup) -> tuple[list[int], list[bool], list[int]]:
    """Hand-overs, labels under them and candidates to try: what the config leaves open.

    A fine model that was trained up to the hand-over alone is not asked above it.
    """
    section, T = setup.config.sampling, setup.schedule.num_steps
    reach = T if setup.config.fine.t_range == "all" else setup.handover
    levels = sorted({min(max(1, round(level * T)), reach) for level in LEVELS})
    return (
        [section.handover] if section.handover else levels,
        [False, True] if section.fine_labels is None else [section.fine_labels],
        [section.candidates] if section.candidates else [1, CANDIDATES],
    )


def _judged_classes(held: ClientImages, coarse: GaussianDenoiser) -> list[int]:
    """Classes of the client's majority with enough held-out images, and with a Gaussian."""
    labels = held.images.labels[held.heldout]
    counts = np.bincount(labels, minlength=held.images.num_classes)
    gaussians = coarse.gaussians
    known = set(gaussians.classes[gaussians.weights > 0].tolist())
    found = [k for k in held.majority if counts[k] >= LEAST_OF_CLASS and k in known]
    return sorted(found, key=lambda k: (-counts[k], k))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judge:
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
    ) -> _Judge:
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
        self, fine: DenoisingFunction, tried: Sequence[SamplingChoice]
    ) -> tuple[list[float], list[float]]:
        """Of each way to sample, the share of images taken for the class that was asked for, and
        the mean distance over the judged classes."""
        rows = slice(0, self.num_judged)
        fidelities, distances, of_class = [], [], self.labels[rows]
        for pixels in self._drawn(fine, tried, rows=rows, what="likeness"):
            taken = predict(self.classifier, pixels).argmax(axis=1)
            fidelities.append(float((taken == of_class).mean()))
            features = predict(self.classifier, pixels, features=True).astype(np.float64)
            parts = [kernel_distance(features[of_class == k], self.real[k]) for k in self.classes]
            distances.append(float(np.mean(parts)))
        return fidelities, distances

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
        self, fine: DenoisingFunction, tried: Sequence[SamplingChoice], *, rows: slice, what: str
    ) -> Iterator[np.ndarray]:
        """For each way to sample the images uint8 (N, C, H, W) of the labels at `rows`.

        Ways that differ in their candidates alone stand together and share what is drawn.
        """
        ways = [
            (self._settings(same[0]), [one.candidates for one in same])
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

    def _settings(self, choice: SamplingChoice) -> SamplerSettings:
        settings = sampler_settings(self.setup, choice=choice)
        return replace(settings, num_steps=min(settings.num_steps, NUM_STEPS))

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


def _accepted(without: float) -> float:
    """The largest share of near-copies that may be, where so many are there without copying."""
    error = (2.0 * without * (1.0 - without) / FEW) ** 0.5  # of the difference of two such shares
    return without + COPIES + error


def _recognised(best: float) -> float:
    """The smallest share of recognised images that may be, where the best is so much."""
    p = (IMAGES * best + 1.0) / (
        IMAGES + 2.0
    )  # of all, none failed: there is an error all the same
    return best - (2.0 * p * (1.0 - p) / IMAGES) ** 0.5


def _copies(images: np.ndarray, training: np.ndarray) -> float:
    return near_copy_fraction(images, training, n=min(NEIGHBORS, len(training)))
