"""Epsilon against METHOD.md's table, the PLD accountant and a numerical integral."""

from __future__ import annotations

import itertools
import math
import re

import dp_accounting
import pytest
from dp_accounting import pld

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.accountant import (
    compose,
    epsilon_bound,
    epsilon_spent,
    multiplier_for,
    multiplier_for_bound,
)
from fedpdm.privacy.calibration import calibrate_t0
from fedpdm.privacy.events import release_event
from fedpdm.privacy.types import GaussianEvent
from tests.support.cases import every
from tests.support.oracles import hockey_stick

DELTA = 1e-5
LINEAR = make_schedule("linear", num_steps=1000, beta_start=1e-4, beta_end=0.02)


def event(multiplier: float) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=multiplier)


# eps, C, smallest t0 by the exact value and by the paper's bound, sigma^2 of each.
TABLE = [
    (1, 10, 924, 952, 5567, 9612),
    (3, 10, 811, 835, 774, 1162),
    (10, 5, 567, 588, 25.0, 32.5),
    (10, 10, 675, 693, 100, 129),
    (10, 20, 770, 786, 400, 521),
]


@pytest.mark.parametrize(("eps", "clip", "exact", "bound", "var_exact", "var_bound"), TABLE)
def test_the_table_of_the_method(
    eps: float, clip: float, exact: int, bound: int, var_exact: float, var_bound: float
) -> None:
    budget = {"epsilon": eps, "delta": DELTA}
    assert calibrate_t0(LINEAR, clip_norm=clip, **budget) == exact
    assert calibrate_t0(LINEAR, clip_norm=clip, **budget, accounting="paper") == bound
    # sigma = multiplier * sensitivity, sensitivity = 2 C. The table gives the sigma^2 that is
    # needed in its exact column and the sigma^2 at t0 in its bound column, to three digits.
    needed = (multiplier_for(**budget) * 2 * clip) ** 2
    assert needed == pytest.approx(var_exact, rel=2e-3)
    assert LINEAR.noise_to_signal(exact - 1) ** 2 < needed <= LINEAR.noise_to_signal(exact) ** 2
    needed = (multiplier_for_bound(**budget) * 2 * clip) ** 2
    assert LINEAR.noise_to_signal(bound - 1) ** 2 < needed <= LINEAR.noise_to_signal(bound) ** 2
    assert LINEAR.noise_to_signal(bound) ** 2 == pytest.approx(var_bound, rel=2e-3)


@pytest.mark.parametrize(("accounting", "spent"), [("exact", "exact"), ("paper", "bound")])
def test_calibrated_t0_is_the_smallest_that_fits(accounting: str, spent: str) -> None:
    for eps, clip in itertools.product((0.5, 2.0, 10.0, 40.0), (1.0, 4.0, 7.5)):
        t0 = calibrate_t0(LINEAR, clip_norm=clip, epsilon=eps, delta=DELTA, accounting=accounting)

        def cost(t: int, clip: float = clip) -> float:
            one = release_event(LINEAR, t0=t, clip_norm=clip)
            if spent == "exact":
                return epsilon_spent([one], delta=DELTA)
            return epsilon_bound(one, delta=DELTA)

        assert cost(t0) <= eps
        assert t0 == 1 or cost(t0 - 1) > eps


def test_the_papers_example() -> None:
    one = release_event(LINEAR, t0=690, clip_norm=10)
    assert epsilon_bound(one, delta=DELTA) == pytest.approx(10.24, abs=5e-3)
    assert epsilon_spent([one], delta=DELTA) == pytest.approx(8.77, abs=5e-3)


@pytest.mark.parametrize(("releases", "eps"), [(1, 8.77), (2, 13.49), (4, 21.14), (10, 39.66)])
def test_every_further_release_costs(releases: int, eps: float) -> None:
    one = release_event(LINEAR, t0=690, clip_norm=10)
    assert epsilon_spent([one] * releases, delta=DELTA) == pytest.approx(eps, abs=5e-3)
    # The privacy loss distribution accountant composes by convolution, not by mu.
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.GaussianDpEvent(one.noise_multiplier), releases)
    assert accountant.get_epsilon(DELTA) == pytest.approx(eps, abs=2e-2)


@every("delta", [1e-9, 1e-5, 1e-2])
@every("multiplier", [0.2, 0.5, 1.0, 3.0, 20.0])
def test_exact_epsilon_integrates_to_delta(multiplier: float, delta: float) -> None:
    eps = epsilon_spent([event(multiplier)], delta=delta)
    if eps == 0:  # already (0, delta): total variation is at most delta
        assert hockey_stick(1 / multiplier, 0.0) <= delta
        return
    assert hockey_stick(1 / multiplier, eps) == pytest.approx(delta, rel=1e-6)
    # Planted fault: sensitivity C instead of 2 C halves mu, and the integral shows it.
    wrong = epsilon_spent([event(2 * multiplier)], delta=delta)
    assert hockey_stick(1 / multiplier, wrong) > 1.5 * delta


def test_unequal_releases_compose_like_the_pld_accountant() -> None:
    events = [event(1.3), event(2.0), event(5.0)]
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for each in events:
        accountant.compose(dp_accounting.GaussianDpEvent(each.noise_multiplier))
    spent = epsilon_spent(events, delta=DELTA)
    assert spent == pytest.approx(accountant.get_epsilon(DELTA), abs=5e-3)
    assert spent > max(epsilon_spent([each], delta=DELTA) for each in events)
    total = compose(events).noise_multiplier
    assert hockey_stick(1 / total, spent) == pytest.approx(DELTA, rel=1e-6)


def test_composition_has_its_identities() -> None:
    a, b, c = event(0.7), event(1.9), event(4.0)
    assert compose([a]).noise_multiplier == pytest.approx(0.7, rel=1e-15)
    left = compose([compose([a, b]), c]).noise_multiplier
    assert left == pytest.approx(compose([c, b, a]).noise_multiplier, rel=1e-14)
    assert compose([a, event(math.inf)]).noise_multiplier == pytest.approx(0.7, rel=1e-15)
    assert compose([]).noise_multiplier == math.inf
    assert epsilon_spent([], delta=DELTA) == 0.0


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan")])
def test_no_noise_is_no_privacy(multiplier: float) -> None:
    assert epsilon_spent([event(multiplier)], delta=DELTA) == math.inf
    assert epsilon_spent([event(5.0), event(multiplier)], delta=DELTA) == math.inf
    assert epsilon_bound(event(multiplier), delta=DELTA) == math.inf


def test_no_noising_steps_are_no_privacy() -> None:
    clean = release_event(LINEAR, t0=0, clip_norm=10)
    assert clean.noise_multiplier == 0.0
    assert epsilon_spent([clean], delta=DELTA) == math.inf
    assert epsilon_bound(clean, delta=DELTA) == math.inf


def test_only_the_ratio_of_clip_to_noise_matters() -> None:
    sigma = LINEAR.noise_to_signal(600)
    assert release_event(LINEAR, t0=600, clip_norm=3).noise_multiplier == pytest.approx(sigma / 6)


@every("delta", [1e-7, 1e-5])
@every("eps", [1e-9, 0.1, 1.0, 10.0, 60.0])
def test_multipliers_invert_the_epsilons(eps: float, delta: float) -> None:
    if eps > 1e-6:
        exact = epsilon_spent([event(multiplier_for(epsilon=eps, delta=delta))], delta=delta)
        assert exact == pytest.approx(eps, rel=1e-8)
    needed = multiplier_for_bound(epsilon=eps, delta=delta)
    assert epsilon_bound(event(needed), delta=delta) == pytest.approx(eps, rel=1e-10)
    # The paper's bound is an upper bound: it asks for more noise.
    assert needed > multiplier_for(epsilon=eps, delta=delta)


def test_epsilon_falls_with_noise_and_with_delta() -> None:
    by_noise = [epsilon_spent([event(m)], delta=DELTA) for m in (0.3, 0.6, 1.2, 2.4)]
    by_delta = [epsilon_spent([event(1.0)], delta=d) for d in (1e-8, 1e-6, 1e-4, 1e-2)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_delta == sorted(by_delta, reverse=True)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_bad_deltas_are_refused(delta: float) -> None:
    message = re.escape(f"delta must be in (0, 1), got {delta}")
    for call in (
        lambda: epsilon_spent([event(1.0)], delta=delta),
        lambda: epsilon_bound(event(1.0), delta=delta),
        lambda: multiplier_for(epsilon=1.0, delta=delta),
        lambda: multiplier_for_bound(epsilon=1.0, delta=delta),
        lambda: calibrate_t0(LINEAR, clip_norm=1.0, epsilon=1.0, delta=delta),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("eps", [0.0, -1.0, math.inf, float("nan")])
def test_bad_epsilons_are_refused(eps: float) -> None:
    message = re.escape(f"epsilon must be positive and finite, got {eps}")
    for function in (multiplier_for, multiplier_for_bound):
        with pytest.raises(ValueError, match=message):
            function(epsilon=eps, delta=DELTA)


def test_bad_calibrations_are_refused() -> None:
    with pytest.raises(ValueError, match="accounting must be exact or paper, got 'renyi'"):
        calibrate_t0(LINEAR, clip_norm=1.0, epsilon=1.0, delta=DELTA, accounting="renyi")
    for clip in (0.0, -2.0, math.inf):
        with pytest.raises(ValueError, match=f"clip_norm must be positive and finite, got {clip}"):
            calibrate_t0(LINEAR, clip_norm=clip, epsilon=1.0, delta=DELTA)
        with pytest.raises(ValueError, match=f"clip_norm must be positive and finite, got {clip}"):
            release_event(LINEAR, t0=10, clip_norm=clip)
