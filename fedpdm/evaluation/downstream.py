"""How useful synthetic images are: a classifier is trained on them and tested on real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.evaluation.features import fit_classifier, predict
from fedpdm.evaluation.features.network import Progress
from fedpdm.rng import Purpose, seed_sequence

__all__ = ["NUM_STEPS", "DownstreamScores", "classifier_scores"]

NUM_STEPS: Final = 500


@dataclass(frozen=True, kw_only=True)
class DownstreamScores:
    """Shares of right answers on real images, all in [0, 1].

    Attributes:
        accuracy: over all test images.
        worst_group_accuracy: the lowest of `per_class`.
        per_class: class -> accuracy, for the classes that have a test image.
    """

    accuracy: float
    worst_group_accuracy: float
    per_class: Mapping[int, float]

    def named(self, prefix: str) -> dict[str, float]:
        """Flat names; those of classes are left out."""
        return {
            f"{prefix}_downstream_accuracy": self.accuracy,
            f"{prefix}_downstream_worst_group": self.worst_group_accuracy,
        }


def classifier_scores(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.int64],
    *,
    num_classes: int,
    seed: int,
    num_steps: int = NUM_STEPS,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DownstreamScores:
    """Train `SmallClassifier` on synthetic images and labels, test it on real ones.

    Every method gets the same number of steps, so time does not depend on the number of images.
    Real training images, given in place of synthetic ones, set the ceiling.

    Args:
        images, labels: uint8 (N, C, H, H) and int64 (N,) in [0, num_classes), N >= 2.
        test_images, test_labels: the same of M real images that no client holds, M >= 1.
        seed: of initial weights, order and shifts; equal seeds give equal scores on one machine.
        progress: as of `fit_classifier`.

    Raises:
        ValueError: for arrays that do not fit together.
        FloatingPointError: training failed; names the step.
    """
    if len(test_images) == 0 or test_images.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"test_images must be at least 1 of shape {images.shape[1:]}, got {test_images.shape}"
        )
    if test_labels.shape != (len(test_images),):
        raise ValueError(
            f"test_labels must have shape ({len(test_images)},), got {test_labels.shape}"
        )
    model, _ = fit_classifier(
        images,
        labels,
        num_classes=num_classes,
        num_steps=num_steps,
        seed=seed_sequence(seed, Purpose.DOWNSTREAM),
        device=device,
        progress=progress,
        what="downstream classifier",
    )
    right = predict(model, test_images).argmax(axis=1) == test_labels
    per_class = {
        int(label): float(right[test_labels == label].mean()) for label in np.unique(test_labels)
    }
    return DownstreamScores(
        accuracy=float(right.mean()),
        worst_group_accuracy=min(per_class.values()),
        per_class=per_class,
    )
