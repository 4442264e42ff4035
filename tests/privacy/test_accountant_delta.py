"""Delta at epsilon, many releases and extreme noise, against 60-digit arithmetic and PLDs."""

from __future__ import annotations

import math
import re

import dp_accounting
import mpmath
import pytest
from dp_accounting import pld

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.accountant import (
    ACCOUNTINGS,
    accounting_named,
    compose,
    delta_bound,
    delta_spent,
    epsilon_bound,
    epsilon_spent,
    multiplier_for,
    multiplier_for_bound,
    repeated,
    worst,
)
from fedpdm.privacy.events import release_event
from fedpdm.privacy.types import GaussianEvent
from tests.support.cases import every
from tests.support.oracles import hockey_stick

DELTA = 1e-5
AT_690 = release_event(make_schedule("linear"), t0=690, clip_norm=10)


def event(multiplier: float) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=multiplier)


def many_digits(mu: object, epsilon: object) -> mpmath.mpf:
    """Theorem 8 of Balle and Wang 2018, term by term."""
    mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)

    def tail(x: mpmath.mpf) -> mpmath.mpf:  # Phi(-x)
        return mpmath.erfc(x / mpmath.sqrt(2)) / 2

    first = tail(epsilon / mu - mu / 2)
    return first - mpmath.exp(epsilon) * tail(epsilon / mu + mu / 2)


# --- Delta at epsilon -------------------------------------------------------------------------

CURVE = [
    (multiplier, epsilon)
    for multiplier in (1e-4, 0.02, 0.3, 1.0, 7.0, 1e4, 1e8)
    for epsilon in (0.0, 1e-9, 0.1, 3.0, 50.0, 1e3, 1e6, 5.00426e7)
]


@every("multiplier, epsilon", CURVE)
def test_delta_is_that_of_many_digits(multiplier: float, epsilon: float) -> None:
    with mpmath.workdps(60):
        wanted = many_digits(1 / mpmath.mpf(multiplier), epsilon)
        if wanted < 1e-60:  # cancelled in these digits too
            assert delta_spent([event(multiplier)], epsilon=epsilon) < 1e-50
            return
    # Near 1 the digits that count are those of 1 - delta; they need not be kept.
    assert delta_spent([event(multiplier)], epsilon=epsilon) == pytest.approx(
        float(wanted), rel=2e-9
    )


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 8.77, 20.0])
def test_delta_is_the_integral_of_the_privacy_loss(epsilon: float) -> None:
    mu = 1 / AT_690.noise_multiplier
    assert delta_spent([AT_690], epsilon=epsilon) == pytest.approx(
        hockey_stick(mu, epsilon), rel=1e-8
    )
    # Planted faults: sensitivity C, and the loss counted on one side only.
    assert delta_spent([event(2 / mu)], epsilon=epsilon) < 0.6 * hockey_stick(mu, epsilon)
    with mpmath.workdps(30):
        one_sided = float(mpmath.erfc((epsilon / mu - mu / 2) / mpmath.sqrt(2)) / 2)
    assert one_sided > 1.05 * hockey_stick(mu, epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 10])
def test_delta_of_many_releases_is_that_of_the_pld_accountant(count: int) -> None:
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(3.0), count)
    for epsilon in (0.5, 2.0, 5.0):
        theirs = accountant.get_delta(epsilon)  # an upper bound, by rounding losses up
        ours = delta_spent([event(3.0)] * count, epsilon=epsilon)
        assert theirs * (1 - 2e-3) - 1e-14 < ours <= theirs * (1 + 1e-9) + 1e-14


@pytest.mark.slow
@every("delta", [1e-300, 1e-30, 1e-5, 0.5, 0.999])
@every("multiplier", [1e-9, 1e-6, 1e-3, 0.1, 1.0, 10.0, 999.0, 1001.0, 1e6, 1e9])
def test_epsilon_is_exact_however_strong_or_weak_the_noise(multiplier: float, delta: float) -> None:
    """Below 1e-3 and above 1e3 it is not dp_accounting that answers."""
    spent = epsilon_spent([event(multiplier)], delta=delta)
    with mpmath.workdps(700):
        mu = 1 / mpmath.mpf(multiplier)
        if spent == 0:
            assert many_digits(mu, 0) <= delta
            return
        slack = mpmath.mpf(1e-9)
        assert many_digits(mu, spent * (1 + slack)) < delta < many_digits(mu, spent * (1 - slack))


def test_our_solver_and_that_of_dp_accounting_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(m, d) for m in (0.002, 0.05, 0.7, 3.0, 40.0) for d in (1e-12, 1e-5, 1e-2)]
    theirs = [epsilon_spent([event(m)], delta=d) for m, d in cases]
    budgets = [(e, d) for e in (0.05, 1.0, 10.0, 900.0) for d in (1e-12, 1e-5, 1e-2)]
    their_multipliers = [multiplier_for(epsilon=e, delta=d) for e, d in budgets]
    monkeypatch.setattr("fedpdm.privacy.accountant._TRUSTED", (math.inf, math.inf))
    assert [epsilon_spent([event(m)], delta=d) for m, d in cases] == pytest.approx(
        theirs, rel=1e-10
    )
    ours = [multiplier_for(epsilon=e, delta=d) for e, d in budgets]
    assert ours == pytest.approx(their_multipliers, rel=1e-10)


@every("accounting", ["exact", "paper"])
@every("delta", [1e-300, 1e-5, 0.5])
@every("epsilon", [1e-300, 1e-9, 0.1, 10.0, 1e4, 1e6, 1e12, 1e100, 1e308])
def test_multipliers_keep_to_epsilon_at_any_scale(
    accounting: str, epsilon: float, delta: float
) -> None:
    rules = accounting_named(accounting)
    needed = rules.multiplier(epsilon=epsilon, delta=delta)
    assert rules.epsilon(event(needed), delta=delta) <= epsilon
    assert rules.epsilon(event(needed * (1 - 1e-7)), delta=delta) > epsilon


# --- Limits ---------------------------------------------------------------------------------


def test_limits_of_the_noise() -> None:
    for none in (0.0, -1.0, float("nan")):
        assert delta_spent([event(none)], epsilon=1e300) == 1.0
        assert delta_bound(event(none), epsilon=1e300) == 1.0
        assert repeated(event(none), 3).noise_multiplier == 0.0
    assert delta_spent([event(5.0), event(0.0)], epsilon=1.0) == 1.0
    assert delta_spent([], epsilon=0.0) == 0.0
    assert delta_spent([event(math.inf)], epsilon=0.0) == 0.0
    assert delta_bound(event(math.inf), epsilon=0.0) == 0.0
    assert epsilon_bound(event(math.inf), delta=DELTA) == 0.0
    assert repeated(event(math.inf), 3).noise_multiplier == math.inf
    # As good as no noise: no overflow, and an upper bound all the same.
    assert epsilon_spent([event(1e-200)], delta=DELTA) == math.inf
    assert epsilon_bound(event(1e-200), delta=DELTA) == math.inf
    assert delta_spent([event(1e-200)], epsilon=10.0) == 1.0
    assert delta_spent([event(1.0)], epsilon=1e9) == 0.0


def test_delta_at_epsilon_zero_is_the_total_variation() -> None:
    for multiplier in (1e-3, 0.4, 2.0, 1e7):
        distance = math.erf(1 / multiplier / math.sqrt(8))
        assert delta_spent([event(multiplier)], epsilon=0.0) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_delta_and_epsilon_invert_each_other(accounting: str) -> None:
    rules = ACCOUNTINGS[accounting]
    for multiplier in (0.05, 0.5, 4.0):
        deltas = []
        for epsilon in (0.2, 1.0, 9.0, 200.0, 900.0):
            delta = rules.delta(event(multiplier), epsilon=epsilon)
            deltas.append(delta)
            if 0 < delta < 1 - 1e-9:
                back = rules.epsilon(event(multiplier), delta=delta)
                assert back == pytest.approx(epsilon, rel=1e-8)
        assert deltas == sorted(deltas, reverse=True)


def test_the_bound_is_above_the_exact_curve_and_says_nothing_below_rho() -> None:
    for multiplier in (0.1, 0.5, 2.0):
        rho = 1 / (2 * multiplier**2)
        for factor in (1.01, 1.5, 3.0):
            exact = delta_spent([event(multiplier)], epsilon=factor * rho)
            assert delta_bound(event(multiplier), epsilon=factor * rho) > exact
        assert delta_bound(event(multiplier), epsilon=0.99 * rho) == 1.0


# --- Many releases, many images -------------------------------------------------------------


def test_repeated_is_composition() -> None:
    for count in (1, 2, 7):
        total = repeated(event(1.7), count).noise_multiplier
        assert total == pytest.approx(compose([event(1.7)] * count).noise_multiplier, rel=1e-14)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count must be at least 1, got {count}"):
            repeated(event(1.0), count)


@pytest.mark.parametrize(("count", "epsilon"), [(1, 10.24), (2, 15.43), (4, 23.72), (10, 43.44)])
def test_the_papers_bound_of_many_releases(count: int, epsilon: float) -> None:
    """Written out as zero-concentrated DP: rho adds up, then rho + 2 sqrt(rho ln(1/delta))."""
    total = repeated(AT_690, count)
    rho = count / (2 * AT_690.noise_multiplier**2)
    wanted = rho + 2 * math.sqrt(rho * math.log(1 / DELTA))
    assert epsilon_bound(total, delta=DELTA) == pytest.approx(wanted, rel=1e-12)
    assert wanted == pytest.approx(epsilon, abs=5e-3)
    assert wanted > epsilon_spent([total], delta=DELTA)
    # Much better than adding up the bounds, which is also an upper bound (at count deltas).
    assert count == 1 or wanted < count * epsilon_bound(AT_690, delta=DELTA)


def test_a_group_is_an_image_of_many_pixels() -> None:
    """k images at their worst distance 2 C each are one image at distance 2 C sqrt(k)."""
    clip, sigma, k = 3.0, 2.0, 5
    distance = math.sqrt(k * (2 * clip) ** 2)
    together = epsilon_spent([event(sigma / distance)], delta=DELTA)
    alone = event(sigma / (2 * clip))
    assert epsilon_spent([repeated(alone, k)], delta=DELTA) == pytest.approx(together, rel=1e-12)
    assert together > epsilon_spent([alone], delta=DELTA)


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [-1e-9, math.inf, float("nan")])
def test_bad_epsilons_are_refused(epsilon: float) -> None:
    message = re.escape(f"epsilon must be at least 0 and finite, got {epsilon}")
    with pytest.raises(ValueError, match=message):
        delta_spent([event(1.0)], epsilon=epsilon)
    with pytest.raises(ValueError, match=message):
        delta_bound(event(1.0), epsilon=epsilon)


def test_an_unknown_accounting_is_refused() -> None:
    message = "privacy.accounting must be exact or paper, got 'renyi'"
    with pytest.raises(ValueError, match=message):
        accounting_named("renyi")
    assert multiplier_for_bound(epsilon=10, delta=DELTA) > multiplier_for(epsilon=10, delta=DELTA)


def test_a_multiplier_that_is_no_number_costs_most() -> None:
    """It counts as no noise, wherever it stands."""
    odd, strong, weak = event(math.nan), event(2.0), event(0.5)
    for events in ((odd, strong, weak), (strong, odd, weak), (weak, strong, odd)):
        assert worst(events) is odd
    assert worst((strong, weak)) is weak
    assert epsilon_spent([strong, odd], delta=DELTA) == math.inf
