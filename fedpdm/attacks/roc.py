"""How well a score separates two sets: AUC, its interval, and the true-positive rate at low FPR.

For scores x of the positives and y of the negatives, high meaning positive,

    AUC      = P[x > y] + P[x = y] / 2                              (Mann and Whitney 1947)
    Var(AUC) = Var_i(V10_i) / n_pos + Var_j(V01_j) / n_neg          (DeLong et al. 1988, Eq. 3)

with V10_i the share of negatives below x_i, and V01_j the share of positives above y_j (ties
count half). The true-positive rate at FPR f is the largest one whose FPR is *at most* f.
Everything sorts once: O(n log n). Scores may be infinite, not NaN.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

__all__ = ["auc", "auc_difference", "auc_interval", "roc_points", "tpr_at_fpr"]

Array = NDArray[np.float64]


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve, in [0, 1]; ties count half.

    Args:
        positive, negative: (n,) scores, at least one each, high meaning positive.

    Raises:
        ValueError: for another shape, an empty set or NaN (here and in the other functions).
    """
    x, y = _check_scores(positive, negative)
    return float(_placements(x, y).mean())


def auc_interval(
    positive: ArrayLike, negative: ArrayLike, *, confidence: float = 0.99
) -> tuple[float, float]:
    """Two-sided confidence interval of the AUC, DeLong's variance on the logit scale.

    The logit keeps it inside [0, 1]. Where that variance is zero or undefined (AUC 0 or 1, all
    scores tied, one score) the interval is Clopper and Pearson's for min(n_pos, n_neg)
    independent pairs, which is wider: the AUC of all pairs varies less than theirs.

    Raises:
        ValueError: if `confidence` is not in (0, 1), and as `auc`.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    x, y = _check_scores(positive, negative)
    above, below = _placements(x, y), 1.0 - _placements(y, x)
    area, tail = float(above.mean()), (1.0 - confidence) / 2.0
    pairs = min(len(x), len(y))
    variance = above.var(ddof=1) / len(x) + below.var(ddof=1) / len(y) if pairs > 1 else 0.0
    if not (variance > 0.0 and 0.0 < area < 1.0):
        return _binomial_interval(area * pairs, pairs, tail=tail)
    middle = float(special.logit(area))
    half = -float(special.ndtri(tail)) * math.sqrt(variance) / (area * (1.0 - area))
    return float(special.expit(middle - half)), float(special.expit(middle + half))


def auc_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(difference, low, high) of AUC(first) - AUC(second): two scores of the same examples.

    Each is (positive (n,), negative (m,)), the same examples in the same order. The interval
    is the normal one with the variance of paired scores (DeLong et al. 1988, Eq. 5).

    Raises:
        ValueError: for numbers of examples that differ or are below 2, and as `auc_interval`.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    pairs = [_check_scores(*each) for each in (first, second)]
    sizes = [(len(x), len(y)) for x, y in pairs]
    if sizes[0] != sizes[1] or min(sizes[0]) < 2:
        raise ValueError(
            f"first and second must score the same examples, at least 2 and 2, got {sizes[0]} "
            f"and {sizes[1]}"
        )
    above = _placements(*pairs[0]) - _placements(*pairs[1])
    below = _placements(*pairs[0][::-1]) - _placements(*pairs[1][::-1])
    difference = float(above.mean())
    variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    half = -float(special.ndtri((1.0 - confidence) / 2.0)) * math.sqrt(variance)
    return difference, max(-1.0, difference - half), min(1.0, difference + half)


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, *, fpr: float = 0.01) -> float:
    """Largest true-positive rate of a threshold whose false-positive rate is at most `fpr`.

    Raises:
        ValueError: if `fpr` is not in [0, 1], and as `auc`.
    """
    if not 0.0 <= fpr <= 1.0:
        raise ValueError(f"fpr must be in [0, 1], got {fpr}")
    x, y = _check_scores(positive, negative)
    allowed = math.floor(fpr * len(y))  # negatives that may be flagged; the product may be rounded
    allowed += (allowed + 1) / len(y) <= fpr
    allowed -= allowed / len(y) > fpr
    if allowed >= len(y):
        return 1.0
    first_refused = np.sort(y)[len(y) - 1 - allowed]
    return float(np.mean(x > first_refused))


def roc_points(positive: ArrayLike, negative: ArrayLike) -> tuple[Array, Array]:
    """(fpr, tpr) of every threshold, from (0, 0) to (1, 1): one point per distinct score."""
    x, y = (np.sort(scores) for scores in _check_scores(positive, negative))
    thresholds = np.unique(np.concatenate([x, y]))[::-1]
    fpr = 1.0 - np.searchsorted(y, thresholds, side="left") / len(y)
    tpr = 1.0 - np.searchsorted(x, thresholds, side="left") / len(x)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def _placements(scores: Array, others: Array) -> Array:
    """For each score, the share of `others` below it, ties counting half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    up_to = np.searchsorted(ordered, scores, side="right")
    return (below + up_to) / (2.0 * len(ordered))


def _binomial_interval(right: float, trials: int, *, tail: float) -> tuple[float, float]:
    """Clopper and Pearson 1934; `right` need not be whole."""
    wrong = trials - right
    low = float(special.betaincinv(right, wrong + 1.0, tail)) if right > 0 else 0.0
    high = float(special.betaincinv(right + 1.0, wrong, 1.0 - tail)) if wrong > 0 else 1.0
    return low, high


def _check_scores(positive: ArrayLike, negative: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    for name, scores in (("positive", x), ("negative", y)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must have shape (n,) with n at least 1, got {scores.shape}")
        if np.isnan(scores).any():
            raise ValueError(f"{name} must not be NaN, got {int(np.isnan(scores).sum())} NaN")
    return x, y
