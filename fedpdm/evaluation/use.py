"""What a client's own classifier gains: from samples, from the Gaussians, from both.

The classifier is first made as good as the client's own images allow (`Recipe`; its values were
chosen on a seed that is in no table): a weak one gains from anything. Majority classes are the
client's own images in every row; what differs is where images of minority classes come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import ImageSet
from fedpdm.evaluation.features.network import Progress, fit_classifier, predict
from fedpdm.rng import Purpose, seed_sequence

__all__ = ["Recipe", "Use", "own_log_probabilities", "use_of"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the classifier is trained.

    Attributes:
        num_steps: of 64 images.
        affine: turned, stretched and sheared images, else moved ones only.
        own_share: of a minority class's draws, the share of the client's own images where there
            are others; the rest are the others.
        gaussian_weight: of the Gaussians' log-probabilities, added to the network's.
        trainings: networks of other seeds; accuracies are their means.
    """

    num_steps: int = 3000
    affine: bool = True
    own_share: float = 0.5
    gaussian_weight: float = 0.75
    trainings: int = 2


@dataclass(frozen=True, kw_only=True)
class Use:
    """Accuracy on real images: mean over the minority classes, and over all classes."""

    minority: float
    mean: float


def use_of(
    log_probabilities: Sequence[NDArray[np.float64]],
    labels: NDArray[np.int64],
    *,
    minority: Sequence[int],
) -> Use:
    """Of log-probabilities (N, K) of real images, from one or more trainings; `labels` (N,)."""
    per_class: dict[int, list[float]] = {int(label): [] for label in np.unique(labels)}
    for scores in log_probabilities:
        right = scores.argmax(axis=1) == labels
        for label, values in per_class.items():
            values.append(float(right[labels == label].mean()))
    means = {label: float(np.mean(values)) for label, values in per_class.items()}
    rare = [means[label] for label in minority if label in means]
    if not rare:
        raise ValueError(f"none of the minority classes {tuple(minority)} has a test image")
    return Use(minority=float(np.mean(rare)), mean=float(np.mean([*means.values()])))


def own_log_probabilities(
    own: ImageSet,
    others: tuple[NDArray[np.uint8], NDArray[np.int64]] | None,
    test: NDArray[np.uint8],
    *,
    minority: Sequence[int],
    seed: int,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], Progress] | None = None,
) -> list[NDArray[np.float64]]:
    """Log-probabilities (N, K) of `test` uint8 (N, C, H, H), for each training.

    Args:
        own: the client's training images.
        others: images and labels of minority classes to train on too: samples, or real ones.
        minority: the classes of which the client has few images.
        seed: of the networks.
        progress: of a training by its number.

    Raises:
        ValueError: for arrays that do not fit together, or a minority class that is in no images.
    """
    chosen = recipe or Recipe()
    images, labels, chances = _mixed(own, others, minority=minority, own_share=chosen.own_share)
    answers = []
    for number in range(chosen.trainings):
        model, _ = fit_classifier(
            images, labels, num_classes=own.num_classes, num_steps=chosen.num_steps,
            seed=seed_sequence(seed, Purpose.DOWNSTREAM, round=1 + number), device=device,
            chances=chances, affine=chosen.affine,
            progress=progress(number) if progress else None, what="classifier of own images",
        )  # fmt: skip
        logits = torch.from_numpy(predict(model, test)).double()
        answers.append(logits.log_softmax(dim=1).numpy())
    return answers


def _mixed(
    own: ImageSet,
    others: tuple[NDArray[np.uint8], NDArray[np.int64]] | None,
    *,
    minority: Sequence[int],
    own_share: float,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """(images, labels, chances): every class is drawn equally often."""
    images, labels = own.images, own.labels
    is_own = np.ones(len(labels), dtype=bool)
    if others is not None:
        kept = np.isin(others[1], tuple(minority))
        images = np.concatenate([images, others[0][kept]])
        labels = np.concatenate([labels, others[1][kept]])
        is_own = np.arange(len(labels)) < len(own)
    chances = np.zeros(len(labels))
    for label in np.unique(labels):
        parts = [(labels == label) & is_own, (labels == label) & ~is_own]
        shares = [own_share, 1.0 - own_share] if all(part.any() for part in parts) else [1.0, 1.0]
        for part, share in zip(parts, shares, strict=True):
            if part.any():
                chances[part] = share / part.sum()
    return images, labels, chances
