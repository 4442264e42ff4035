"""AUC, its interval and TPR at low FPR against brute force and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import special

from fedpdm.attacks.roc import auc, auc_interval, roc_points, tpr_at_fpr
from tests.support.cases import every


def brute_auc(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y]))


def brute_tpr(x: np.ndarray, y: np.ndarray, fpr: float) -> float:
    thresholds = [-math.inf, *x, *y, math.inf]
    allowed = [t for t in thresholds if np.mean(y >= t) <= fpr]
    return max(float(np.mean(x >= t)) for t in allowed)


@every("levels", [2, 5, 1000])
@every("seed", range(5))
def test_against_brute_force_with_ties(levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, size=rng.integers(1, 40)) + levels // 3
    y = rng.integers(0, levels, size=rng.integers(1, 40))
    assert auc(x, y) == pytest.approx(brute_auc(x, y), abs=1e-12)
    assert auc(y, x) == pytest.approx(1.0 - auc(x, y), abs=1e-12)
    for fpr in (0.0, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1.0):
        assert tpr_at_fpr(x, y, fpr=fpr) == pytest.approx(brute_tpr(x, y, fpr), abs=1e-12)
    false, true = roc_points(x, y)
    assert (false[0], true[0], false[-1], true[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert np.trapezoid(true, false) == pytest.approx(auc(x, y), abs=1e-12)
    assert len(false) == 1 + len(np.unique(np.concatenate([x, y])))


@pytest.mark.parametrize("count", [10, 29, 100, 1000])
def test_fpr_is_at_most_what_was_asked(count: int) -> None:
    """Every k of n is reached although k / n times n is often rounded."""
    y = np.arange(count, dtype=np.float64)
    x = y + 0.5  # above k negatives are just k positives and one half step more
    for k in range(count + 1):
        expected = min(1.0, (k + 1) / count)
        assert tpr_at_fpr(x, y, fpr=k / count) == pytest.approx(expected, abs=1e-12), k


def test_tied_negatives_are_flagged_all_or_none() -> None:
    y = np.array([0.0] * 98 + [1.0, 1.0])
    assert tpr_at_fpr(np.array([1.0, 2.0]), y, fpr=0.01) == 0.5  # flagging 1 would flag 2%
    assert tpr_at_fpr(np.array([1.0, 2.0]), y, fpr=0.02) == 1.0
    assert tpr_at_fpr(np.array([0.0, 0.0]), np.array([0.0, 0.0]), fpr=0.5) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "sizes"), [(0.0, (60, 40)), (1.8, (80, 80)), (3.0, (200, 100))])
def test_interval_covers(shift: float, sizes: tuple[int, int]) -> None:
    rng, games, confidence = np.random.default_rng(1), 1500, 0.95
    true, covered = float(special.ndtr(shift / math.sqrt(2.0))), 0
    for _ in range(games):
        x, y = rng.standard_normal(sizes[0]) + shift, rng.standard_normal(sizes[1])
        low, high = auc_interval(x, y, confidence=confidence)
        assert 0.0 <= low < high <= 1.0
        covered += low <= true <= high
    assert covered / games == pytest.approx(confidence, abs=0.025)


def test_interval_width_is_that_of_the_sampling_error() -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.standard_normal(400) + 1.0, rng.standard_normal(300)) for _ in range(600)]
    spread = np.std([auc(x, y) for x, y in pairs])
    widths = [np.subtract(*auc_interval(x, y, confidence=0.95)[::-1]) for x, y in pairs]
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([2.0] * 20, [1.0] * 20),
        ([1.0] * 20, [2.0] * 20),
        ([1.0] * 20, [1.0] * 20),
        ([1.0], [0.0]),
        ([1.0], [0.0, 2.0, 3.0]),
        ([math.inf, 1.0], [-math.inf, 1.0]),
    ],
)
def test_interval_where_there_is_no_variance(x: list[float], y: list[float]) -> None:
    low, high = auc_interval(x, y, confidence=0.99)
    assert 0.0 <= low <= auc(x, y) <= high <= 1.0
    assert high - low > 0.1


def test_perfect_separation_narrows_with_the_number_of_scores() -> None:
    low = [auc_interval(np.arange(n) + n, np.arange(n), confidence=0.99)[0] for n in (5, 50, 500)]
    assert low == sorted(low)
    assert low[-1] == pytest.approx(0.005 ** (1 / 500))  # Clopper and Pearson, n of n


def test_large_sets() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal(300_000) + 1, rng.standard_normal(300_000)
    assert auc(x, y) == pytest.approx(special.ndtr(math.sqrt(0.5)), abs=2e-3)
    expected = special.ndtr(special.ndtri(0.01) + 1.0)
    assert tpr_at_fpr(x, y, fpr=0.01) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([], [1.0]), r"positive must have shape \(n,\) with n at least 1, got \(0,\)"),
        (lambda: auc([1.0], [[1.0]]), r"negative must have shape .* got \(1, 1\)"),
        (lambda: auc([math.nan], [1.0]), "positive must not be NaN, got 1 NaN"),
        (lambda: tpr_at_fpr([1.0], [1.0], fpr=1.5), r"fpr must be in \[0, 1\], got 1.5"),
        (lambda: tpr_at_fpr([1.0], [1.0], fpr=math.nan), "fpr must be in"),
        (lambda: auc_interval([1.0], [1.0], confidence=1.0), r"confidence must be in \(0, 1\)"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
