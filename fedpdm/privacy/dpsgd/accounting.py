"""What DP-SGD costs: the Poisson-subsampled Gaussian mechanism, composed over the steps.

Neighbouring relation: one example added or removed (central model), so that a step's sensitivity is
the clipping bound C and its noise multiplier sigma is the noise's standard deviation over C. The
local guarantee of `fedpdm.privacy.accountant` is for one image *replaced* by any other, with
sensitivity 2 C, and is spent once: the two epsilons do not compare like for like (see
`fedpdm.privacy.dpsgd`).

Epsilon is that of the privacy loss distribution (Koskela et al. 2020; Doroshenko et al. 2022), as
`dp_accounting` computes it: an upper bound that is tight up to its discretisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from scipy import optimize

__all__ = ["dp_sgd_epsilon", "dp_sgd_noise_multiplier"]

_TOLERANCE = 1e-4  # relative, of the noise multiplier


def dp_sgd_epsilon(
    *, noise_multiplier: float, sample_rate: float, num_steps: int, delta: float
) -> float:
    """Epsilon of `num_steps` steps at Poisson sampling rate `sample_rate`; inf without noise.

    Args:
        noise_multiplier: noise standard deviation over the clipping bound, at least 0.
        sample_rate: batch_size / N, in (0, 1].
        num_steps: steps in all (over every round), at least 0; none: epsilon is 0.
        delta: in (0, 1).

    Raises:
        ValueError: an argument out of its range.
    """
    _check(sample_rate=sample_rate, num_steps=num_steps, delta=delta)
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier must be at least 0 and finite, got {noise_multiplier}")
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    return _epsilon(noise_multiplier, sample_rate, num_steps, delta)


def dp_sgd_noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, num_steps: int
) -> float:
    """Noise multiplier whose `dp_sgd_epsilon` is at most `epsilon`; within 1e-4 of the smallest.

    Args as for `dp_sgd_epsilon`, with `epsilon` positive and at least one step.

    Raises:
        ValueError: an argument out of its range.
    """
    _check(sample_rate=sample_rate, num_steps=num_steps, delta=delta)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")

    def excess(log_multiplier: float) -> float:
        multiplier = math.exp(log_multiplier)
        return _epsilon(multiplier, sample_rate, num_steps, delta) / epsilon - 1.0

    # Renyi accounting is fast and a little pessimistic: the answer lies just below its own.
    high = math.log(_renyi_multiplier(epsilon, delta, sample_rate, num_steps))
    while excess(high) > 0:
        high += 0.05
    low = high - 0.05
    while excess(low) <= 0:
        high, low = low, low - 0.1
    root = float(optimize.brentq(excess, low, high, xtol=_TOLERANCE / 4))
    while excess(root) > 0:
        root += _TOLERANCE / 4
    return math.exp(root)


def _check(*, sample_rate: float, num_steps: int, delta: float) -> None:
    if not 0.0 < sample_rate <= 1.0:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


@functools.lru_cache(maxsize=1024)
def _epsilon(multiplier: float, sample_rate: float, num_steps: int, delta: float) -> float:
    from dp_accounting import pld  # it takes a second

    return _spent(pld.PLDAccountant, multiplier, sample_rate, num_steps, delta)


def _renyi_multiplier(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """The multiplier that Renyi accounting (Mironov et al. 2019) asks for, to one per cent."""
    from dp_accounting import rdp

    orders = [*range(2, 65), 128, 256, 512]  # whole: those between do not always converge
    make = functools.partial(rdp.RdpAccountant, orders)

    def excess(log_multiplier: float) -> float:
        found = _spent(make, math.exp(log_multiplier), sample_rate, num_steps, delta)
        return min(found, 1e9) - epsilon

    low, high = 0.0, 0.0
    while excess(high) > 0:
        low, high = high, high + 1.0
    while excess(low) <= 0:
        high, low = low, low - 1.0
    return math.exp(float(optimize.brentq(excess, low, high, xtol=0.01)))


def _spent(
    make: Callable[[Any], Any],
    multiplier: float,
    sample_rate: float,
    num_steps: int,
    delta: float,
) -> float:
    """Epsilon of all steps, by the accountant that `make` gives for a neighbouring relation."""
    import dp_accounting

    step = dp_accounting.GaussianDpEvent(multiplier)
    if sample_rate < 1.0:
        step = dp_accounting.PoissonSampledDpEvent(sample_rate, step)
    accountant = make(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, num_steps))
    return float(accountant.get_epsilon(delta))
