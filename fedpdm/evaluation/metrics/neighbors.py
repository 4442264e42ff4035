"""Nearest neighbours in pixel space: the label they vote for, and near-copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.evaluation.metrics.arrays import Array, flat_pixels, parts
from fedpdm.evaluation.metrics.nearest import Nearest, nearest_rows

__all__ = ["near_copy_fraction", "near_copy_ratio", "nearest_label", "search_copies"]


def nearest_label(
    images: NDArray[np.uint8],
    *,
    reference_images: NDArray[np.uint8],
    reference_labels: NDArray[np.int64],
    k: int = 5,
) -> NDArray[np.int64]:
    """k-nearest-neighbour classification by Euclidean distance of pixels.

    Majority vote; of classes with equal votes the one with the nearest image wins; of
    reference images at equal distance the first counts as nearer.

    Args:
        images: (N, C, H, W) uint8.
        reference_images: (M, C, H, W) uint8.
        reference_labels: (M,) integers >= 0.
        k: in [1, M].

    Returns:
        (N,) int64 labels.

    Raises:
        ValueError: for arrays that do not fit together or k out of bounds.
    """
    queries, references = _pixel_pair(images, reference_images, ("images", "reference_images"))
    labels = np.asarray(reference_labels)
    if labels.shape != (len(references),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"reference_labels must be integers of shape ({len(references)},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if not 1 <= k <= len(references):
        raise ValueError(f"k must be in [1, {len(references)}], got {k}")
    answer = np.empty(len(queries), dtype=np.int64)
    for part in parts(queries):
        # Squared distances of pixels are whole numbers, so distance * M + position is exact in
        # float64 (below 2^53) and orders by distance, then by position.
        keys = _squared_distances(queries[part], references) * len(references)
        keys += np.arange(len(references))
        nearest = np.sort(np.partition(keys, k - 1, axis=1)[:, :k], axis=1)
        votes = labels[(nearest % len(references)).astype(np.int64)]  # (n, k), nearest first
        num_votes = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)
        answer[part] = votes[np.arange(len(votes)), num_votes.argmax(axis=1)]
    return answer


def near_copy_ratio(
    generated: NDArray[np.uint8],
    training: NDArray[np.uint8],
    *,
    threshold_ratio: float = 0.5,
    n: int = 50,
) -> Array:
    """How much nearer the nearest training image is than training images around it are.

    `l2(gen, x) / (a * mean l2(gen, y) over the n nearest training images y)`, where x is the
    nearest and a is `threshold_ratio` (Carlini et al. 2023, "Extracting training data from
    diffusion models", section 5.1; docs/attacks.md). At most 1: memorised.

    Args:
        generated: (N, C, H, W) uint8.
        training: (M, C, H, W) uint8.
        threshold_ratio: a > 0.
        n: neighbours, x included, in [2, M].

    Returns:
        (N,) float64 in [0, 1 / a]; 0 for a copy, also where all n neighbours are copies.

    Raises:
        ValueError: for arrays that do not fit together or a parameter out of bounds.
    """
    return search_copies(generated, training, threshold_ratio=threshold_ratio, n=n)[0]


def search_copies(
    generated: NDArray[Any],
    training: NDArray[Any],
    *,
    threshold_ratio: float = 0.5,
    n: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, Nearest]:
    """`near_copy_ratio` on pixels or features (N, d), and the n nearest training rows themselves.

    `progress` is called with (images done, N); the rest is as there.
    """
    if getattr(generated, "shape", (0,))[1:] != getattr(training, "shape", (0,))[1:]:
        raise ValueError(
            f"generated and training must have one image size, got {generated.shape[1:]} "
            f"and {training.shape[1:]}"
        )
    if not (threshold_ratio > 0 and np.isfinite(threshold_ratio)):
        raise ValueError(f"threshold_ratio must be above 0 and finite, got {threshold_ratio}")
    if not 2 <= n <= len(training):
        raise ValueError(f"n must be in [2, {len(training)}], got {n}")
    found = nearest_rows(
        generated, training, n=n, names=("generated", "training"), progress=progress
    )
    ratios = np.zeros(len(found.distances))
    scale = threshold_ratio * found.distances.mean(axis=1)
    np.divide(found.distances[:, 0], scale, out=ratios, where=scale > 0)
    return ratios, found


def near_copy_fraction(
    generated: NDArray[np.uint8],
    training: NDArray[np.uint8],
    *,
    threshold_ratio: float = 0.5,
    n: int = 50,
) -> float:
    """Share of `generated` whose `near_copy_ratio` is at most 1; arguments and errors as there."""
    ratios = near_copy_ratio(generated, training, threshold_ratio=threshold_ratio, n=n)
    return float((ratios <= 1.0).mean())


def _squared_distances(queries: Array, references: Array) -> Array:
    """(n, M) exact squared distances of whole-numbered rows."""
    cross = queries @ references.T
    squared: Array = (queries**2).sum(axis=1)[:, None] - 2.0 * cross + (references**2).sum(axis=1)
    return squared


def _pixel_pair(left: Any, right: Any, names: tuple[str, str]) -> tuple[Array, Array]:
    if getattr(left, "shape", (0,))[1:] != getattr(right, "shape", (0,))[1:]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one image size, got {left.shape[1:]} "
            f"and {right.shape[1:]}"
        )
    return flat_pixels(left, name=names[0]), flat_pixels(right, name=names[1])
