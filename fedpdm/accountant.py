"""Privacy accounting of Gaussian releases. Takes numbers, knows no tensors.

Neighbouring relation: one image replaced by any other (local model: each image is a data set of
its own). A release of `CLIP(x, C)` with noise sigma is the Gaussian mechanism with sensitivity
2 C, so its event is `GaussianEvent(noise_multiplier=sigma / (2 C))`. With mu = 1 / multiplier the
exact trade-off is (analytic Gaussian mechanism, Balle and Wang 2018, Theorem 8)

    delta(eps) = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu).

K releases of one image compose to mu = sqrt(sum mu_i^2) (Gaussian DP, Dong et al. 2022,
Corollary 3.3). `dp_accounting` does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import dp_accounting

from fedpdm.types import GaussianEvent

__all__ = [
    "compose",
    "epsilon_bound",
    "epsilon_spent",
    "multiplier_for",
    "multiplier_for_bound",
]


def _check_budget(*, epsilon: float | None = None, delta: float) -> None:
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def compose(events: Sequence[GaussianEvent]) -> GaussianEvent:
    """The single Gaussian event that all `events` on one image amount to."""
    if not all(event.noise_multiplier > 0 for event in events):  # NaN counts as no noise
        return GaussianEvent(noise_multiplier=0.0)
    mu = math.hypot(*(1.0 / event.noise_multiplier for event in events))
    return GaussianEvent(noise_multiplier=1.0 / mu if mu > 0 else math.inf)


def epsilon_spent(events: Sequence[GaussianEvent], *, delta: float) -> float:
    """Exact epsilon of all events that touched one image; inf if one of them added no noise."""
    _check_budget(delta=delta)
    multiplier = compose(events).noise_multiplier
    return float(dp_accounting.get_epsilon_gaussian(multiplier, delta))


def epsilon_bound(event: GaussianEvent, *, delta: float) -> float:
    """The paper's upper bound (Theorem 5.1): 2 C^2/s^2 + C sqrt(8 ln(1/delta) / s^2)."""
    _check_budget(delta=delta)
    if not event.noise_multiplier > 0:  # NaN counts as no noise
        return math.inf
    mu = 1.0 / event.noise_multiplier  # = 2 C / sigma
    return mu**2 / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta))


def multiplier_for(*, epsilon: float, delta: float) -> float:
    """Smallest noise multiplier whose exact epsilon is at most `epsilon`."""
    _check_budget(epsilon=epsilon, delta=delta)
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def multiplier_for_bound(*, epsilon: float, delta: float) -> float:
    """Smallest noise multiplier whose `epsilon_bound` is at most `epsilon` (closed form)."""
    _check_budget(epsilon=epsilon, delta=delta)
    root = math.sqrt(2.0 * math.log(1.0 / delta))
    # mu solves mu^2 / 2 + mu root = epsilon; written without the difference that cancels.
    return (math.sqrt(root**2 + 2.0 * epsilon) + root) / (2.0 * epsilon)
