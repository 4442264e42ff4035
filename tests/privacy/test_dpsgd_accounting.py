"""What DP-SGD costs, against closed forms, numerical integrals and Opacus' accountants."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import integrate, stats

from fedpdm.privacy.dpsgd import dp_sgd_epsilon, dp_sgd_noise_multiplier
from tests.support.oracles import hockey_stick

DELTA = 1e-5


def opacus_epsilon(accountant: Any, sigma: float, rate: float, steps: int) -> float:
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():  # the optimal order is at an end of its list of orders
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta=DELTA))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.1, 256 / 60_000, 14_062), (0.8, 0.01, 2_000), (2.4, 0.1, 2_000), (5.0, 0.128, 6_000)],
)
def test_epsilon_is_that_of_opacus(sigma: float, rate: float, steps: int) -> None:
    """The first row is the MNIST example of TensorFlow Privacy and Opacus."""
    ours = dp_sgd_epsilon(noise_multiplier=sigma, sample_rate=rate, num_steps=steps, delta=DELTA)
    prv = opacus_epsilon(PRVAccountant(), sigma, rate, steps)  # an upper bound, error up to 0.01
    assert ours == pytest.approx(prv, abs=0.02 + 0.002 * prv)
    # Renyi accounting bounds the same from above, loosely.
    loose = opacus_epsilon(RDPAccountant(), sigma, rate, steps)
    assert ours < loose < 1.2 * ours


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "steps"), [(4.0, 10), (1.0, 1), (30.0, 500)])
def test_whole_batches_are_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    """Sampling rate 1: mu = sqrt(steps) / sigma, and delta(epsilon) is an integral."""
    epsilon = dp_sgd_epsilon(noise_multiplier=sigma, sample_rate=1.0, num_steps=steps, delta=DELTA)
    assert hockey_stick(math.sqrt(steps) / sigma, epsilon) == pytest.approx(DELTA, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.1), (1.0, 0.5)])
def test_one_step_is_an_integral(sigma: float, rate: float) -> None:
    """P = (1 - q) N(0, s^2) + q N(1, s^2) against Q = N(0, s^2), the worse of both directions."""
    epsilon = dp_sgd_epsilon(noise_multiplier=sigma, sample_rate=rate, num_steps=1, delta=DELTA)
    without, with_one = stats.norm(0, sigma), stats.norm(1, sigma)

    def p(x: float) -> float:
        return float((1 - rate) * without.pdf(x) + rate * with_one.pdf(x))

    def q(x: float) -> float:
        return float(without.pdf(x))

    found = []
    for one, other in ((p, q), (q, p)):
        found.append(
            integrate.quad(
                lambda x, one=one, other=other: max(0.0, one(x) - math.exp(epsilon) * other(x)),
                -12 * sigma, 1 + 12 * sigma, limit=2000, epsabs=1e-12,
                points=[0.0, 1.0, 1 + 3 * sigma, 1 + 4 * sigma],
            )[0]
        )  # fmt: skip
    assert max(found) == pytest.approx(DELTA, rel=5e-3)


@pytest.mark.slow
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta() -> None:
    base: dict[str, Any] = {
        "noise_multiplier": 1.2, "sample_rate": 0.05, "num_steps": 300, "delta": DELTA,
    }  # fmt: skip
    epsilon = dp_sgd_epsilon(**base)
    for more in ({"num_steps": 600}, {"sample_rate": 0.1}):
        assert dp_sgd_epsilon(**{**base, **more}) > epsilon
    for less in ({"noise_multiplier": 2.0}, {"delta": 1e-3}):
        assert dp_sgd_epsilon(**{**base, **less}) < epsilon
    assert dp_sgd_epsilon(**{**base, "num_steps": 0}) == 0.0
    assert dp_sgd_epsilon(**{**base, "noise_multiplier": 0.0}) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(10.0, 0.032, 3000), (1.0, 0.05, 200), (3.0, 1.0, 10)]
)
def test_the_noise_multiplier_is_the_smallest(epsilon: float, rate: float, steps: int) -> None:
    sigma = dp_sgd_noise_multiplier(epsilon=epsilon, delta=DELTA, sample_rate=rate, num_steps=steps)

    def spent(multiplier: float) -> float:
        return dp_sgd_epsilon(
            noise_multiplier=multiplier, sample_rate=rate, num_steps=steps, delta=DELTA
        )

    assert spent(sigma) <= epsilon < spent(sigma * (1 - 2e-4))


def test_bad_numbers_are_refused() -> None:
    good: dict[str, Any] = {"sample_rate": 0.1, "num_steps": 10, "delta": DELTA}
    for bad, message in (
        ({"sample_rate": 0.0}, "sample_rate must be in (0, 1], got 0.0"),
        ({"sample_rate": 1.5}, "sample_rate must be in (0, 1], got 1.5"),
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"delta": 0.0}, "delta must be in (0, 1), got 0.0"),
        ({"delta": math.nan}, "delta must be in (0, 1), got nan"),
    ):
        for call in (
            lambda given: dp_sgd_epsilon(noise_multiplier=1.0, **given),
            lambda given: dp_sgd_noise_multiplier(epsilon=1.0, **given),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call({**good, **bad})
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise_multiplier must be at least 0 and finite"):
            dp_sgd_epsilon(noise_multiplier=value, **good)
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon must be positive and finite"):
            dp_sgd_noise_multiplier(epsilon=value, **good)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        dp_sgd_noise_multiplier(epsilon=1.0, **{**good, "num_steps": 0})
