"""Distances that are averages over subsets: Frechet at infinitely many examples, and KID.

A Frechet distance of N examples is too large by about a constant over N. The constant depends on
the model, so two models can change places with N alone. Extrapolated values compare across N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from fedpdm.evaluation.metrics.arrays import Array, check_features, check_same_width, parts
from fedpdm.evaluation.metrics.distances import FeatureStatistics, covariance_root

__all__ = [
    "ExtrapolatedFrechet",
    "FrechetReference",
    "KernelDistance",
    "frechet_at_infinity",
    "kernel_distance_of_subsets",
]

_SMALLEST_SHARE: Final = 4


class FrechetReference:
    """A reference Gaussian with the root of its covariance, which all distances to it share.

    Raises:
        ValueError: if the covariance is not one.
    """

    def __init__(self, statistics: FeatureStatistics) -> None:
        self.statistics = statistics
        self._root, self._trace = covariance_root(
            statistics.cov, name="cov", size=len(statistics.mean)
        )

    def distance(self, features: ArrayLike) -> float:
        """`frechet_distance` of the Gaussian fitted to (N, d) features, N >= 2, to this one.

        `tr (A B)^(1/2)` is the sum of the square roots of the eigenvalues of `R A R`, R the root
        of B: one decomposition of min(N, d) rows. For a covariance A of N examples it is that of
        the (N, N) matrix `Y Y' / (N - 1)`, `Y = X R`, X the centred examples.
        """
        rows = check_features(features, name="features", at_least=2)
        check_same_width(rows, self._root, names=("features", "the reference"))
        mean = rows.mean(axis=0)
        centred = rows - mean
        turned = centred @ self._root
        gram = turned @ turned.T if len(rows) < rows.shape[1] else turned.T @ turned
        values = scipy.linalg.eigvalsh(gram / (len(rows) - 1))
        noise = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
        trace_root = float(np.sqrt(values[values > noise]).sum())
        trace = float((centred**2).sum() / (len(rows) - 1))
        shift = float(((mean - self.statistics.mean) ** 2).sum())
        return max(0.0, shift + trace + self._trace - 2.0 * trace_root)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtrapolatedFrechet:
    """The line `value + slope / N` through distances of subsets.

    Attributes:
        value: the distance at infinitely many generated examples; it can be a little below 0.
        slope: in units of distance times examples.
        sizes: (n,) int64 subset sizes, rising, the last all examples.
        distances: (n,) mean distance of each size.
    """

    value: float
    slope: float
    sizes: np.ndarray
    distances: Array


def frechet_at_infinity(
    features: ArrayLike,
    reference: FrechetReference | FeatureStatistics,
    *,
    rng: np.random.Generator,
    num_sizes: int = 15,
    smallest: int | None = None,
) -> ExtrapolatedFrechet:
    """Frechet distance at infinitely many generated examples (Chong and Forsyth 2020, section 4).

    Distances of random subsets of `num_sizes` sizes, a least-squares line in 1/N, its intercept.
    Sizes are evenly spaced in 1/N. The reference stays what it is: its own finite size still
    counts, in the same way for everything that is compared with it. The law 1/N holds for N well
    above d; with few examples the intercept is still too large, but less than the distance is.

    Args:
        features: (N, d), N >= 4.
        rng: draws the subsets.
        num_sizes: >= 2.
        smallest: in [2, N - 1]; default max(d + 1, N / 4), at most N / 2.

    Raises:
        ValueError: for unsuitable features or a parameter out of bounds.
    """
    rows = check_features(features, name="features", at_least=4)
    target = reference if isinstance(reference, FrechetReference) else FrechetReference(reference)
    num_rows, width = rows.shape
    if smallest is None:
        smallest = min(num_rows // 2, max(width + 1, num_rows // _SMALLEST_SHARE))
    if not 2 <= smallest <= num_rows - 1:
        raise ValueError(f"smallest must be in [2, {num_rows - 1}], got {smallest}")
    if num_sizes < 2:
        raise ValueError(f"num_sizes must be at least 2, got {num_sizes}")
    inverse = np.linspace(1.0 / smallest, 1.0 / num_rows, num_sizes)
    sizes = np.unique(np.rint(1.0 / inverse).astype(np.int64))
    distances = np.array(
        [target.distance(rows[rng.permutation(num_rows)[:size]]) for size in sizes]
    )
    slope, value = np.polyfit(1.0 / sizes, distances, deg=1)
    return ExtrapolatedFrechet(
        value=float(value), slope=float(slope), sizes=sizes, distances=distances
    )


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Mean and standard deviation of `kernel_distance` over random subsets.

    `std` is the spread over subsets of this size (divisor: their number), not an error of `mean`.
    """

    mean: float
    std: float
    subset_size: int
    num_subsets: int


def kernel_distance_of_subsets(
    a: ArrayLike,
    b: ArrayLike,
    *,
    rng: np.random.Generator,
    num_subsets: int = 100,
    subset_size: int | None = None,
    degree: int = 3,
) -> KernelDistance:
    """KID as it is reported: over subsets of both sets (Binkowski et al. 2018, section 4).

    Of each pair of subsets the `kernel_distance`, all from one pass over the kernel matrices: a
    subset's sum is `s' K s` for its row s of zeros and ones.

    Args:
        a, b: (N, d) and (M, d).
        rng: draws the subsets, without replacement within one, from a and b in turn.
        num_subsets: >= 1.
        subset_size: in [2, min(N, M)]; default half of the smaller set, at most the usual 1000.
        degree: of the kernel, >= 1; 3 is KID's.

    Raises:
        ValueError: for unsuitable features or a parameter out of bounds.
    """
    rows_a = check_features(a, name="a", at_least=2)
    rows_b = check_features(b, name="b", at_least=2)
    check_same_width(rows_a, rows_b, names=("a", "b"))
    highest = min(len(rows_a), len(rows_b))
    size = max(2, min(1000, highest // 2)) if subset_size is None else subset_size
    for name, value, low in (("degree", degree, 1), ("num_subsets", num_subsets, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if not 2 <= size <= highest:
        raise ValueError(f"subset_size must be in [2, {highest}], got {size}")
    chosen_a, chosen_b = np.zeros((len(rows_a), num_subsets)), np.zeros((len(rows_b), num_subsets))
    for subset in range(num_subsets):
        for chosen in (chosen_a, chosen_b):
            chosen[rng.choice(len(chosen), size, replace=False), subset] = 1.0

    def sums(left: Array, right: Array, of_left: Array, of_right: Array) -> Array:
        """(num_subsets,) sums of the kernel over each subset's pairs."""
        total = np.zeros(num_subsets)
        for part in parts(left):
            kernel = left[part] @ right.T
            kernel /= left.shape[1]
            kernel += 1.0
            power = kernel.copy()
            for _ in range(degree - 1):
                power *= kernel
            total += (of_left[part] * (power @ of_right)).sum(axis=0)
        return total

    def within(rows: Array, chosen: Array) -> Array:
        diagonal = ((rows**2).sum(axis=1) / rows.shape[1] + 1.0) ** degree
        off = sums(rows, rows, chosen, chosen) - diagonal @ chosen
        pairs: Array = off / (size * (size - 1))
        return pairs

    across = sums(rows_a, rows_b, chosen_a, chosen_b) / size**2
    values = within(rows_a, chosen_a) + within(rows_b, chosen_b) - 2.0 * across
    return KernelDistance(
        mean=float(values.mean()), std=float(values.std()), subset_size=size,
        num_subsets=num_subsets,
    )  # fmt: skip
