"""Privacy accounting of releases. Takes numbers, knows no tensors.

Events are an open family (`fedpdm.privacy.types.PrivacyEvent`). The accountant reads Gaussian ones,
subsampled Gaussian ones, and what `compose` makes of both; any other is refused, never left out.

Neighbouring relation: one image replaced by any other (local model: each image is a data set of
its own). A release of `CLIP(x, C)` with noise sigma is the Gaussian mechanism with sensitivity
2 C, so its event is `GaussianEvent(noise_multiplier=sigma / (2 C))`. With mu = 1 / multiplier:

    exact   delta(eps) = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu)
            (analytic Gaussian mechanism, Balle and Wang 2018, Theorem 8)
    paper   eps(delta) = mu^2 / 2 + mu sqrt(2 ln(1 / delta))
            (Theorem 5.1, 2 C^2 / sigma^2 + C sqrt(8 ln(1 / delta) / sigma^2); it is the upper
            bound that zero-concentrated DP with rho = mu^2 / 2 gives, Bun and Steinke 2016)

K releases of one image, or one release of each of k images that are replaced together, amount
to mu = sqrt(sum mu_i^2). That is exact (Gaussian DP, Dong et al. 2022, Corollary 3.3), and rho
adds up alike, so the paper's bound at that mu is its bound for all of them.

Rounds over Poisson samples have no mu. Their epsilon, alone and with Gaussian ones, is an upper
bound by privacy loss distributions (`fedpdm.privacy.subsampled`); the paper has none for them.

`dp_accounting` does the exact arithmetic where its differences of logarithms keep their digits;
beyond, `_log_delta` does (tests compare the two).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scipy import optimize, special

from fedpdm.privacy.composition import (
    compose,
    grouped,
    mu_of,
    multiplier_of,
    read_events,
    repeated,
)
from fedpdm.privacy.subsampled import composed_delta, composed_epsilon, subsampled_mu
from fedpdm.privacy.types import (
    ComposedEvent,
    GaussianEvent,
    PrivacyEvent,
    SubsampledGaussianEvent,
)

__all__ = [
    "ACCOUNTINGS",
    "Accounting",
    "accounting_named",
    "compose",
    "delta_bound",
    "delta_spent",
    "delta_warning",
    "epsilon_bound",
    "epsilon_spent",
    "grouped",
    "has_bound",
    "multiplier_for",
    "multiplier_for_bound",
    "repeated",
    "worst",
]

_SQRT_2 = math.sqrt(2.0)
_TRUSTED = (1e-3, 1e3)  # noise multipliers for which dp_accounting is accurate to 1e-8
ASSUMED_IMAGES = 1000  # of a client
_TOLERANCE = 1e-13  # relative, of root finding


def _check_budget(*, epsilon: float | None = None, delta: float) -> None:
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def delta_warning(delta: float, *, images: int | None = None) -> str:
    """Why `delta` is too large for a client with so many `images`, in a line; empty if it is not.

    Where the number is not known, it is taken to be `ASSUMED_IMAGES`.
    """
    count = ASSUMED_IMAGES if images is None else images
    if not delta * count > 1.0:
        return ""
    known = (
        f"1 / {count:,} images of a client"
        if images is not None
        else (f"1 / number of images for a client with more than {math.floor(1.0 / delta):,}")
    )
    return (
        f"delta {delta:g} is above {known}: whoever published each image as it is with probability "
        f"{delta:g} would keep to this delta at epsilon 0"
    )


def _check_epsilon(epsilon: float) -> None:
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be at least 0 and finite, got {epsilon}")


def worst(events: Iterable[PrivacyEvent], *, delta: float = 1e-5) -> PrivacyEvent:
    """The one that costs an image most; a multiplier that is no number is no noise.

    Gaussian ones compare by their mu, at every delta alike; where others are among them, all
    compare by epsilon at `delta`.
    """
    found = list(events)
    if all(type(event) is GaussianEvent for event in found):
        return max(found, key=mu_of)
    return max(found, key=lambda event: (epsilon_spent([event], delta=delta), _size(event)))


def _size(event: PrivacyEvent) -> float:
    """About how much it costs, as a mu: for events that are alike at a delta."""
    parts = read_events([event])
    return math.hypot(mu_of(parts.gaussian), *map(subsampled_mu, parts.subsampled))


def _log_delta(a: float, gap: float, mu: float) -> float:
    """ln(Phi(a) - e^eps Phi(-gap)) with a = mu/2 - eps/mu, gap = mu/2 + eps/mu, mu = a + gap.

    e^eps = phi(a) / phi(gap), so that no large power is left in
    delta = e^(-a^2/2) (erfcx(-a / sqrt 2) - erfcx(gap / sqrt 2)) / 2.
    """
    x, y = -a / _SQRT_2, gap / _SQRT_2
    if a > 1.0:  # delta > 0.68: no difference that cancels
        return math.log1p(-special.ndtr(-a) - math.exp(-a * a / 2.0) * special.erfcx(y) / 2.0)
    if mu < 1e-5:  # the difference would cancel: midpoint rule on erfcx' = 2 x erfcx - 2/sqrt(pi)
        middle = (x + y) / 2.0
        slope = 2.0 / math.sqrt(math.pi) - 2.0 * middle * special.erfcx(middle)
        difference = slope * mu / _SQRT_2
    else:
        difference = special.erfcx(x) - special.erfcx(y)
    return -a * a / 2.0 + math.log(difference / 2.0) if difference > 0 else -math.inf


def _solve(log_delta: Callable[[float], float], highest: float, *, delta: float) -> float:
    """The a at which the increasing `log_delta(a)` is ln(delta); Phi(a) >= delta bounds it."""
    lowest = float(special.ndtri(delta)) - 1.0
    target = math.log(delta)
    return float(optimize.brentq(lambda a: log_delta(a) - target, lowest, highest, xtol=_TOLERANCE))


def epsilon_spent(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Epsilon of all events that touched one image; inf if one of them added no noise.

    Exact for Gaussian ones, an upper bound that is tight to 1e-4 with subsampled ones among them.
    """
    _check_budget(delta=delta)
    return _epsilon_of(compose(events), delta)


@functools.lru_cache(maxsize=1024)  # a store's ledger is checked anew at every message
def _epsilon_of(event: PrivacyEvent, delta: float) -> float:
    """Epsilon of one event."""
    if isinstance(event, ComposedEvent | SubsampledGaussianEvent):
        return composed_epsilon(event, delta=delta)
    multiplier, mu = multiplier_of(event), mu_of(event)
    if mu in (0.0, math.inf):
        return mu
    if _TRUSTED[0] <= multiplier <= _TRUSTED[1]:
        import dp_accounting  # it takes a second

        tolerance = _TOLERANCE * epsilon_bound(event, delta=delta)
        return float(dp_accounting.get_epsilon_gaussian(multiplier, delta, tolerance))
    if _log_delta(mu / 2.0, mu / 2.0, mu) <= math.log(delta):
        return 0.0
    a = _solve(lambda a: _log_delta(a, mu - a, mu), min(mu / 2.0, 40.0), delta=delta)
    return mu * (mu / 2.0 - a)


def delta_spent(events: Sequence[PrivacyEvent], *, epsilon: float) -> float:
    """Delta at `epsilon` >= 0 of all events that touched one image, exact as `epsilon_spent` is.

    1 if one of them added no noise; accurate also where e^epsilon overflows. Below 1e-308 it is
    rounded to 0.
    """
    _check_epsilon(epsilon)
    event = compose(events)
    if isinstance(event, ComposedEvent | SubsampledGaussianEvent):
        return composed_delta(event, epsilon=epsilon)
    mu = mu_of(event)
    if mu in (0.0, math.inf):
        return 0.0 if mu == 0.0 else 1.0
    return math.exp(_log_delta(mu / 2.0 - epsilon / mu, mu / 2.0 + epsilon / mu, mu))


def multiplier_for(*, epsilon: float, delta: float) -> float:
    """Smallest noise multiplier whose exact epsilon is at most `epsilon`."""
    _check_budget(epsilon=epsilon, delta=delta)
    enough = multiplier_for_bound(epsilon=epsilon, delta=delta)
    if _TRUSTED[0] <= enough <= _TRUSTED[1]:
        import dp_accounting  # it takes a second

        found = float(dp_accounting.get_sigma_gaussian(epsilon, delta, _TOLERANCE * enough))
    else:  # at given a and epsilon: gap^2 = a^2 + 2 epsilon and mu = a + gap
        a = _solve(
            lambda a: _log_delta(
                a, math.hypot(a, _SQRT_2 * math.sqrt(epsilon)), _mu_at(a, epsilon)
            ),
            40.0,
            delta=delta,
        )
        found = 1.0 / _mu_at(a, epsilon)
    return _raised(found, lambda m: epsilon_spent([_event(m)], delta=delta) <= epsilon)


def has_bound(event: PrivacyEvent) -> bool:
    """Whether the paper's bound says anything of this event: of Gaussian ones alone."""
    return not isinstance(event, ComposedEvent | SubsampledGaussianEvent)


def _bounded_mu(event: PrivacyEvent) -> float:
    if not has_bound(event):
        raise ValueError(
            "privacy.accounting: paper does not apply to rounds over Poisson samples; set exact"
        )
    return mu_of(event)


def epsilon_bound(event: PrivacyEvent, *, delta: float) -> float:
    """The paper's upper bound (Theorem 5.1): 2 C^2/s^2 + C sqrt(8 ln(1/delta) / s^2).

    `ValueError` where it does not apply (`has_bound`).
    """
    _check_budget(delta=delta)
    mu = _bounded_mu(event)  # = 2 C / sigma
    return mu * (mu / 2.0) + mu * math.sqrt(2.0 * math.log(1.0 / delta))


def delta_bound(event: PrivacyEvent, *, epsilon: float) -> float:
    """The delta at which `epsilon_bound` is `epsilon` >= 0; 1, which says nothing, below mu^2/2."""
    _check_epsilon(epsilon)
    mu = _bounded_mu(event)
    if mu == 0.0:
        return 0.0
    root = epsilon / mu - mu / 2.0  # of 2 ln(1 / delta)
    return math.exp(-root * root / 2.0) if root > 0 else 1.0


def multiplier_for_bound(*, epsilon: float, delta: float) -> float:
    """Smallest noise multiplier whose `epsilon_bound` is at most `epsilon` (closed form)."""
    _check_budget(epsilon=epsilon, delta=delta)
    root = math.sqrt(2.0 * math.log(1.0 / delta))
    # mu solves mu^2 / 2 + mu root = epsilon; written without the difference that cancels.
    found = (math.hypot(root, _SQRT_2 * math.sqrt(epsilon)) + root) / 2.0 / epsilon
    return _raised(found, lambda m: epsilon_bound(_event(m), delta=delta) <= epsilon)


def _event(multiplier: float) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=multiplier)


def _mu_at(a: float, epsilon: float) -> float:
    """a + sqrt(a^2 + 2 epsilon), without the difference that cancels."""
    gap = math.hypot(a, _SQRT_2 * math.sqrt(epsilon))
    return a + gap if a > 0 else 2.0 * (epsilon / (gap - a))


def _raised(multiplier: float, suffices: Callable[[float], bool]) -> float:
    """The least of multiplier, and a little more and more, that `suffices`: rounding errs high."""
    step = 2.0**-52
    raised = multiplier
    while not suffices(raised):
        raised = multiplier * (1.0 + step)
        step *= 2.0
    return raised


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """A way of accounting for one (composed) event; each function is an inverse of the others.

    `epsilon(event, delta=...)`, `delta(event, epsilon=...)` and the smallest
    `multiplier(epsilon=..., delta=...)` that keeps to both.
    """

    epsilon: Callable[..., float]
    delta: Callable[..., float]
    multiplier: Callable[..., float]


ACCOUNTINGS = {
    "exact": Accounting(
        epsilon=lambda event, *, delta: epsilon_spent([event], delta=delta),
        delta=lambda event, *, epsilon: delta_spent([event], epsilon=epsilon),
        multiplier=multiplier_for,
    ),
    "paper": Accounting(epsilon=epsilon_bound, delta=delta_bound, multiplier=multiplier_for_bound),
}


def accounting_named(name: str) -> Accounting:
    """The row of `ACCOUNTINGS`; `ValueError` for another name."""
    if name not in ACCOUNTINGS:
        raise ValueError(f"privacy.accounting must be {' or '.join(ACCOUNTINGS)}, got {name!r}")
    return ACCOUNTINGS[name]
