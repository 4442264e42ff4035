"""Upload linkage: the server's best guess which of two known images an upload was made from.

With D_i the distance of the clipped images of pair i, the likelihood ratio (`likelihood`) scores

    upload of a_i:  N(+D_i^2 / (2 sigma^2), D_i^2 / sigma^2),
    upload of b_i:  N(-D_i^2 / (2 sigma^2), D_i^2 / sigma^2),

so over all uploads of a's and b's (Neyman and Pearson 1933; docs/attacks.md)

    AUC    = mean over i, j of Phi(sqrt(D_i^2 + D_j^2) / (2 sigma)),
    FPR(u) = mean_j Phi(-u sigma / D_j - D_j / (2 sigma)),
    TPR(u) = mean_i Phi(-u sigma / D_i + D_i / (2 sigma))

at threshold u; for one D, AUC = Phi(D / (sqrt(2) sigma)) and TPR = Phi(Phi^-1(FPR) + D / sigma).
The attack runs on the real release, so agreement of the two tests the whole release path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from fedpdm.attacks.likelihood import (
    Array,
    check_release,
    chunks,
    clipped_means,
    log_likelihood_ratios,
)
from fedpdm.attacks.roc import auc, auc_interval, tpr_at_fpr
from fedpdm.data import ImageSet
from fedpdm.privacy.types import ReleasedDataset, ReleaseParameters

__all__ = [
    "LinkageResult",
    "LinkageSummary",
    "linkage_attack",
    "linkage_auc",
    "linkage_roc",
    "linkage_tpr",
    "worst_case_linkage",
]

_MOST_DISTANCES = 2048
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class LinkageSummary:
    """The attack in numbers; `dataclasses.asdict` of it is JSON.

    `auc` is measured, in [`auc_low`, `auc_high`] at `confidence`; `auc_analytic` follows from the
    distances, `agrees` says that it lies in the interval. `tpr` and `tpr_analytic` are at a FPR of
    at most `fpr`. `worst_auc` and `worst_tpr` are those of two images at distance 2 C. `sigma`
    and `distance_quantiles` (minimum, 5%, 25%, 50%, 75%, 95%, maximum, at most 2 C) are in units
    of the shifted clean image.
    """

    num_pairs: int
    clip_norm: float
    sigma: float
    auc: float
    auc_low: float
    auc_high: float
    confidence: float
    auc_analytic: float
    agrees: bool
    fpr: float
    tpr: float
    tpr_analytic: float
    worst_auc: float
    worst_tpr: float
    distance_quantiles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkageResult:
    """`summary`, and what it was computed from, float64 (num_pairs,) each.

    `positive` are the scores of uploads of the first image of a pair, `negative` of the second;
    `distances` those of the clipped images, `parameters` those of the release.
    """

    summary: LinkageSummary
    positive: Array
    negative: Array
    distances: Array
    parameters: ReleaseParameters


def linkage_attack(
    images: ImageSet,
    obtain: Callable[[ImageSet], ReleasedDataset],
    *,
    rng: np.random.Generator,
    num_pairs: int | None = None,
    fpr: float = 0.01,
    confidence: float = 0.99,
) -> LinkageResult:
    """Attack the release of `2 num_pairs` distinct images, drawn at random and paired.

    Args:
        images: what to draw from; equal images count once.
        obtain: the release path: distinct images to their release, rows in the same order.
        rng: chooses images and pairs.
        num_pairs: as many as there are if None.
        fpr, confidence: of the true-positive rate, and of the interval of the AUC.

    Raises:
        ValueError: fewer than two distinct images, `num_pairs` outside what they allow, or a
            release that does not fit the images.
    """
    distinct = images.distinct()
    most = len(distinct) // 2
    if most < 1:
        raise ValueError(f"images must hold at least 2 distinct ones, got {len(distinct)}")
    count = most if num_pairs is None else num_pairs
    if not 1 <= count <= most:
        raise ValueError(f"num_pairs must be in [1, {most}], got {count}")
    chosen = images.subset(rng.permutation(distinct)[: 2 * count])
    released = obtain(chosen)
    check_release(released, chosen.images.shape, name="obtain")
    positive, negative, distances = _scores(chosen, released)
    clip_norm, sigma = released.parameters.clip_norm, released.parameters.sigma
    low, high = auc_interval(positive, negative, confidence=confidence)
    analytic = linkage_auc(distances, sigma=sigma)
    worst_auc, worst_tpr = worst_case_linkage(clip_norm=clip_norm, sigma=sigma, fpr=fpr)
    summary = LinkageSummary(
        num_pairs=count,
        clip_norm=clip_norm,
        sigma=sigma,
        auc=auc(positive, negative),
        auc_low=low,
        auc_high=high,
        confidence=confidence,
        auc_analytic=analytic,
        agrees=low <= analytic <= high,
        fpr=fpr,
        tpr=tpr_at_fpr(positive, negative, fpr=fpr),
        tpr_analytic=linkage_tpr(distances, sigma=sigma, fpr=fpr),
        worst_auc=worst_auc,
        worst_tpr=worst_tpr,
        distance_quantiles=tuple(float(q) for q in np.quantile(distances, _QUANTILES)),
    )
    return LinkageResult(
        summary=summary,
        positive=positive,
        negative=negative,
        distances=distances,
        parameters=released.parameters,
    )


def _scores(chosen: ImageSet, released: ReleasedDataset) -> tuple[Array, Array, Array]:
    """(positive, negative, distances) of images 2 i and 2 i + 1."""
    count, size = len(chosen) // 2, math.prod(chosen.images.shape[1:])
    positive, negative, distances = np.empty((3, count))
    for part in chunks(count, size):
        first, second = (
            slice(2 * part.start + odd, 2 * min(part.stop, count), 2) for odd in (0, 1)
        )
        a, b = (clipped_means(chosen.images[s], released.parameters) for s in (first, second))
        for scores, rows in ((positive, first), (negative, second)):
            scores[part] = log_likelihood_ratios(released.x_tilde[rows], a, b, released.parameters)
        distances[part] = np.linalg.norm(a - b, axis=1)
    return positive, negative, distances


def worst_case_linkage(*, clip_norm: float, sigma: float, fpr: float = 0.01) -> tuple[float, float]:
    """(AUC, TPR at `fpr`) for two images at the largest distance, 2 C."""
    ratio = 2.0 * clip_norm / sigma
    tpr = float(special.ndtr(special.ndtri(fpr) + ratio))
    return float(special.ndtr(ratio / math.sqrt(2.0))), tpr


def linkage_auc(distances: ArrayLike, *, sigma: float) -> float:
    """The pooled AUC of pairs at `distances`; beyond 2048 of them, that of as many group means."""
    square = _ratios(distances, sigma) ** 2
    if len(square) > _MOST_DISTANCES:
        groups = np.array_split(np.sort(square), _MOST_DISTANCES)
        square, sizes = (np.array([f(group) for group in groups]) for f in (np.mean, len))
    else:
        sizes = np.ones(len(square))
    weights = sizes / sizes.sum()
    total = 0.0
    for part in chunks(len(square), len(square)):
        area = special.ndtr(np.sqrt(square[part, None] + square[None, :]) / 2.0)
        total += float(weights[part] @ area @ weights)
    return total


def linkage_tpr(distances: ArrayLike, *, sigma: float, fpr: float = 0.01) -> float:
    """The pooled true-positive rate of pairs at `distances` at false-positive rate `fpr`."""
    if not 0.0 < fpr < 1.0:
        raise ValueError(f"fpr must be in (0, 1), got {fpr}")
    ratios = np.maximum(_ratios(distances, sigma), 1e-9)  # equal images score 0: a steep step
    unit = _bound(ratios)
    share = optimize.brentq(
        lambda u: float(special.ndtr(-u * unit / ratios - ratios / 2.0).mean()) - fpr,
        -1.0,
        1.0,
        xtol=1e-15,
    )
    threshold = share * unit
    return float(special.ndtr(-threshold / ratios + ratios / 2.0).mean())


def linkage_roc(
    distances: ArrayLike, *, sigma: float, num_points: int = 513
) -> tuple[Array, Array]:
    """(fpr, tpr) of the pooled curve from (0, 0) to (1, 1), at evenly spaced scores."""
    ratios = np.maximum(_ratios(distances, sigma), 1e-9)
    thresholds = np.linspace(_bound(ratios), -_bound(ratios), num_points)
    fpr, tpr = (
        np.array([special.ndtr(-u / ratios + sign * ratios / 2.0).mean() for u in thresholds])
        for sign in (-1.0, 1.0)
    )
    return fpr, tpr


def _bound(ratios: Array) -> float:
    """A score that hardly any upload exceeds, in magnitude."""
    largest = float(ratios.max())
    return largest * (largest / 2.0 + 9.0)


def _ratios(distances: ArrayLike, sigma: float) -> Array:
    values = np.asarray(distances, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"distances must be (n,) finite and at least 0, got shape {values.shape}")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    return values / sigma
