"""One-run lower bounds against enumeration, linear programs and simulated games."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import optimize, special, stats

from fedpdm.attacks import bounds
from fedpdm.attacks.bounds import (
    best_num_guesses,
    epsilon_of_mu,
    gaussian_mu_bound,
    independent_mu_bound,
    independent_p_value,
    mu_of_epsilon,
    steinke_epsilon_bound,
)
from tests.support.cases import every

DELTA = 1e-5
gaussian = functools.cache(gaussian_mu_bound)


def expected_right(mu: float, num_canaries: int, share: float) -> tuple[int, int]:
    """(guesses, right) in expectation, for the surest `share` of independent canaries."""
    threshold = optimize.brentq(
        lambda t: special.ndtr(mu / 2 - t) + special.ndtr(-mu / 2 - t) - share, 0.0, 50.0
    )
    guesses = round(share * num_canaries)
    return guesses, math.floor(guesses * special.ndtr(mu / 2 - threshold) / share)


def play(mu: float, num_canaries: int, num_guesses: int, rng: np.random.Generator) -> int:
    """Right guesses among the surest `num_guesses` of a Gaussian release."""
    secret = rng.integers(0, 2, size=num_canaries) * 2 - 1
    scores = secret * mu / 2 + rng.standard_normal(num_canaries)
    surest = np.argsort(-np.abs(scores))[:num_guesses]
    return int(np.sum(np.sign(scores[surest]) == secret[surest]))


# Steinke, Nasr and Jagielski.


def enumerated_p_value(epsilon: float, m: int, r: int, v: int, delta: float) -> float:
    """The formula word by word, over all 2^r outcomes."""
    q = 1.0 / (1.0 + math.exp(-epsilon))
    chance = [0.0] * (r + 1)
    for outcome in itertools.product((0, 1), repeat=r):
        chance[sum(outcome)] += q ** sum(outcome) * (1 - q) ** (r - sum(outcome))
    beta = sum(chance[v:])
    alpha = max((sum(chance[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, beta + 2 * m * alpha * delta)


@every("delta", [0.0, 1e-5, 1e-3])
@every("m, r, v", [(9, 9, 9), (12, 9, 8), (50, 10, 10), (5, 5, 3)])
def test_steinke_by_enumeration(m: int, r: int, v: int, delta: float) -> None:
    found = steinke_epsilon_bound(num_canaries=m, num_guesses=r, num_right=v, delta=delta)
    grid = np.arange(0.0, 5.0, 1e-3)
    p = np.array([enumerated_p_value(epsilon, m, r, v, delta) for epsilon in grid[::50]])
    assert (np.diff(p) >= -1e-12).all()  # so that a bisection finds all that is refuted
    if enumerated_p_value(0.0, m, r, v, delta) >= 0.05:
        assert found == 0.0
        return
    assert enumerated_p_value(found, m, r, v, delta) < 0.05
    assert enumerated_p_value(found + 2e-6, m, r, v, delta) >= 0.05


def test_steinke_closed_form_when_all_are_right() -> None:
    """Without delta and with v = r: q^r = 0.05."""
    found = steinke_epsilon_bound(num_canaries=500, num_guesses=100, num_right=100, delta=0.0)
    assert found == pytest.approx(special.logit(0.05 ** (1 / 100)), abs=1e-5)


@pytest.mark.parametrize("m", [100, 2000])
def test_steinke_is_valid_for_randomised_response(m: int) -> None:
    """The exact chance that the bound exceeds the truth is at most 5%."""
    for epsilon in (0.5, 2.0, 4.0):
        rights = np.arange(m + 1)
        low, high = 0, m + 1  # the first number of right guesses that refutes the truth
        while low < high:
            middle = (low + high) // 2
            bound = (
                steinke_epsilon_bound(
                    num_canaries=m, num_guesses=m, num_right=int(middle), delta=0.0
                )
                if middle <= m
                else math.inf
            )
            low, high = (low, middle) if bound > epsilon else (middle + 1, high)
        chance = stats.binom.sf(rights[-1] if low > m else low - 1, m, special.expit(epsilon))
        assert 0.01 < chance <= 0.05 or low > m


# Gaussian differential privacy.


def naive_refuted(mu: float, m: int, guesses: int, right: int, tau: float) -> bool:
    """The recursion in r and h as published, with their differences."""
    r, h = tau * right / m, tau * (guesses - right) / m
    for i in range(right - 1, -1, -1):
        h_next = max(h, float(special.ndtr(special.ndtri(min(r, 1.0)) - mu)))
        r, h = r + i / (guesses - i) * (h_next - h), h_next
    return r + h >= guesses / m


def largest_chance(mu: float, m: int, guesses: int, right: int) -> float:
    """max P[N >= right] over all distributions of N that f-DP allows, as a linear program.

    r_(i+1) <= fbar(h_i) is replaced by many tangents of fbar, which allows slightly more.
    """
    grid = np.linspace(-7.0, 7.0, 1200)
    at = special.ndtr(grid)
    tangents = [(math.exp(-mu * mu / 2.0 - mu * z), float(special.ndtr(z + mu))) for z in grid]
    j = np.arange(guesses + 1)
    rows, limits = [], []
    for i in range(guesses):
        r = np.where(j >= i + 1, j / m, 0.0)
        h = np.where(j >= i, (guesses - j) / m, 0.0)
        for x, (slope, value) in zip(at, tangents, strict=True):
            rows.append(r - slope * h)
            limits.append(value - slope * x)
    answer = optimize.linprog(
        -(j >= right).astype(float),
        A_ub=np.array(rows),
        b_ub=limits,
        A_eq=np.ones((1, len(j))),
        b_eq=[1.0],
        bounds=(0.0, 1.0),
        method="highs",
    )
    assert answer.success
    return -float(answer.fun)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mu", "m", "guesses", "right"),
    [
        (1.0, 6, 6, 6),
        (0.5, 6, 6, 5),
        (2.0, 8, 8, 7),
        (1.0, 10, 5, 5),
        (0.0, 7, 7, 6),
        (1.5, 9, 6, 4),
    ],
)
def test_gaussian_recursion_is_the_optimum_of_a_linear_program(
    mu: float, m: int, guesses: int, right: int
) -> None:
    def refuted(tau: float) -> bool:
        return bool(bounds._refuted(np.array([mu]), m, guesses, right, tau)[0])

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (low, middle) if refuted(middle) else (middle, high)
    assert high == pytest.approx(largest_chance(mu, m, guesses, right), abs=2e-4)


@pytest.mark.parametrize("m", [1, 7, 40, 300])
def test_gaussian_recursion_is_the_published_one(m: int) -> None:
    rng = np.random.default_rng(m)
    for _ in range(25):
        guesses = int(rng.integers(1, m + 1))
        right = int(rng.integers(0, guesses + 1))
        mu = gaussian(num_canaries=m, num_guesses=guesses, num_right=right)
        assert not naive_refuted(mu + 3e-5, m, guesses, right, 0.05)
        assert mu == 0.0 or naive_refuted(mu - 3e-5, m, guesses, right, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("m", "share"), [(30, 1.0), (30, 0.3), (300, 1.0), (300, 0.1)])
def test_lower_bounds_are_below_the_truth(mu: float, m: int, share: float) -> None:
    rng, games = np.random.default_rng(round(mu * 10) + m), 400
    guesses, epsilon = max(1, round(share * m)), epsilon_of_mu(mu, delta=DELTA)
    above = {"gaussian": 0, "steinke": 0, "independent": 0}
    for _ in range(games):
        v = play(mu, m, guesses, rng)
        above["gaussian"] += gaussian(num_canaries=m, num_guesses=guesses, num_right=v) > mu
        above["steinke"] += steinke(m, guesses, v) > epsilon
        if guesses == m:
            above["independent"] += independent_mu_bound(num_guesses=m, num_right=v) > mu
    allowed = stats.binom.ppf(1 - 1e-6, games, 0.05)
    assert max(above.values()) <= allowed, above


@functools.cache
def steinke(m: int, guesses: int, right: int) -> float:
    return steinke_epsilon_bound(num_canaries=m, num_guesses=guesses, num_right=right, delta=DELTA)


def test_a_mechanism_with_common_luck_is_not_accused() -> None:
    """With probability 1/20 every secret is shown with accuracy 0.84, otherwise none at all.

    That is Gaussian DP at mu = 0.68 (its trade-off curve is checked here), and in 1 of 20 runs
    84% of all guesses are right. So no valid bound may say more than 0.68 then: it is the bound
    for independent noise that needs the assumption.
    """
    mu, luck, accuracy, m = 0.684, 0.05, 0.84, 2000
    for epsilon in np.linspace(0.0, 3.0, 301):
        shown = luck * max(0.0, accuracy - math.exp(epsilon) * (1 - accuracy))
        allowed = special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * special.ndtr(
            -mu / 2 - epsilon / mu
        )
        assert shown <= allowed + 1e-12
    right = round(accuracy * m)
    assert 0.6 < gaussian(num_canaries=m, num_guesses=m, num_right=right) <= mu
    assert independent_mu_bound(num_guesses=m, num_right=right) > 1.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "steinke_share", "gaussian_share"), [(2000, 0.3, 0.6), (10_000, 0.4, 0.68)]
)
def test_tightness_at_mu_2(m: int, steinke_share: float, gaussian_share: float) -> None:
    mu = 2.0
    guesses = best_num_guesses(mu, num_canaries=m, delta=DELTA)
    guesses, right = expected_right(mu, m, guesses / m)
    assert steinke(m, guesses, right) > steinke_share * epsilon_of_mu(mu, delta=DELTA)
    assert gaussian(num_canaries=m, num_guesses=guesses, num_right=right) > gaussian_share * mu
    _, all_right = expected_right(mu, m, 1.0 - 1e-12)
    assert independent_mu_bound(num_guesses=m, num_right=all_right) > 0.94 * mu


@pytest.mark.slow
@pytest.mark.parametrize("m", [200, 2000])
def test_best_number_of_guesses_is_near_the_best(m: int) -> None:
    def reached(guesses: int) -> tuple[float, float]:
        guesses, right = expected_right(2.0, m, guesses / m - 1e-12)
        return (
            steinke(m, guesses, right),
            gaussian(num_canaries=m, num_guesses=guesses, num_right=right),
        )

    chosen = reached(best_num_guesses(2.0, num_canaries=m, delta=DELTA))
    best = np.max([reached(max(1, round(m * share))) for share in np.geomspace(0.01, 1.0, 25)], 0)
    assert chosen[0] > 0.9 * best[0]
    assert chosen[1] > 0.9 * best[1]
    assert best_num_guesses(0.0, num_canaries=m, delta=DELTA) == m


def test_more_right_guesses_and_less_confidence_prove_more() -> None:
    m, guesses = 200, 100
    rows = [
        (
            gaussian(num_canaries=m, num_guesses=guesses, num_right=v),
            steinke(m, guesses, v),
            independent_mu_bound(num_guesses=guesses, num_right=v),
        )
        for v in range(0, guesses + 1, 5)
    ]
    assert (np.diff(rows, axis=0) >= 0).all()
    assert rows[10] == (0.0, 0.0, 0.0)  # half of them right
    assert min(rows[-1]) > 1.0
    for bound in (gaussian_mu_bound, functools.partial(steinke_epsilon_bound, delta=DELTA)):
        at = [
            bound(num_canaries=m, num_guesses=guesses, num_right=95, confidence=c)
            for c in (0.5, 0.95, 0.999)
        ]
        assert at == sorted(at, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [1, 50, 10_000])
def test_all_right_and_all_wrong(guesses: int) -> None:
    m = 10_000
    for right in (0, guesses):
        found = (
            gaussian(num_canaries=m, num_guesses=guesses, num_right=right),
            steinke(m, guesses, right),
            independent_mu_bound(num_guesses=guesses, num_right=right),
        )
        assert np.isfinite(found).all()
        assert (max(found) == 0.0) == (right == 0 or guesses == 1)


@pytest.mark.slow
def test_ten_thousand_guesses_take_seconds() -> None:
    start = time.process_time()
    gaussian_mu_bound(num_canaries=10_000, num_guesses=10_000, num_right=8_413)
    assert time.process_time() - start < 5.0


def test_independent_bound_is_exact() -> None:
    m, mu = 500, 1.3
    refuting = next(
        v for v in range(m + 1) if independent_mu_bound(num_guesses=m, num_right=v) > mu
    )
    p = independent_p_value(mu, num_guesses=m, num_right=refuting)
    assert p == pytest.approx(stats.binom.sf(refuting - 1, m, stats.norm.cdf(mu / 2)))
    assert p <= 0.05 < independent_p_value(mu, num_guesses=m, num_right=refuting - 1)


def test_mu_and_epsilon() -> None:
    assert epsilon_of_mu(2.0, delta=DELTA) == pytest.approx(9.9967, abs=1e-3)
    assert mu_of_epsilon(10.0, delta=DELTA) == pytest.approx(2.0005, abs=1e-3)
    assert epsilon_of_mu(0.0, delta=DELTA) == 0.0
    assert mu_of_epsilon(epsilon_of_mu(0.7, delta=DELTA), delta=DELTA) == pytest.approx(0.7)


COUNTS = {"num_canaries": 10, "num_guesses": 5, "num_right": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_mu_bound(**{**COUNTS, "num_canaries": 0}), "num_canaries must be at le"),
        (lambda: gaussian_mu_bound(**{**COUNTS, "num_guesses": 11}), r"in \[1, 10\], got 11"),
        (lambda: gaussian_mu_bound(**{**COUNTS, "num_right": 6}), r"in \[0, 5\], got 6"),
        (lambda: gaussian_mu_bound(**COUNTS, confidence=0.0), r"confidence .*\(0, 1\), got 0"),
        (lambda: steinke_epsilon_bound(**COUNTS, delta=1.0), r"delta must be in \[0, 1\), got 1"),
        (lambda: steinke_epsilon_bound(**{**COUNTS, "num_right": -1}, delta=0.1), "got -1"),
        (lambda: independent_mu_bound(num_guesses=0, num_right=0), "num_canaries must be"),
        (lambda: epsilon_of_mu(-1.0, delta=DELTA), "mu must be at least 0 and finite, got -1"),
        (lambda: best_num_guesses(math.nan, num_canaries=5, delta=DELTA), "mu must be"),
        (lambda: mu_of_epsilon(math.inf, delta=DELTA), "epsilon must be positive and finite"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
