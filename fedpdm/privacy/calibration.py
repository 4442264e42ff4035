"""Choosing a release: any two of epsilon, t0 and clip norm give the third.

With mu = 2 C / sigma (the worst-case distance of two clipped images in units of the noise), an
adversary who must tell which of two given images a release was made from has at best

    AUC = Phi(mu / sqrt(2)),    TPR at FPR f = Phi(Phi^-1(f) + mu)

(Neyman and Pearson; docs/method.md section 2). Replacing k images of one person, or K releases
of one image, is the same test with mu sqrt(k K).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from statistics import NormalDist

import numpy as np

from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.accountant import (
    ACCOUNTINGS,
    Accounting,
    accounting_named,
    multiplier_for,
    repeated,
)
from fedpdm.privacy.events import noise_multiplier, release_event
from fedpdm.privacy.subsampled import subsampled_multiplier
from fedpdm.privacy.types import GaussianEvent

__all__ = [
    "ACCOUNTINGS",
    "GROUP_SIZES",
    "Calibration",
    "UnreachableEpsilonError",
    "calibrate",
    "calibrate_rounds",
    "calibrate_t0",
    "noise_per_step",
    "rounded",
]

GROUP_SIZES = (1, 2, 5, 10)  # images of one person
RELEASE_COUNTS = (1, 2, 4, 10)  # releases of one image
MAX_COUNT = 1_000_000


class UnreachableEpsilonError(ValueError):
    """No t0 is noisy enough; the message says which epsilon or clip norm would do."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A release setting and what it means.

    Attributes:
        accounting: `exact` or `paper`, by which every epsilon here but `exact_epsilon` is.
        epsilon: of all `releases` of one image at `delta` (at most the one asked for).
        exact_epsilon: the same, exact: what the setting really costs.
        t0, clip_norm, releases: noising steps, L2 bound C, releases of the same image.
        sigma: the noise of one release in units of the clean image.
        signal_to_noise: C / sigma, the norm of a clipped image over the noise per pixel.
        noise_multiplier: of all releases together, sigma / (2 C sqrt(releases)).
        linkage_auc, linkage_tpr: the best that an adversary who sees all releases can do on the
            two worst images; TPR at 1% FPR.
        group_epsilon: number of images of one person in one client -> epsilon for all of them.
        release_epsilon: number of releases of one image -> their epsilon at this t0 and C.
    """

    accounting: str
    epsilon: float
    exact_epsilon: float
    delta: float
    t0: int
    clip_norm: float
    releases: int
    sigma: float
    signal_to_noise: float
    noise_multiplier: float
    linkage_auc: float
    linkage_tpr: float
    group_epsilon: dict[int, float]
    release_epsilon: dict[int, float]

    def epsilon_at(self, delta: float) -> float:
        """Epsilon of all releases of one image at another delta."""
        return ACCOUNTINGS[self.accounting].epsilon(self._event, delta=delta)

    def delta_at(self, epsilon: float) -> float:
        """Delta of all releases of one image at another epsilon."""
        return ACCOUNTINGS[self.accounting].delta(self._event, epsilon=epsilon)

    @property
    def _event(self) -> GaussianEvent:
        return GaussianEvent(noise_multiplier=self.noise_multiplier)


def calibrate(
    schedule: NoiseSchedule,
    *,
    delta: float,
    epsilon: float | None = None,
    t0: int | None = None,
    clip_norm: float | None = None,
    accounting: str = "exact",
    releases: int = 1,
    group_sizes: Iterable[int] = GROUP_SIZES,
) -> Calibration:
    """Fill in the one of `epsilon`, `t0`, `clip_norm` that is None.

    t0 is the smallest, clip_norm the largest with which `releases` releases of the same image
    together keep to epsilon. `ValueError` unless exactly two are given, for values out of range,
    and for an epsilon that no t0 reaches.
    """
    given = {"epsilon": epsilon, "t0": t0, "clip_norm": clip_norm}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        there = ", ".join(name for name in given if name not in missing) or "none"
        raise ValueError(f"give exactly two of epsilon, t0 and clip_norm, got {there}")
    rules = accounting_named(accounting)
    sizes = tuple(dict.fromkeys(group_sizes))
    for name, count in (("releases", releases), *(("group size", size) for size in sizes)):
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"{name} must be in [1, {MAX_COUNT}], got {count}")
    if t0 is not None and not 1 <= t0 <= schedule.num_steps:
        raise ValueError(f"t0 must be in [1, {schedule.num_steps}], got {t0}")
    if t0 is None:
        assert epsilon is not None
        assert clip_norm is not None
        t0 = calibrate_t0(
            schedule,
            clip_norm=clip_norm,
            epsilon=epsilon,
            delta=delta,
            accounting=accounting,
            releases=releases,
        )
    elif clip_norm is None:
        assert epsilon is not None
        clip_norm = _largest_clip_norm(
            schedule, rules, t0=t0, epsilon=epsilon, delta=delta, releases=releases
        )
    one = release_event(schedule, t0=t0, clip_norm=clip_norm)
    total = repeated(one, releases)
    mu, sigma = 1.0 / total.noise_multiplier, schedule.noise_to_signal(t0)
    normal = NormalDist()
    counts = sorted({*RELEASE_COUNTS, releases})
    found = Calibration(
        accounting=accounting,
        epsilon=rules.epsilon(total, delta=delta),
        exact_epsilon=ACCOUNTINGS["exact"].epsilon(total, delta=delta),
        delta=delta,
        t0=t0,
        clip_norm=clip_norm,
        releases=releases,
        sigma=sigma,
        signal_to_noise=clip_norm / sigma,
        noise_multiplier=total.noise_multiplier,
        linkage_auc=normal.cdf(mu / math.sqrt(2.0)),
        linkage_tpr=normal.cdf(normal.inv_cdf(0.01) + mu),
        group_epsilon={k: rules.epsilon(repeated(total, k), delta=delta) for k in sizes},
        release_epsilon={k: rules.epsilon(repeated(one, k), delta=delta) for k in counts},
    )
    if not math.isfinite(max(*found.group_epsilon.values(), *found.release_epsilon.values())):
        raise ValueError(f"clip_norm {clip_norm:g} gives an infinite epsilon at t0 = {t0}")
    return found


def calibrate_t0(
    schedule: NoiseSchedule,
    *,
    clip_norm: float,
    epsilon: float,
    delta: float,
    accounting: str = "exact",
    releases: int = 1,
    max_t0: int | None = None,
) -> int:
    """Smallest t0 in [1, max_t0] with which `releases` releases of an image cost <= `epsilon`.

    Args:
        schedule: the noise schedule.
        clip_norm: L2 bound C.
        epsilon, delta: the budget of all releases of one image together.
        accounting: `exact` (analytic Gaussian) or `paper` (Theorem 5.1's bound).
        releases: times that the same image is noised afresh.
        max_t0: the last step that may be used; default T.

    Raises:
        UnreachableEpsilonError: if even max_t0 is not noisy enough: the line names the least
            epsilon within reach, and the largest clip_norm and its t0.
        ValueError: for values out of range.
    """
    rules = accounting_named(accounting)
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    last = schedule.num_steps if max_t0 is None else max_t0
    if not 1 <= last <= schedule.num_steps:
        raise ValueError(f"max_t0 must be in [1, {schedule.num_steps}], got {last}")
    needed = rules.multiplier(epsilon=epsilon, delta=delta)
    abar = schedule.alphas_cumprod[1 : last + 1]
    sigmas = np.sqrt((1.0 - abar) / abar)
    multipliers = noise_multiplier(sigmas, clip_norm=clip_norm) / math.sqrt(releases)
    reached = np.flatnonzero(multipliers >= needed)
    if len(reached):
        return int(reached[0]) + 1
    most = float(multipliers[-1])
    least = rules.epsilon(GaussianEvent(noise_multiplier=most), delta=delta)
    of_all = f" and {releases} releases of the same image" if releases > 1 else ""
    raise UnreachableEpsilonError(
        f"privacy.epsilon {epsilon:g} cannot be reached with clip_norm {clip_norm:g}{of_all}: at "
        f"the last step, t0 = {last}, raise epsilon to {rounded(least, ROUND_CEILING)} or lower "
        f"clip_norm to {rounded(clip_norm * most / needed, ROUND_FLOOR)} ({accounting} accounting)"
    )


def calibrate_rounds(
    *, epsilon: float, delta: float, sample_rate: float, rounds: int, share: float = 0.0
) -> float:
    """Noise over C with which sums over Poisson samples keep to (epsilon, delta).

    Gaussian mechanisms on the same images keep `share`, in [0, 1), of mu^2 of the budget; with 0
    there are none. The rest is as in `fedpdm.privacy.subsampled.subsampled_multiplier`.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be in [0, 1), got {share}")
    return subsampled_multiplier(
        epsilon=epsilon,
        delta=delta,
        sample_rate=sample_rate,
        rounds=rounds,
        mu=math.sqrt(share) / multiplier_for(epsilon=epsilon, delta=delta),
    )


def noise_per_step(
    multiplier: float, *, sample_rate: float, images: int, clients: int, parameters: int
) -> float:
    """Norm of the noise in the mean of clipped gradients, over C: sqrt(M d) sigma / (C q N).

    N = `clients` * `images` images, of each client `images`; each of the M clients adds noise of
    its own to each of d `parameters`. `multiplier` is sigma / C.
    """
    return multiplier * math.sqrt(clients * parameters) / (sample_rate * images * clients)


def _largest_clip_norm(
    schedule: NoiseSchedule,
    rules: Accounting,
    *,
    t0: int,
    epsilon: float,
    delta: float,
    releases: int,
) -> float:
    """The largest C that keeps to epsilon at t0; rounding errs low."""
    needed = rules.multiplier(epsilon=epsilon, delta=delta)
    largest = schedule.noise_to_signal(t0) / (2.0 * needed) / math.sqrt(releases)
    clip_norm, step = largest, 2.0**-52
    while True:
        event = repeated(release_event(schedule, t0=t0, clip_norm=clip_norm), releases)
        if rules.epsilon(event, delta=delta) <= epsilon:
            return clip_norm
        clip_norm = largest * (1.0 - step)
        step *= 2.0


def rounded(value: float, rounding: str, *, digits: int = 4) -> str:
    """Significant digits, by a rounding mode of `decimal`, so that what is printed holds."""
    number = Context(prec=digits, rounding=rounding).create_decimal(Decimal(value))
    return f"{float(number):.{digits}g}"
