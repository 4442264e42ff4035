"""Rounds over Poisson samples, replace-one, against integrals and accountants of other origin."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import integrate, stats

from fedpdm.privacy.accountant import delta_spent, epsilon_spent, multiplier_for
from fedpdm.privacy.subsampled import hockey_sticks, subsampled_mu, subsampled_multiplier
from fedpdm.privacy.types import GaussianEvent, SubsampledGaussianEvent
from tests.support.cases import every

DELTA = 1e-5
ROUNDS = [(1.5, 0.05), (0.7, 0.3), (4.0, 0.2), (0.4, 0.02), (2.0, 1.0)]  # noise over C, rate


def rounds(noise: float, rate: float, count: int = 1) -> SubsampledGaussianEvent:
    return SubsampledGaussianEvent(noise_multiplier=noise, sample_rate=rate, rounds=count)


def density(x: Any, noise: float, rate: float, sign: float) -> Any:
    """Of the worst pair: P* where `sign` is 1, Q* where it is -1."""
    first, moved = (np.exp(-((x - c) ** 2) / (2.0 * noise**2)) for c in (0.0, sign))
    return ((1.0 - rate) * first + rate * moved) / (noise * math.sqrt(2.0 * math.pi))


def integral(noise: float, rate: float, epsilon: float) -> float:
    """delta(epsilon) of one round, by quadrature from where P* = e^epsilon Q* (it is rising)."""

    def excess(x: float) -> float:
        p, q = (density(x, noise, rate, sign) for sign in (1.0, -1.0))
        return float(max(0.0, p - math.exp(epsilon) * q))

    far = 1.0 + 11.0 * noise
    points = sorted({-1.0, 0.0, 1.0, *np.linspace(-far, far, 41)})
    pieces = itertools.pairwise(points)
    return sum(integrate.quad(excess, *ends, epsabs=1e-15, limit=50)[0] for ends in pieces)


def both(epsilon: float, first: Callable[[Any, float], Any], second: Any, far: float) -> float:
    """delta(epsilon) of two mechanisms together, each a density of x and sign, on a grid."""
    x, step = np.linspace(-far, far, 6001, retstep=True)
    found = 0.0
    p2, q2 = second(x, 1.0), second(x, -1.0)
    for p1, q1 in zip(first(x, 1.0), first(x, -1.0), strict=True):
        found += np.maximum(0.0, p1 * p2 - math.exp(epsilon) * q1 * q2).sum()
    return float(found * step**2)


# --- One round -----------------------------------------------------------------------------------


@every("noise, rate", ROUNDS)
def test_one_round_is_an_integral(noise: float, rate: float) -> None:
    for epsilon in (-1.0, -0.1, 0.0, 0.1, 1.0, 3.0):
        found = hockey_sticks(np.array([epsilon]), noise_multiplier=noise, sample_rate=rate)
        assert found[0] == pytest.approx(integral(noise, rate, epsilon), rel=1e-6, abs=1e-13)
        if epsilon >= 0:
            spent = delta_spent([rounds(noise, rate)], epsilon=epsilon)
            assert found[0] <= spent <= found[0] * 1.001 + 2e-14


@every("noise, rate", ROUNDS)
def test_one_round_is_the_pair_of_dp_accounting(noise: float, rate: float) -> None:
    theirs = GaussianPrivacyLoss(
        noise, sampling_prob=rate, adjacency_type=AdjacencyType.REPLACE, sensitivity=1.0
    )
    losses = np.linspace(-4.0, 4.0, 161)
    ours = hockey_sticks(losses, noise_multiplier=noise, sample_rate=rate)
    np.testing.assert_allclose(ours, theirs.get_delta_for_epsilon(losses), rtol=1e-8, atol=1e-15)


def pair_fault(sticks: Callable[[float, float, float], float]) -> str | None:
    """Where (noise, rate, epsilon) -> delta of a round says less than some two images show."""
    random = np.random.default_rng(7)
    for noise, rate in ROUNDS:
        for _ in range(25):
            size = int(random.integers(2, 4))
            g, other = (v / np.linalg.norm(v) for v in random.normal(size=(2, size)))
            g, other = g * random.uniform() ** 0.2, other * random.uniform() ** 0.2
            epsilon = float(random.uniform(-1.0, 2.0))
            shown = plane_integral(g, other, noise=noise, rate=rate, epsilon=epsilon)
            if shown > sticks(noise, rate, epsilon) + 1e-7:
                return f"noise {noise}, rate {rate}, epsilon {epsilon:.3f}: {g} and {other}"
    return None


def plane_integral(g: Any, other: Any, *, noise: float, rate: float, epsilon: float) -> float:
    """The divergence of rounds with g and with g', on a grid in the plane of both."""
    along = g / np.linalg.norm(g)
    across = other - along * (along @ other)
    across /= np.linalg.norm(across)
    far = 1.0 + 7.0 * noise
    axis, step = np.linspace(-far, far, 301, retstep=True)
    x, y = np.meshgrid(axis, axis)

    def normal(center: Any) -> Any:
        square = (x - center @ along) ** 2 + (y - center @ across) ** 2
        return np.exp(-square / (2.0 * noise**2)) / (2.0 * math.pi * noise**2)

    base = (1.0 - rate) * normal(0.0 * g)
    p, q = base + rate * normal(g), base + rate * normal(other)
    return float(np.maximum(0.0, p - math.exp(epsilon) * q).sum() * step**2)


def ours(noise: float, rate: float, epsilon: float) -> float:
    found = hockey_sticks(np.array([epsilon]), noise_multiplier=noise, sample_rate=rate)
    return float(found[0])


def add_or_remove(noise: float, rate: float, epsilon: float) -> float:
    """The pair of another relation: N(0) against (1 - q) N(0) + q N(1), the worse direction."""
    return max(
        GaussianPrivacyLoss(
            noise, sampling_prob=rate, adjacency_type=kind
        ).get_delta_for_epsilon(epsilon)
        for kind in (AdjacencyType.ADD, AdjacencyType.REMOVE)
    )  # fmt: skip


@pytest.mark.slow
def test_no_two_images_show_more_than_the_worst_pair() -> None:
    assert pair_fault(ours) is None
    worst = plane_integral(
        np.array([1.0, 0.0]), np.array([-1.0, 1e-9]), noise=0.7, rate=0.3, epsilon=0.5
    )
    assert worst == pytest.approx(ours(0.7, 0.3, 0.5), rel=1e-3)


@pytest.mark.slow
def test_the_pair_of_adding_or_removing_is_caught() -> None:
    assert "noise" in (pair_fault(add_or_remove) or "")
    for noise, rate in ROUNDS:
        assert add_or_remove(noise, rate, 0.5) < integral(noise, rate, 0.5)


# --- Many rounds ---------------------------------------------------------------------------------


@every("noise, count", [(2.0, 1), (8.0, 10), (60.0, 1000), (0.6, 3)])
def test_rounds_that_draw_every_image_are_the_gaussian_mechanism(noise: float, count: int) -> None:
    """Sensitivity 2 C: mu = 2 sqrt(T) / noise, and never less than that."""
    gaussian = GaussianEvent(noise_multiplier=noise / 2.0 / math.sqrt(count))
    for delta in (1e-3, 1e-5, 1e-8):
        exact = epsilon_spent([gaussian], delta=delta)
        found = epsilon_spent([rounds(noise, 1.0, count)], delta=delta)
        assert exact <= found <= exact * (1.0 + 1e-4)
    for epsilon in (0.0, 1.0, 5.0, 15.0, 30.0):  # down to where only rounding is left
        exact = delta_spent([gaussian], epsilon=epsilon)
        found = delta_spent([rounds(noise, 1.0, count)], epsilon=epsilon)
        assert exact <= found <= exact * 1.01 + 2e-15 * (count + 10)


@pytest.mark.slow
@every("noise, rate", [(0.7, 0.3), (1.5, 0.1)])
def test_two_rounds_are_a_double_integral(noise: float, rate: float) -> None:
    def one(x: Any, sign: float) -> Any:
        return density(x, noise, rate, sign)

    def gaussian(x: Any, sign: float) -> Any:
        return stats.norm.pdf(x, sign * 0.6, 1.0)

    beside = GaussianEvent(noise_multiplier=1.0 / 1.2)
    far = 2.0 + 9.0 * max(noise, 1.0)
    for epsilon in (0.2, 1.5):
        for second, events in (
            (one, [rounds(noise, rate, 2)]),
            (gaussian, [beside, rounds(noise, rate)]),
        ):
            exact = both(epsilon, one, second, far)
            found = delta_spent(events, epsilon=epsilon)
            assert found == pytest.approx(exact, rel=1e-3)
            assert found >= exact * (1.0 - 1e-4)  # as exact as the grid is


@pytest.mark.slow
@every("noise, rate, count", [(4.5, 0.2, 500), (1.2, 0.05, 120)])
def test_many_rounds_cost_what_other_accountants_say(noise: float, rate: float, count: int) -> None:
    """dp_accounting's own replace-one accountant; and Renyi divergences, which bound from above."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, count))
    found = epsilon_spent([rounds(noise, rate, count)], delta=DELTA)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-4)
    x, width = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 40_001, retstep=True)
    p, q = (density(x, noise, rate, sign) for sign in (1.0, -1.0))
    bounds = []
    for order in np.linspace(1.5, 12.0, 43):
        powers = np.exp(order * np.log(p) + (1.0 - order) * np.log(q))
        renyi = math.log(powers.sum() * width) / (order - 1.0)
        rest = math.log1p(-1.0 / order) - math.log(DELTA * order) / (order - 1.0)
        bounds.append(count * renyi + rest)
    assert found < min(bounds) < 1.2 * found
    near = GaussianEvent(noise_multiplier=1.0 / subsampled_mu(rounds(noise, rate, count)))
    assert found == pytest.approx(epsilon_spent([near], delta=DELTA), rel=0.05)


def test_more_of_anything_but_noise_costs_more() -> None:
    base = epsilon_spent([rounds(1.5, 0.1, 50)], delta=DELTA)
    for event in (rounds(1.5, 0.1, 51), rounds(1.5, 0.101, 50), rounds(1.49, 0.1, 50)):
        assert epsilon_spent([event], delta=DELTA) > base
    assert epsilon_spent([rounds(1.5, 0.1, 50)], delta=2e-5) < base
    costs = [epsilon_spent([rounds(0.9, 0.2, count)], delta=DELTA) for count in range(1, 7)]
    assert costs == sorted(costs)
    # A round costs no less than a smaller rate, and no more than the mechanism without sampling.
    whole = epsilon_spent([rounds(1.5, 1.0, 50)], delta=DELTA)
    rates = [epsilon_spent([rounds(1.5, q, 50)], delta=DELTA) for q in (0.01, 0.1, 0.5, 0.99)]
    assert [*rates, whole] == sorted([*rates, whole])


@pytest.mark.slow
def test_noise_out_of_all_proportion_errs_towards_more_loss() -> None:
    for noise in (0.0, 1e-4, math.nan, -1.0):
        assert epsilon_spent([rounds(noise, 0.1, 3)], delta=DELTA) == math.inf
        assert delta_spent([rounds(noise, 0.1, 3)], epsilon=1.0) == 1.0
    assert epsilon_spent([rounds(math.inf, 0.1, 3)], delta=DELTA) == 0.0
    assert epsilon_spent([rounds(1e200, 0.1, 3)], delta=DELTA) == 0.0
    assert 1e4 < epsilon_spent([rounds(0.01, 0.5, 3)], delta=DELTA) < math.inf
    assert epsilon_spent([rounds(2.0, 0.1, 100)], delta=1e-13) == math.inf  # rounding decides


# --- The noise for a budget ----------------------------------------------------------------------


@pytest.mark.slow
@every(
    "epsilon, rate, count, share",
    [(10.0, 0.2, 500, 0.3), (1.0, 0.05, 120, 0.0), (3.0, 1.0, 20, 0.9), (10.0, 0.02, 60, 0.99)],
)
def test_the_noise_multiplier_is_the_smallest(
    epsilon: float, rate: float, count: int, share: float
) -> None:
    mu = math.sqrt(share) / multiplier_for(epsilon=epsilon, delta=DELTA)
    found = subsampled_multiplier(
        epsilon=epsilon, delta=DELTA, sample_rate=rate, rounds=count, mu=mu
    )
    beside = [GaussianEvent(noise_multiplier=1.0 / mu)] if mu > 0 else []
    spent = epsilon_spent([*beside, rounds(found, rate, count)], delta=DELTA)
    less = epsilon_spent([*beside, rounds(found * (1.0 - 2e-4), rate, count)], delta=DELTA)
    assert spent <= epsilon < less
    if rate == 1.0:
        exact = 2.0 * math.sqrt(count / (1.0 - share)) * multiplier_for(epsilon=3.0, delta=DELTA)
        assert exact <= found <= exact * (1.0 + 2e-4)


def test_bad_numbers_are_refused() -> None:
    good: dict[str, Any] = {"epsilon": 10.0, "delta": DELTA, "sample_rate": 0.1, "rounds": 10}
    for bad, message in (
        ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
        ({"epsilon": math.nan}, "epsilon must be positive and finite, got nan"),
        ({"delta": 1.0}, "delta must be in (0, 1), got 1.0"),
        ({"delta": 1e-14}, "delta must be at least 4e-14 for 10 subsampled rounds, got 1e-14"),
        ({"sample_rate": 1.5}, "sample_rate must be in (0, 1], got 1.5"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"mu": -1.0}, "mu must be at least 0 and finite, got -1.0"),
        ({"mu": 2.01}, "mu must be below 2.0004, the whole of epsilon 10 at delta 1e-05"),
        ({"mu": 2.0003}, "or nothing is left for subsampled rounds; got 2.0003"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            subsampled_multiplier(**{**good, **bad})
    for rate, count in ((0.0, 1), (1.1, 1), (math.nan, 1), (0.1, 0)):
        with pytest.raises(
            ValueError, match=r"sample_rate must be in \(0, 1\] and rounds at least"
        ):
            epsilon_spent([rounds(1.0, rate, count)], delta=DELTA)


@pytest.mark.slow
def test_the_table_of_the_method() -> None:
    """docs/method.md: each number keeps to its budget, and 0.2% less would not."""
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    number = r" ([\d.]+) \|"
    rows = re.findall(rf"^\|{number} (\d+) \| \d+ \|{3 * number}$", page, re.MULTILINE)
    assert len(rows) == 4
    whole = multiplier_for(epsilon=10.0, delta=DELTA)
    for rate, count, *noises in rows:
        for share, noise in zip((0.0, 0.3, 0.6), map(float, noises), strict=True):
            beside = [GaussianEvent(noise_multiplier=whole / math.sqrt(share))] if share else []
            spent, less = (
                epsilon_spent([*beside, rounds(s, float(rate), int(count))], delta=DELTA)
                for s in (noise, 0.998 * noise)
            )
            assert spent <= 10.0 < less
