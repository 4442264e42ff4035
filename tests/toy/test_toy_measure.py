"""The toy's estimators against brute force, order statistics and repeated draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from fedpdm.evaluation.metrics import assignment_distance, frechet_distance, gaussian_statistics
from fedpdm.toy import Estimate, ratio_of_means, sampling_floor
from fedpdm.toy.measure import fit_slope

RNG = np.random.default_rng(0)


def test_assignment_is_the_best_of_all_permutations() -> None:
    a, b = RNG.normal(size=(2, 6, 3))
    best = min(
        float(((a - b[list(order)]) ** 2).sum(axis=1).mean())
        for order in itertools.permutations(range(6))
    )
    assert assignment_distance(a, b) == pytest.approx(best)


def test_assignment_in_one_dimension_sorts() -> None:
    a, b = RNG.normal(size=(2, 200, 1))
    expected = float(((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2).mean())
    assert assignment_distance(a, b) == pytest.approx(expected)
    assert assignment_distance(a, a[::-1]) == 0.0
    assert assignment_distance(a, a + 2.0) == pytest.approx(4.0)


@pytest.mark.slow
def test_assignment_agrees_with_the_gaussian_formula() -> None:
    """Shift (2, 0) and other spreads: two routes to one distance."""
    x, y = RNG.normal(size=(2, 1500, 2))
    y = y * [2.0, 0.5] + [2.0, 0.0]
    exact = frechet_distance([0, 0], np.eye(2), [2, 0], np.diag([4.0, 0.25]))
    assert exact == pytest.approx(4 + 1 + 0.25)
    assert assignment_distance(x, y) == pytest.approx(exact, rel=0.1)


def test_assignment_needs_equal_sets() -> None:
    with pytest.raises(ValueError, match="equally many rows, got 3, 2"):
        assignment_distance(np.zeros((3, 1)), np.zeros((2, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("variances", [[1.0], [1.0, 1.0, 1.0], [8.0, 1.0, 0.1]])
def test_sampling_floor_is_what_exact_samples_show(variances: list[float]) -> None:
    v, num = np.array(variances), 400
    found = []
    for _ in range(1500):
        sample = gaussian_statistics(RNG.normal(size=(num, len(v))) * np.sqrt(v))
        found.append(frechet_distance(sample.mean, sample.cov, np.zeros(len(v)), np.diag(v)))
    interval = Estimate.of(np.array(found))
    slack = 0.02 * interval.mean  # second order in 1 / S
    assert interval.low - slack <= sampling_floor(v, num) <= interval.high + slack


def test_interval_is_students() -> None:
    values = RNG.normal(size=9)
    low, high = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    estimate = Estimate.of(values)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.contains(values.mean())
    assert not estimate.contains(high + 0.01)
    assert Estimate.of(np.array([2.0])).high == np.inf


def test_ratio_interval_covers_the_ratio() -> None:
    covered = 0
    for _ in range(400):
        b = RNG.chisquare(3, size=80)
        a = 0.3 * b + 0.1 * RNG.normal(size=80)
        covered += ratio_of_means(a, b).contains(0.3)
    assert 360 <= covered <= 396  # 95% of 400 is 380, +- 4.5 standard deviations


def test_slope_is_the_weighted_regression() -> None:
    x, y, half = [0.1, 0.2, 0.5], [1.0, 1.3, 2.0], [0.1, 0.2, 0.05]
    coefficients, covariance = np.polyfit(x, y, 1, w=1 / np.array(half), cov="unscaled")
    slope = fit_slope(x, y, half)
    assert slope.value == pytest.approx(coefficients[0])
    assert slope.high - slope.value == pytest.approx(np.sqrt(covariance[0, 0]))
    with pytest.raises(ValueError, match="at least two different x"):
        fit_slope([1.0, 1.0], [1.0, 2.0], [1.0, 1.0])
