"""Checks of arrays that the metrics share, and slices that bound their memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "check_features", "check_same_width", "flat_pixels", "parts"]

Array = NDArray[np.float64]

_CHUNK: Final = 256


def parts(rows: Array) -> Iterator[slice]:
    """Slices that cut `rows` into pieces, to bound memory."""
    return (slice(start, start + _CHUNK) for start in range(0, len(rows), _CHUNK))


def check_features(features: ArrayLike, *, name: str, at_least: int) -> Array:
    """(N, d) float64; `ValueError` for another shape, few rows or a non-finite value."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < at_least or rows.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (N, d) with N at least {at_least}, got {rows.shape}"
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite, got inf or nan")
    return rows


def check_same_width(left: Array, right: Array, *, names: tuple[str, str]) -> None:
    """`ValueError` unless rows of `left` and `right` are of one length."""
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have equally many values per row, "
            f"got {left.shape[1]} and {right.shape[1]}"
        )


def flat_pixels(images: Any, *, name: str) -> Array:
    """(N, C * H * W) float64, 0..255, of uint8 images; `ValueError` for anything else."""
    if getattr(images, "dtype", None) != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{name} must be uint8 of shape (N, C, H, W) with N at least 1, "
            f"got {getattr(images, 'dtype', type(images).__name__)} "
            f"of shape {getattr(images, 'shape', ())}"
        )
    return np.asarray(images).reshape(len(images), -1).astype(np.float64)
