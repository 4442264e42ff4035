"""Scores of a membership attack: AUC, success rate and true-positive rates, with intervals.

With TPR(u) and FPR(u) the shares of members and non-members that score at least u:

    AUC              P[member > non-member] + P[tied] / 2
    ASR              max_u (TPR(u) + 1 - FPR(u)) / 2: balanced accuracy at the best threshold
    TPR at FPR f     max { TPR(u) : FPR(u) <= f }, so at most f of the non-members are accused
                     (Carlini et al. 2022)

Intervals are percentiles of a bootstrap that resamples members and non-members apart (Efron and
Tibshirani 1993, chapter 13). Three things they do not say. Where the scores separate perfectly
every resample does, and the interval has no width (`roc.auc_interval` has one). The threshold of
the ASR is chosen on the scores it is judged by, so at chance it exceeds 1/2; `asr_at_chance` says
by how much. With fewer than 1 / f non-members, TPR at f allows no false accusation at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Estimate", "MembershipScores", "asr_at_chance", "membership_scores"]

Array = NDArray[np.float64]
Index = NDArray[np.int64]

_CONFIDENCE = 0.95
_CHUNK = 2_000_000  # numbers of a block of resamples


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and the bounds of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class MembershipScores:
    """All rates are in [0, 1]; `dataclasses.asdict` of it is JSON.

    The ASR of an attack that knows nothing exceeds `asr_at_chance` once in 20 times, at these
    numbers of images.
    """

    auc: Estimate
    asr: Estimate
    tpr_at_1pct: Estimate
    tpr_at_01pct: Estimate
    asr_at_chance: float
    num_members: int
    num_non_members: int
    num_bootstrap: int


def membership_scores(
    members: ArrayLike,
    non_members: ArrayLike,
    *,
    rng: np.random.Generator,
    num_bootstrap: int = 1000,
) -> MembershipScores:
    """Rates of an attack that calls the images with the highest scores members.

    Args:
        members, non_members: (N,) and (M,) scores, at least one each, high meaning member;
            infinite is allowed.
        rng: draws the resamples; num_bootstrap: how many, at least 1.

    Raises:
        ValueError: for another shape, an empty set or NaN.
    """
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, got {num_bootstrap}")
    x, y = _check(members, "members"), _check(non_members, "non_members")
    # Thresholds are the distinct scores, highest first; only a score's place among them matters.
    _, places = np.unique(np.concatenate([x, y]), return_inverse=True)
    num_places = int(places.max()) + 1
    places = num_places - 1 - places
    positive, negative = places[: len(x)], places[len(x) :]
    point = _rates(
        np.bincount(positive, minlength=num_places)[None],
        np.bincount(negative, minlength=num_places)[None],
    )[0]
    block, rows = max(1, _CHUNK // max(num_places, len(x), len(y))), []
    for start in range(0, num_bootstrap, block):
        count = min(block, num_bootstrap - start)
        rows.append(
            _rates(
                _resampled(positive, count, num_places, rng),
                _resampled(negative, count, num_places, rng),
            )
        )
    tail = (1.0 - _CONFIDENCE) / 2.0
    low, high = np.quantile(np.concatenate(rows), [tail, 1.0 - tail], axis=0)
    auc, asr, tpr_1, tpr_01 = (
        Estimate(value=float(v), low=float(a), high=float(b))
        for v, a, b in zip(point, low, high, strict=True)
    )
    return MembershipScores(
        auc=auc,
        asr=asr,
        tpr_at_1pct=tpr_1,
        tpr_at_01pct=tpr_01,
        asr_at_chance=asr_at_chance(len(x), len(y)),
        num_members=len(x),
        num_non_members=len(y),
        num_bootstrap=num_bootstrap,
    )


def asr_at_chance(num_members: int, num_non_members: int) -> float:
    """95% quantile of the ASR where members and non-members score alike.

    2 ASR - 1 is Smirnov's one-sided statistic D+; P[D+ > d] -> exp(-2 d^2 n m / (n + m)) for
    large n and m (Smirnov 1939).
    """
    n, m = num_members, num_non_members
    if n < 1 or m < 1:
        raise ValueError(f"the numbers of images must be at least 1, got {n} and {m}")
    distance = math.sqrt(-math.log(1.0 - _CONFIDENCE) * (n + m) / (2.0 * n * m))
    return 0.5 + 0.5 * min(1.0, distance)


def _resampled(places: Index, count: int, num_places: int, rng: np.random.Generator) -> Index:
    """`count` resamples with replacement, as counts per place: (count, num_places)."""
    drawn = places[rng.integers(len(places), size=(count, len(places)))]
    drawn += num_places * np.arange(count)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=count * num_places).reshape(count, num_places)


def _rates(positive: Index, negative: Index) -> Array:
    """(AUC, ASR, TPR at 1%, TPR at 0.1%) per row of counts (R, places): (R, 4)."""
    hits, misses = positive.cumsum(axis=1), negative.cumsum(axis=1)
    num_members, num_non_members = hits[:, -1:], misses[:, -1:]
    # A member wins against the non-members in later places and half of those in its own.
    wins = (positive * (num_non_members - misses + 0.5 * negative)).sum(axis=1)
    tpr, fpr = hits / num_members, misses / num_non_members
    return np.stack(
        [
            wins / (num_members * num_non_members)[:, 0],
            0.5 + 0.5 * (tpr - fpr).max(axis=1),  # never below 1/2: FPR = TPR = 1 at the end
            np.where(fpr <= 0.01, tpr, 0.0).max(axis=1),
            np.where(fpr <= 0.001, tpr, 0.0).max(axis=1),
        ],
        axis=1,
    )


def _check(scores: ArrayLike, name: str) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must have shape (n,) with n at least 1, got {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"{name} must not be NaN, got {int(np.isnan(values).sum())} NaN")
    return values
