"""What a simulation's samples are scored with: features, references, real images of other clients.

Everything here reads raw images: the guarantee covers none of it, so it is for simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.client_images import ClientImages
from fedpdm.data.loading import build_partitions, load_public, load_split
from fedpdm.diffusion.training import select_device
from fedpdm.evaluation.features import (
    FeatureExtractor,
    InceptionFeatures,
    MapFeatures,
    PixelExtractor,
    TrainedFeatures,
    train_feature_network,
)
from fedpdm.evaluation.judging import GroupReference, score_group
from fedpdm.jobs.progress import work_progress
from fedpdm.rng import Purpose, numpy_rng

__all__ = ["Labelled", "Say", "Scorer", "build_extractor", "real_images_of_others"]

Say = Callable[[str], None]
Labelled = tuple[np.ndarray, np.ndarray]
"""Images uint8 (N, C, H, W) and labels int64 (N,)."""


def build_extractor(
    config: RunConfig, reference: ImageSet, *, cache: Path | None, say: Say
) -> tuple[FeatureExtractor, TrainedFeatures | None]:
    """(extractor that `evaluation.features` names, network that classifies, if there is one)."""
    kind = config.evaluation.features
    if kind == "inception":
        return InceptionFeatures(device=select_device(config.run.device)), None
    if kind == "pixels":
        components = min(32, len(reference) - 1)
        return PixelExtractor.fit(reference.images, num_components=components), None
    public = load_public(config, count=config.evaluation.num_public)
    show = work_progress("feature network")
    network = train_feature_network(public, seed=0, cache=cache, progress=show)
    say(f"feature network: accuracy {network.accuracy:.3f} on {network.num_held_out} public images")
    return network, network


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """The data of a simulation and what looks at it. `count` images are scored per class group.

    `larger` is a second set of features, for a distance that copies do not pass; None where there
    are none or too few images.
    """

    config: RunConfig
    train: ImageSet
    test: ImageSet
    extractor: FeatureExtractor
    classifier: TrainedFeatures | None
    larger: FeatureExtractor | None
    count: int
    cache: Path | None

    @classmethod
    def of(
        cls, config: RunConfig, *, num_images: int | None, cache: Path | None, say: Say
    ) -> Scorer:
        """`ConfigError` for a run that is no simulation, `ValueError` for no images at all."""
        if not config.run.simulation:
            raise ConfigError(
                "run.simulation: false; only a simulation's images can be scored here"
            )
        count = config.evaluation.num_images if num_images is None else num_images
        if count < 1:
            raise ValueError(f"number of images must be at least 1, got {count}")
        train, test = load_split(config, "train"), load_split(config, "test")
        extractor, classifier = build_extractor(config, test, cache=cache, say=say)
        enough = classifier is not None and count > MapFeatures.width
        larger = MapFeatures(classifier) if classifier is not None and enough else None
        return cls(config=config, train=train, test=test, extractor=extractor,
                   classifier=classifier, larger=larger, count=count, cache=cache)  # fmt: skip

    def scores(
        self, drawn: Labelled, *, group: str, classes: Sequence[int], own: ClientImages
    ) -> dict[str, float]:
        """Flat scores of images of a group, against test images and the client's own."""
        images, labels = drawn
        scores = score_group(
            images, labels, reference=self._reference(classes, self.extractor),
            training=own.images.images[own.train], extractor=self.extractor,
            classifier=self.classifier, rng=_rng(self.config.run.seed, own.client_id),
        ).named(group)  # fmt: skip
        if self.larger is not None and len(images) > MapFeatures.width:
            reference = self._reference(classes, self.larger)
            distance = reference.frechet.distance(self.larger(images))
            scores[f"{group}_frechet[{self.larger.name}]"] = distance
        return scores

    def _reference(self, classes: Sequence[int], extractor: FeatureExtractor) -> GroupReference:
        return GroupReference.of(self.test, classes, extractor, cache=self.cache)

    def others(self, client: int, classes: Sequence[int]) -> Labelled:
        """As `real_images_of_others`."""
        return real_images_of_others(self.config, self.train, client, classes, self.count)


def real_images_of_others(
    config: RunConfig, train: ImageSet, client: int, classes: Sequence[int], count: int
) -> Labelled:
    """About `count` real images of these classes that other clients hold, classes in turn."""
    parts = build_partitions(config, train)
    held = [part.indices for part in parts if part.client_id != client] or [parts[0].indices]
    pool = np.concatenate(held)
    each, order = -(-count // len(classes)), _rng(config.run.seed, client)
    chosen = []
    for label in classes:
        members = pool[train.labels[pool] == label]
        chosen.append(order.permutation(members)[:each])
    indices = np.concatenate(chosen)
    return train.images[indices], train.labels[indices]


def _rng(seed: int, client: int) -> np.random.Generator:
    return numpy_rng(seed, Purpose.EVALUATION, client=client)
