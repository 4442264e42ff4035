"""The n nearest rows of a large set, by matrix products in blocks.

    ||q - r||^2 = ||q||^2 - 2 <q, r> + ||r||^2

Both sets are cut into blocks, so that memory does not grow with N times M. Pixels are whole
numbers, for which this is exact in float64. Other values are centred at the mean of the references,
and the distances of the n rows found are computed again from differences, so that a copy is at
distance 0 there as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.evaluation.metrics.arrays import Array, check_features, flat_pixels

__all__ = ["Nearest", "nearest_rows"]

_QUERIES: Final = 1024  # rows of a block
_REFERENCES: Final = 4096
_DIFFERENCES: Final = 1 << 22  # values at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """`distances` float64 (N, n), rows rising, and `indices` int64 (N, n) of those references.

    Of references at equal distance that with the smaller index stands first.
    """

    distances: Array
    indices: NDArray[np.int64]


def nearest_rows(
    queries: Any,
    references: Any,
    *,
    n: int,
    names: tuple[str, str] = ("queries", "references"),
    progress: Callable[[int, int], None] | None = None,
) -> Nearest:
    """The n nearest `references` of each query, by Euclidean distance.

    Args:
        queries: (N, C, H, W) uint8, or (N, d) real features.
        references: M of the same kind and width. Blocks are converted as they are needed: uint8
            images stay uint8 in memory.
        n: in [1, M].
        names: of the two, in errors.
        progress: called with (queries done, N).

    Raises:
        ValueError: for arrays that do not fit together, or n out of bounds.
    """
    is_pixels = getattr(queries, "dtype", None) == np.uint8
    left, right = (
        _rows(rows, is_pixels, name) for rows, name in _named(queries, references, names)
    )
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have equally many values per row, "
            f"got {left.shape[1]} and {right.shape[1]}"
        )
    if not 1 <= n <= len(right):
        raise ValueError(f"n must be in [1, {len(right)}], got {n}")
    centre = np.zeros(left.shape[1]) if is_pixels else right.mean(axis=0)
    norms = np.empty(len(right))
    for block in _blocks(len(right), _REFERENCES):
        rows = right[block] - centre
        norms[block] = np.vecdot(rows, rows)
    distances = np.empty((len(left), n))
    indices = np.empty((len(left), n), dtype=np.int64)
    for part in _blocks(len(left), _QUERIES):
        squared, found = _search(left[part] - centre, right, norms, centre, n=n)
        if not is_pixels:
            squared = _squared_differences(left[part], right, found)
        order = np.lexsort((found, squared), axis=1)
        distances[part] = np.sqrt(np.take_along_axis(squared, order, 1))
        indices[part] = np.take_along_axis(found, order, 1)
        if progress is not None:
            progress(min(part.stop, len(left)), len(left))
    return Nearest(distances=distances, indices=indices)


def _search(
    queries: Array, right: NDArray[Any], norms: Array, centre: Array, *, n: int
) -> tuple[Array, NDArray[np.int64]]:
    """Squared distances and indices (B, n), unordered, of the n nearest of centred queries."""
    own = np.vecdot(queries, queries)[:, None]
    best = np.full((len(queries), n), np.inf)
    found = np.zeros((len(queries), n), dtype=np.int64)
    for block in _blocks(len(right), _REFERENCES):
        squared = queries @ (right[block] - centre).T
        squared *= -2.0
        squared += norms[block]
        squared += own
        # Few rows of a block come nearer than the n that are known: only those are looked at.
        nearer = squared < best.max(axis=1, keepdims=True)
        width = int(nearer.sum(axis=1).max())
        if width == 0:
            continue
        if width < squared.shape[1]:
            squared[~nearer] = np.inf
            at = np.argpartition(squared, width - 1, axis=1)[:, :width]
        else:
            at = np.broadcast_to(np.arange(width), squared.shape)
        values = np.concatenate([best, np.take_along_axis(squared, at, 1)], axis=1)
        places = np.concatenate([found, at + block.start], axis=1)
        kept = np.argpartition(values, n - 1, axis=1)[:, :n]
        best, found = np.take_along_axis(values, kept, 1), np.take_along_axis(places, kept, 1)
    return np.maximum(best, 0.0), found


def _squared_differences(
    queries: NDArray[Any], right: NDArray[Any], found: NDArray[np.int64]
) -> Array:
    """Squared distances (B, n) from the differences themselves."""
    squared = np.empty(found.shape)
    rows = max(1, _DIFFERENCES // (found.shape[1] * queries.shape[1]))
    for part in _blocks(len(queries), rows):
        difference = queries[part, None, :] - right[found[part]]
        squared[part] = np.vecdot(difference, difference)
    return squared


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _named(queries: Any, references: Any, names: tuple[str, str]) -> list[tuple[Any, str]]:
    return [(queries, names[0]), (references, names[1])]


def _rows(rows: Any, is_pixels: bool, name: str) -> NDArray[Any]:
    """(N, d), uint8 for pixels and float64 for features."""
    if not is_pixels:
        return check_features(rows, name=name, at_least=1)
    flat_pixels(rows[:1], name=name)  # its checks
    return np.asarray(rows).reshape(len(rows), -1)
