"""Distances between two sets of feature vectors, each an (N, d) array with a row per image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.spatial.distance
from numpy.typing import ArrayLike

from fedpdm.evaluation.metrics.arrays import Array, check_features, check_same_width, parts

__all__ = [
    "FeatureStatistics",
    "assignment_distance",
    "covariance_root",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """Mean (d,), unbiased covariance (d, d) and number of the feature vectors, float64."""

    mean: Array
    cov: Array
    num_examples: int


def gaussian_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean and covariance (divisor N - 1) of `features` (N, d), N >= 2.

    Raises:
        ValueError: if `features` has another shape, fewer than 2 rows or a non-finite value.
    """
    rows = check_features(features, name="features", at_least=2)
    mean = rows.mean(axis=0)
    centred = rows - mean
    cov = centred.T @ centred / (len(rows) - 1)
    return FeatureStatistics(mean=mean, cov=cov, num_examples=len(rows))


def frechet_distance(
    mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, the formula of FID.

    `||mean_a - mean_b||^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))` (Heusel et al. 2017,
    section 2; Dowson and Landau 1982). The trace of the root is the sum of the singular values
    of `cov_a^(1/2) cov_b^(1/2)`, with roots by eigen-decomposition, so singular covariances
    (fewer examples than features) need no added diagonal.

    Args:
        mean_a, mean_b: (d,) finite.
        cov_a, cov_b: (d, d) finite, symmetric, positive semi-definite.

    Returns:
        The distance, >= 0, in squared feature units.

    Raises:
        ValueError: if shapes differ or a covariance is not what is said above.
    """
    first, second = (np.asarray(mean, dtype=np.float64) for mean in (mean_a, mean_b))
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"mean_a and mean_b must have one shape (d,), got {first.shape} and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("mean_a and mean_b must be finite, got inf or nan")
    root_a, trace_a = covariance_root(cov_a, name="cov_a", size=len(first))
    root_b, trace_b = covariance_root(cov_b, name="cov_b", size=len(first))
    trace_root = float(scipy.linalg.svdvals(root_a @ root_b).sum())
    shift = float(((first - second) ** 2).sum())
    return max(0.0, shift + trace_a + trace_b - 2.0 * trace_root)


def covariance_root(cov: ArrayLike, *, name: str, size: int) -> tuple[Array, float]:
    """Symmetric root (d, d) and trace of a covariance; eigenvalues at rounding noise become 0.

    Raises:
        ValueError: if it has another shape, or is not finite, symmetric, positive semi-definite.
    """
    matrix = np.asarray(cov, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"{name} must have shape ({size}, {size}), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got inf or nan")
    scale = float(np.abs(matrix).max(initial=0.0))
    if float(np.abs(matrix - matrix.T).max(initial=0.0)) > 1e-8 * scale:
        raise ValueError(f"{name} must be symmetric, got a matrix that is not")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    noise = size * np.finfo(np.float64).eps * float(np.abs(values).max(initial=0.0))
    if float(values.min(initial=0.0)) < -1e-8 * scale - noise:
        raise ValueError(
            f"{name} must be positive semi-definite, got the eigenvalue {values.min():.3g}"
        )
    values = np.where(values > noise, values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T, float(values.sum())


def assignment_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared 2-Wasserstein distance of two equally large sets, by exact assignment.

    `min over permutations p of mean ||a_i - b_p(i)||^2` (Peyre and Cuturi 2019, section 2.2), which
    needs no form of the distributions. Between two sets of N points of one distribution it is above
    0, by an amount that shrinks slowly with N in many dimensions.

    Args:
        a, b: (N, d), N >= 1; time grows like N^3 (2,000 points take about a second).

    Raises:
        ValueError: for unsuitable features or sets of different sizes.
    """
    rows_a = check_features(a, name="a", at_least=1)
    rows_b = check_features(b, name="b", at_least=1)
    check_same_width(rows_a, rows_b, names=("a", "b"))
    if len(rows_a) != len(rows_b):
        raise ValueError(f"a and b must have equally many rows, got {len(rows_a)}, {len(rows_b)}")
    cost = scipy.spatial.distance.cdist(rows_a, rows_b, "sqeuclidean")
    return float(cost[scipy.optimize.linear_sum_assignment(cost)].mean())


def kernel_distance(a: ArrayLike, b: ArrayLike, *, degree: int = 3) -> float:
    """Unbiased squared maximum mean discrepancy, the estimator of KID.

    Kernel `k(x, y) = (x . y / d + 1)^degree`; `mean k(a_i, a_j) over i != j` plus the same for
    b, minus `2 mean k(a_i, b_j)` (Binkowski et al. 2018, section 4; Gretton et al. 2012, Eq. 3).

    Args:
        a, b: (N, d) and (M, d), at least 2 rows each.
        degree: >= 1; 3 is KID's.

    Returns:
        The estimate; unbiased, so it can be below 0 where the two are alike.

    Raises:
        ValueError: for unsuitable features or degree.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    rows_a = check_features(a, name="a", at_least=2)
    rows_b = check_features(b, name="b", at_least=2)
    check_same_width(rows_a, rows_b, names=("a", "b"))

    def kernel_sum(left: Array, right: Array) -> float:
        width = left.shape[1]
        return float(
            sum(((left[part] @ right.T / width + 1.0) ** degree).sum() for part in parts(left))
        )

    def mean_off_diagonal(rows: Array) -> float:
        diagonal = float((((rows**2).sum(axis=1) / rows.shape[1] + 1.0) ** degree).sum())
        return (kernel_sum(rows, rows) - diagonal) / (len(rows) * (len(rows) - 1))

    cross = kernel_sum(rows_a, rows_b) / (len(rows_a) * len(rows_b))
    return mean_off_diagonal(rows_a) + mean_off_diagonal(rows_b) - 2.0 * cross
