"""Measurements: the coarse loss on held-out releases, and image metrics per class group.

The coarse loss is a function of released images only and may always be reported. Image metrics
compare samples with raw images: they are not covered by the guarantee and are computed in
simulation only (`fedpdm.wire.RAW_METRICS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpdm.data import ImageSet
from fedpdm.evaluation.metrics import (
    PixelFeatures,
    frechet_distance,
    gaussian_statistics,
    nearest_label,
)

__all__ = ["GroupMetrics", "ImageJudge", "group_labels", "mean_loss"]

NUM_COMPONENTS = 32


@torch.no_grad()
def mean_loss(
    batch_loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    *,
    num_examples: int,
    generator: torch.Generator,
    batch_size: int = 256,
    repeats: int = 4,
) -> float:
    """Mean of a per-example loss over all examples, `repeats` noise draws each.

    The same generator seed gives the same draws, so values of two models compare.
    """
    indices = torch.arange(num_examples, device=generator.device).repeat(repeats)
    total = sum(float(batch_loss(part, generator).sum()) for part in indices.split(batch_size))
    return total / len(indices)


def group_labels(classes: Sequence[int], num_images: int) -> np.ndarray:
    """int64 (num_images,): the classes in turn, as evenly as it goes."""
    return np.resize(np.asarray(classes, dtype=np.int64), num_images)


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Samples of one class group against real images that no client holds.

    `frechet` is the Frechet distance (Heusel et al. 2017, Eq. 6) between Gaussians fitted to the
    32 leading principal components of the pixels, not of Inception features, so it must not be
    called FID or compared with one. `class_fidelity` is the share of samples whose 5 nearest real
    images in pixel space carry the label that was asked for.
    """

    frechet: float
    class_fidelity: float

    def named(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}_frechet": self.frechet,
            f"{prefix}_class_fidelity": self.class_fidelity,
        }


class ImageJudge:
    """Scores uint8 images of one class group against a reference set's images of that group."""

    def __init__(self, reference: ImageSet, classes: Sequence[int]) -> None:
        self.classes = tuple(classes)
        self._all = reference
        chosen = np.flatnonzero(np.isin(reference.labels, self.classes))
        components = min(NUM_COMPONENTS, len(reference) - 1)
        self._features = PixelFeatures.fit(reference.images, num_components=components)
        if len(chosen) < 2:
            raise ValueError(
                f"image metrics need at least 2 reference images of classes {self.classes}, "
                f"got {len(chosen)}"
            )
        self._reference = gaussian_statistics(self._features(reference.images[chosen]))

    def score(self, images: np.ndarray, labels: np.ndarray) -> GroupMetrics:
        """Metrics of images uint8 (N, C, H, W) that were sampled for `labels` int64 (N,)."""
        statistics = gaussian_statistics(self._features(images))
        guessed = nearest_label(
            images, reference_images=self._all.images, reference_labels=self._all.labels
        )
        return GroupMetrics(
            frechet=frechet_distance(
                statistics.mean, statistics.cov, self._reference.mean, self._reference.cov
            ),
            class_fidelity=float(np.mean(guessed == labels)),
        )


def merge_named(parts: Mapping[str, GroupMetrics]) -> dict[str, float]:
    """Flat metric names: {"majority_pfdm": m} -> {"majority_pfdm_frechet": ..., ...}."""
    return {name: value for key, m in parts.items() for name, value in m.named(key).items()}
