"""Fidelity and diversity, by balls that reach to the k-th nearest neighbour.

A set's manifold is the union of balls around its points, each of which reaches to the point's k-th
nearest other point of the set. Distances come from one matrix product, `||x||^2 - 2 x.y + ||y||^2`
in float64 of rows centred on the reference's mean; two that agree to its rounding count as equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpdm.evaluation.metrics.arrays import Array, check_features, check_same_width, parts

__all__ = [
    "DensityCoverage",
    "ManifoldScores",
    "PrecisionRecall",
    "density_coverage",
    "expected_coverage",
    "manifold_scores",
    "precision_recall",
]

# Of the largest squared norm: above the rounding of a product of a few thousand float64 values.
_ROUNDING: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares in [0, 1]: of generated examples that look real, of real ones that are covered."""

    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class DensityCoverage:
    """`density` >= 0, around 1 for two sets of one distribution; `coverage` is a share in [0, 1].

    Of two sets of one distribution the coverage is `expected_coverage` on average, not 1.
    """

    density: float
    coverage: float


@dataclass(frozen=True, kw_only=True)
class ManifoldScores:
    """`PrecisionRecall` and `DensityCoverage` of the same two sets."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    reference_features: ArrayLike, generated_features: ArrayLike, *, k: int
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1 and 2).

    Precision: share of generated points inside the reference manifold; recall: share of reference
    points inside the generated manifold.

    Args:
        reference_features, generated_features: (N, d) and (M, d).
        k: in [1, min(N, M) - 1]; the paper takes 3.

    Raises:
        ValueError: for unsuitable features or k.
    """
    reference, generated = _centred(reference_features, generated_features)
    _check_k(k, highest=min(len(reference), len(generated)) - 1, name="k")
    return PrecisionRecall(
        precision=_share_inside(generated, reference, k=k),
        recall=_share_inside(reference, generated, k=k),
    )


def density_coverage(
    reference_features: ArrayLike, generated_features: ArrayLike, *, k: int
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, Eq. 3 and 4).

    Density: reference balls that a generated point is in, on average, over k. Unlike precision it
    is not fooled by one real outlier with a large ball. Coverage: share of reference balls with a
    generated point inside. Unlike recall it needs no manifold of the generated points.

    Args:
        reference_features, generated_features: (N, d) and (M, d); M >= 1.
        k: in [1, N - 1]; the paper takes 5.

    Raises:
        ValueError: for unsuitable features or k.
    """
    reference, generated = _centred(reference_features, generated_features)
    _check_k(k, highest=len(reference) - 1, name="k")
    inside, covered = _inside_balls(generated, reference, k=k)
    return DensityCoverage(
        density=float(inside.sum() / (k * len(generated))), coverage=float(covered.mean())
    )


def manifold_scores(
    reference_features: ArrayLike, generated_features: ArrayLike, *, k: int = 3, k_density: int = 5
) -> ManifoldScores:
    """`precision_recall` with k and `density_coverage` with k_density; errors as there."""
    first = precision_recall(reference_features, generated_features, k=k)
    second = density_coverage(reference_features, generated_features, k=k_density)
    return ManifoldScores(
        precision=first.precision,
        recall=first.recall,
        density=second.density,
        coverage=second.coverage,
    )


def expected_coverage(num_reference: int, num_generated: int, *, k: int) -> float:
    """Mean coverage of N reference by M generated points of the same continuous distribution.

    `1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k))` (Naeem et al. 2020, section 3.3): that
    a point's k nearest others, of both sets, are all of its own. Any dimension.
    """
    offsets = np.arange(1, k + 1)
    own = (num_reference - offsets) / (num_generated + num_reference - offsets)
    return float(1.0 - own.prod())


def _centred(reference: ArrayLike, generated: ArrayLike) -> tuple[Array, Array]:
    """Both sets as float64 rows, moved by the reference's mean, which keeps all distances."""
    real = check_features(reference, name="reference_features", at_least=2)
    made = check_features(generated, name="generated_features", at_least=1)
    check_same_width(real, made, names=("reference_features", "generated_features"))
    mean = real.mean(axis=0)
    return real - mean, made - mean


def _check_k(k: int, *, highest: int, name: str) -> None:
    if not 1 <= k <= highest:
        raise ValueError(f"{name} must be in [1, {highest}], got {k}")


def _share_inside(points: Array, centres: Array, *, k: int) -> float:
    """Share of `points` within the k-nearest-neighbour balls of `centres`."""
    inside, _ = _inside_balls(points, centres, k=k)
    return float((inside > 0).mean())


def _inside_balls(points: Array, centres: Array, *, k: int) -> tuple[Array, NDArray[np.bool_]]:
    """For each point how many balls it is in; for each ball whether a point is in it."""
    point_norms, centre_norms = (points**2).sum(axis=1), (centres**2).sum(axis=1)
    tolerance = _ROUNDING * max(float(point_norms.max()), float(centre_norms.max()))
    radii = np.empty(len(centres))  # squared
    for part in parts(centres):
        squared = centre_norms[part, None] - 2.0 * (centres[part] @ centres.T) + centre_norms
        # The point itself, at distance 0, is the first of the k + 1 nearest.
        radii[part] = np.partition(squared, k, axis=1)[:, k]
    radii += tolerance
    num_balls, covered = np.empty(len(points)), np.zeros(len(centres), dtype=bool)
    for part in parts(points):
        squared = point_norms[part, None] - 2.0 * (points[part] @ centres.T) + centre_norms
        within = squared <= radii
        num_balls[part] = within.sum(axis=1)
        covered |= within.any(axis=0)
    return num_balls, covered
