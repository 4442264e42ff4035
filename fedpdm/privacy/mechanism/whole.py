"""Vectors and products of vectors in whole numbers, so that bounds on sums hold to the last digit.

`whole_vectors` clips and rounds each row to whole numbers with a sum of squares of at most `limit`.
Sums of such rows a, and sums of their products a a^T, are whole numbers again.

`pack_symmetric` writes a symmetric matrix S as a vector whose Euclidean norm is the Frobenius norm
of S, in whole numbers: the diagonal, and for every two entries p, q above it p + q and p - q, whose
squares sum to 2 (p^2 + q^2). (An entry above the diagonal counts twice in the Frobenius norm, and
a factor of sqrt(2) would not be whole.) For rows with a sum of squares of at most L,

    || a a^T - b b^T ||_F^2 = |a|^4 + |b|^4 - 2 (a . b)^2 <= 2 L^2,

with equality where a and b are orthogonal and both at the limit.
"""

from __future__ import annotations

import math

import numpy as np
import torch

__all__ = [
    "pack_symmetric",
    "packed_size",
    "sum_of_products",
    "sum_of_whole",
    "unpack_symmetric",
    "whole_vectors",
]

TRIES = 12  # of shortening a row a little more before it is rounded towards zero


def whole_vectors(x: np.ndarray, *, steps: float, limit: int) -> np.ndarray:
    """Rows of `x` float64 (n, d) times `steps`, clipped and rounded: int64 (n, d).

    The sum of squares of each row is at most `limit`, checked in whole numbers. Rows are rounded to
    nearest, those that are too long then shortened until they fit; a row that is whole already and
    within the limit stays as it is. `ValueError` naming a row that is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        scaled = np.asarray(x, dtype=np.float64) * steps
        norms = np.sqrt(np.vecdot(scaled, scaled))
    if not np.isfinite(norms).all():
        raise ValueError(f"image {int(np.argmin(np.isfinite(norms)))} has values not finite")
    factor = np.minimum(1.0, math.sqrt(limit) / np.maximum(norms, math.sqrt(limit)))
    # Rounding to whole numbers allows a norm of less than 0.5 sqrt(d) more: an int64 holds it.
    whole = np.rint(scaled * factor[:, None]).astype(np.int64)
    for _ in range(TRIES):
        squares = np.vecdot(whole, whole)
        long = np.flatnonzero(squares > limit)
        if not len(long):
            return whole
        factor[long] *= np.sqrt(limit / squares[long]) * (1.0 - 1e-3)
        whole[long] = np.rint(scaled[long] * factor[long, None]).astype(np.int64)
    long = np.flatnonzero(np.vecdot(whole, whole) > limit)
    inside = math.sqrt(limit) * (1.0 - 1e-10) / np.maximum(norms[long], math.sqrt(limit))
    whole[long] = np.trunc(scaled[long] * inside[:, None]).astype(np.int64)
    if (np.vecdot(whole, whole) > limit).any():
        raise ArithmeticError("an image is longer than the clip norm after clipping")
    return whole


def sum_of_whole(rows: torch.Tensor, *, steps: float, limit: int) -> torch.Tensor:
    """The sum of the rows of float32 (n, d) as `whole_vectors` makes them: float64 (d,), on their
    device, whole numbers; fast where coordinates are many. A row that is not finite counts as zero.

    Of a row the squares are summed in float64, in which whole numbers below 2^53 are exact; a row
    that cannot be made short enough counts as zero too.
    """
    size = rows.shape[1]
    total = torch.zeros(size, dtype=torch.float64, device=rows.device)
    short = torch.empty_like(rows[0]) if len(rows) else total
    wide = torch.empty_like(total)
    # Rounding adds a twelfth to the square of each number on average, with this spread of the sum.
    most = max(limit - size / 12.0 - 4.0 * limit**0.5, limit / 4.0) ** 0.5
    norms = torch.linalg.vector_norm(rows, dim=1).double() * steps
    for row, norm in zip(rows, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            if not bool(row.isfinite().all()):
                continue
            norm = float(torch.linalg.vector_norm(row.double())) * steps
        factor = min(1.0, most / norm) if norm else 1.0
        for _ in range(TRIES):
            torch.mul(row, factor * steps, out=short).round_()
            wide.copy_(short)
            squares = float(torch.dot(wide, wide))
            if squares <= limit:
                total += wide
                break
            factor *= math.sqrt(limit / squares) * (1.0 - 1e-3)
    return total


def sum_of_products(whole: np.ndarray) -> np.ndarray:
    """Sum of a a^T over the rows a of int64 (n, d): int64 (d, d).

    Multiplied in float64, in which whole numbers below 2^53 are exact; `ArithmeticError` where
    they might not be.
    """
    wide = whole.astype(np.float64)
    if np.vecdot(whole, whole).sum(dtype=np.float64) >= 2.0**52:
        raise ArithmeticError("sums of products of so many images are not exact")
    return np.rint(wide.T @ wide).astype(np.int64)


def packed_size(d: int) -> int:
    """Length of a packed symmetric (d, d) matrix."""
    above = d * (d - 1) // 2
    return d + above + above % 2


def pack_symmetric(matrix: np.ndarray) -> np.ndarray:
    """Symmetric int64 (d, d) -> int64 (packed_size(d),) of the same norm; see the module."""
    above = matrix[np.triu_indices(len(matrix), 1)]
    if len(above) % 2:
        above = np.append(above, 0)
    first, second = above[0::2], above[1::2]
    return np.concatenate([np.diagonal(matrix), first + second, first - second])


def unpack_symmetric(packed: np.ndarray, d: int) -> np.ndarray:
    """Inverse of `pack_symmetric`, float64 (d, d). Noise of s on each number becomes s on the
    diagonal and s / sqrt(2) on entries above it, independent of each other."""
    values = np.asarray(packed, dtype=np.float64)
    sums, differences = np.split(values[d:], 2)
    above = np.stack([sums + differences, sums - differences], axis=1).ravel() / 2.0
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d, 1)] = above[: d * (d - 1) // 2]
    matrix += matrix.T
    np.fill_diagonal(matrix, values[:d])
    return matrix
