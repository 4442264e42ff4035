"""What noised sums over Poisson samples cost an image that is replaced by another of its label.

One round draws each image with probability q, adds up vectors g of norm at most C, one for each
drawn image, and adds noise N(0, s^2 I). Everything else that is random or known (the other images
that were drawn, what earlier rounds gave, what g itself is drawn from) is alike on both sides, so
by the joint convexity of hockey-stick divergences it may be fixed, and the two images compare as

    P = (1 - q) N(0, s^2 I) + q N(g, s^2 I),   Q = (1 - q) N(0, s^2 I) + q N(g', s^2 I).

That needs the other images' vectors to have one law whether this one is drawn or not. Draws that
follow one another in a stream that somebody knows would not do: they tell who was drawn before.

**The worst pair** is g = C e, g' = -C e: on a line, in units of C,

    P* = (1 - q) N(0, s^2) + q N(1, s^2),      Q* = (1 - q) N(0, s^2) + q N(-1, s^2).

Proof. For alpha >= 1 and z ~ N(g, s^2 I), with the likelihood ratios L1 of N(g') and L2 of N(0),

    sup_E P(E) - alpha Q(E) = E (q - a L1 - b L2)_+,   a = alpha q,   b = (alpha - 1)(1 - q).

L1 and L2 are lognormal with mean 1; the variances of their logarithms are |g - g'|^2 / s^2, at
most 4 C^2 / s^2, and |g|^2 / s^2, at most C^2 / s^2. (q - y)_+ is convex in y. Of all sums
a L1 + b L2 with given marginals the one whose terms rise together (comonotone) is largest in convex
order, and it grows in that order with each marginal (Kaas, Dhaene and Goovaerts 2000); a lognormal
of mean 1 grows with its variance. So the expectation is at most that of comonotone lognormals with
the largest variances, and for g = C e, g' = -C e that is what L1 and L2 are: both fall as <e, z>
rises. For alpha < 1, H_alpha(P, Q) = 1 - alpha + alpha H_(1 / alpha)(Q, P), and P*, Q* are mirror
images of each other.

The pair dominates each round whatever went before it, so its product dominates all rounds
together, and with the pairs of other mechanisms all of them (Zhu, Dong and Wang 2022). The pair of
adding or removing an image would not do (for such pitfalls: Lebeda, Regehr, Kamath and Steinke
2024).

**Composition** is that of privacy loss distributions, by `dp_accounting`: hockey-stick values on
a grid of losses, joined by chords, which lie above (Doroshenko et al. 2022), then convolved by FFT.
Each step errs towards more loss; the FFT's rounding is covered by `_ROUNDING`, which is added to
delta. The grid is 1 / `FINE` of the standard deviation of a round's loss: that makes epsilon too
large by less than 1e-4 of it, for up to 10,000 rounds. Records hold epsilons of this grid and are
read back to 1e-6: another grid would make ledgers unreadable.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from fedpdm.privacy.types import ComposedEvent, GaussianEvent, SubsampledGaussianEvent

__all__ = [
    "composed_delta",
    "composed_epsilon",
    "hockey_sticks",
    "round_loss",
    "subsampled_mu",
    "subsampled_multiplier",
]

Array = NDArray[np.float64]

FINE, COARSE = 100, 20  # grid steps in a round's standard deviation of the loss
LEAST_NOISE, MOST_NOISE = 1e-3, 1e6  # a smaller multiplier counts as none, a larger one as this
_LEAST_STEP = 1e-6  # of the grid: below it differences of delta lose their digits
_MOST_STEPS = 1 << 18  # of the grid, in a round and in what all rounds spread over
_TAIL = 40.0  # -ln of the probability that counts as a loss without bound, in a round
_ROUNDING = 1e-15  # of delta, for each round, and ten times for all
_TOLERANCE = 1e-4  # relative, of a noise multiplier


def composed_epsilon(event: ComposedEvent | SubsampledGaussianEvent, *, delta: float) -> float:
    """Upper bound on epsilon of all of `event` at `delta`; inf where there is none."""
    parts = _parts(event)
    rest = delta - _rounding(parts)
    if rest <= 0 or _is_unbounded(parts):
        return math.inf
    return float(_losses(parts, FINE).get_epsilon_for_delta(rest))


def composed_delta(
    event: ComposedEvent | SubsampledGaussianEvent, *, epsilon: float, grid: int = FINE
) -> float:
    """Upper bound on delta of all of `event` at `epsilon`."""
    parts = _parts(event)
    if _is_unbounded(parts):
        return 1.0
    found = float(_losses(parts, grid).get_delta_for_epsilon(epsilon))
    return min(1.0, max(found, 0.0) + _rounding(parts))


def hockey_sticks(losses: Array, *, noise_multiplier: float, sample_rate: float) -> Array:
    """sup_E P*(E) - e^loss Q*(E) of one round, at each of the `losses` (N,), of either sign."""
    s, level = noise_multiplier, np.abs(losses)
    log_q, log_rest = _logs(sample_rate)
    # P* = e^level Q* at x = s^2 (level / 2 + asinh(A sinh(level / 2))), A = (1 - q) e^(1/2s^2) / q.
    with np.errstate(divide="ignore"):
        log_sinh = level / 2.0 + np.log(-np.expm1(-level) / 2.0)
    inside = log_rest - log_q + 0.5 / s**2 + log_sinh
    x = s**2 * (level / 2.0 + np.logaddexp(inside, np.logaddexp(0.0, 2.0 * inside) / 2.0))

    def above(center: float, log_weight: Array | float) -> Array:
        return np.exp(log_weight + special.log_ndtr((center - x) / s))

    found = above(1.0, log_q) - above(-1.0, log_q + level)
    found += above(0.0, log_rest) - above(0.0, log_rest + level)
    found = np.clip(found, 0.0, 1.0)
    return np.where(losses >= 0.0, found, -np.expm1(-level) + np.exp(-level) * found)


def subsampled_mu(event: SubsampledGaussianEvent) -> float:
    """The mu of the Gaussian mechanism that many rounds come near to: q sqrt(4 T sinh(C^2 / s^2)).

    It is the central limit of the worst pair: an estimate, no bound.
    """
    power = _inverse_square(event.noise_multiplier)
    if power > 700.0:
        return math.inf
    return event.sample_rate * math.sqrt(4.0 * event.rounds * math.sinh(power))


def subsampled_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, rounds: int, mu: float = 0.0
) -> float:
    """Noise over C with which `rounds` sums keep to (epsilon, delta), beside a Gaussian `mu`.

    Args:
        epsilon, delta: the budget of all together.
        sample_rate: probability with which each image is drawn in a round, in (0, 1].
        rounds: how many sums are sent, at least 1.
        mu: of all Gaussian mechanisms on the same images, their sensitivity over their noise.

    Returns:
        A noise multiplier that keeps to the budget, at most 1e-4 above the smallest; more where
        `mu` leaves less than 1% of the squared whole, and the grid's error counts.

    Raises:
        ValueError: an argument out of its range, or a `mu` that leaves nothing of the budget.
    """
    _check(epsilon=epsilon, delta=delta, sample_rate=sample_rate, rounds=rounds, mu=mu)
    whole = _gaussian_mu(epsilon, delta)

    def event(log_multiplier: float) -> ComposedEvent:
        one = SubsampledGaussianEvent(
            noise_multiplier=math.exp(log_multiplier), sample_rate=sample_rate, rounds=rounds
        )
        gaussian = GaussianEvent(noise_multiplier=1.0 / mu if mu > 0 else math.inf)
        return ComposedEvent(gaussian=gaussian, subsampled=(one,))

    def excess(log_multiplier: float, grid: int) -> float:
        found = composed_delta(event(log_multiplier), epsilon=epsilon, grid=grid)
        return math.log(found / delta)

    # A grid that sees room beside mu: where little is left, the coarse one sees none.
    most = math.log(MOST_NOISE)
    grids = [g for g in (COARSE, FINE) if mu < 0.9999 * whole and excess(most, g) <= 0]
    if not grids:
        raise ValueError(
            f"mu must be below {whole:.5g}, the whole of epsilon {epsilon:g} at delta {delta:g}, "
            f"or nothing is left for subsampled rounds; got {mu:.5g}"
        )
    left = (whole + mu) * (whole - mu) / (4.0 * rounds * sample_rate**2)
    guess = -0.5 * math.log(math.asinh(left))
    found, slope = _root(lambda log_multiplier: excess(log_multiplier, grids[0]), guess)
    for _ in range(2):  # Newton's steps on the fine grid, from the coarse one's slope
        found -= excess(found, FINE) / slope
    step = _TOLERANCE / 5.0
    while composed_epsilon(event(found), delta=delta) > epsilon:
        found, step = found + step, 2.0 * step
    return math.exp(found)


def _root(excess: Callable[[float], float], guess: float) -> tuple[float, float]:
    """Where the falling `excess` is zero, and its slope there."""
    low = high = guess
    step = 0.05
    while excess(high) > 0:
        low, high, step = high, high + step, 2.0 * step
    step = 0.05
    while excess(low) <= 0:
        high, low, step = low, low - step, 2.0 * step
    root = float(optimize.brentq(excess, low, high, xtol=1e-3))
    return root, (excess(high) - excess(low)) / (high - low)


def _check(*, epsilon: float, delta: float, sample_rate: float, rounds: int, mu: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if not 0.0 < sample_rate <= 1.0:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if delta < (least := 2.0 * _ROUNDING * (10 + rounds)):
        raise ValueError(
            f"delta must be at least {least:g} for {rounds} subsampled rounds, got {delta:g}: "
            "below it rounding decides"
        )
    if not (mu >= 0 and math.isfinite(mu)):
        raise ValueError(f"mu must be at least 0 and finite, got {mu}")


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """mu of the Gaussian mechanism that spends (epsilon, delta)."""

    def excess(log_mu: float) -> float:
        found = hockey_sticks(
            np.array([epsilon]), noise_multiplier=2.0 * math.exp(-log_mu), sample_rate=1.0
        )
        return float(found[0]) - delta

    return math.exp(float(optimize.brentq(excess, math.log(1e-8), math.log(1e4), xtol=1e-12)))


def _parts(event: ComposedEvent | SubsampledGaussianEvent) -> tuple[SubsampledGaussianEvent, ...]:
    """All mechanisms as subsampled ones; the Gaussian ones are one round that draws every image."""
    parts = (event,) if isinstance(event, SubsampledGaussianEvent) else event.subsampled
    if isinstance(event, ComposedEvent) and event.gaussian.noise_multiplier < math.inf:
        noise = 2.0 * event.gaussian.noise_multiplier
        whole = SubsampledGaussianEvent(noise_multiplier=noise, sample_rate=1.0, rounds=1)
        parts = (*parts, whole)
    return tuple(
        dataclasses.replace(part, noise_multiplier=min(part.noise_multiplier, MOST_NOISE))
        for part in parts
    )


def _is_unbounded(parts: tuple[SubsampledGaussianEvent, ...]) -> bool:
    """Whether a part adds next to no noise; a multiplier that is no number counts as none."""
    return not all(part.noise_multiplier >= LEAST_NOISE for part in parts)


def _rounding(parts: tuple[SubsampledGaussianEvent, ...]) -> float:
    return _ROUNDING * (10 + sum(part.rounds for part in parts))


def _inverse_square(noise_multiplier: float) -> float:
    return (1.0 / noise_multiplier) ** 2 if noise_multiplier > 1e-100 else math.inf


def _logs(sample_rate: float) -> tuple[float, float]:
    """ln q and ln(1 - q)."""
    return math.log(sample_rate), math.log1p(-sample_rate) if sample_rate < 1.0 else -math.inf


def round_loss(x: Array, part: SubsampledGaussianEvent) -> Array:
    """ln P*(x) / Q*(x) of one round, at x of any shape in units of C; it rises in x."""
    log_q, log_rest = _logs(part.sample_rate)
    variance = part.noise_multiplier**2
    up, down = (log_q + (sign * x - 0.5) / variance for sign in (1.0, -1.0))
    return np.logaddexp(log_rest, up) - np.logaddexp(log_rest, down)


def _largest(part: SubsampledGaussianEvent) -> float:
    """The loss of a round beyond which is e^-_TAIL of the probability at most."""
    reach = -float(special.ndtri(math.exp(-_TAIL)))
    return float(round_loss(np.array([1.0 + reach * part.noise_multiplier]), part)[0])


def _variance(part: SubsampledGaussianEvent) -> float:
    """Of the loss of one round, under P*."""
    z = np.linspace(-10.0, 10.0, 2001)
    density = np.exp(-z * z / 2.0)
    density /= density.sum()
    q = part.sample_rate
    drawn, not_drawn = (round_loss(c + part.noise_multiplier * z, part) for c in (1.0, 0.0))
    mean, square = (
        float(density @ (q * drawn**power + (1.0 - q) * not_drawn**power)) for power in (1, 2)
    )
    return max(square - mean * mean, 0.0)


@functools.lru_cache(maxsize=32)
def _losses(parts: tuple[SubsampledGaussianEvent, ...], grid: int) -> Any:
    """The privacy loss distribution of all rounds, from above; of P* and Q*, which are alike."""
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution  # it takes a second

    rounds = sum(part.rounds for part in parts)
    spread = math.sqrt(sum(part.rounds * _variance(part) for part in parts))
    largest = [_largest(part) for part in parts]
    step = max(
        spread / math.sqrt(rounds) / grid,
        40.0 * spread / _MOST_STEPS,
        2.0 * max(largest) / _MOST_STEPS,
        _LEAST_STEP,
    )
    together = None
    for part, most in zip(parts, largest, strict=True):
        last = math.ceil(most / step)
        values = hockey_sticks(
            step * np.arange(-last, last + 1, dtype=np.float64),
            noise_multiplier=part.noise_multiplier,
            sample_rate=part.sample_rate,
        )
        one = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(step, -last, last, values)
        made = privacy_loss_distribution.PrivacyLossDistribution(one)
        if part.rounds > 1:
            made = made.self_compose(part.rounds)
        together = made if together is None else together.compose(made)
    return together
