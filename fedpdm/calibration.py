"""Choosing a release: any two of epsilon, t0 and clip norm give the third.

With mu = 2 C / sigma (the worst-case distance of two clipped images in units of the noise), an
adversary who must tell which of two given images a release was made from has at best

    AUC = Phi(mu / sqrt(2)),    TPR at FPR f = Phi(Phi^-1(f) + mu)

(Neyman and Pearson; docs/method.md section 2). Replacing k images of one person, or k releases
of one image, is the same test with mu sqrt(k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from fedpdm.accountant import epsilon_bound, epsilon_spent, multiplier_for, multiplier_for_bound
from fedpdm.mechanism import calibrate_t0, release_event
from fedpdm.schedule import NoiseSchedule
from fedpdm.types import GaussianEvent

__all__ = ["ACCOUNTINGS", "Calibration", "calibrate"]

ACCOUNTINGS = ("exact", "paper")
GROUP_SIZES = (1, 2, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A release setting and what it means.

    `epsilon` is that of `accounting` at `delta` (at most the one asked for); `sigma` the noise in
    units of the clean image; `signal_to_noise` is C / sigma, the norm of a clipped image over the
    noise per pixel; `linkage_auc` and `linkage_tpr` (at 1% FPR) are the best that an adversary
    can do on the two worst images; `group_epsilon` maps k to the exact epsilon for k images of
    one person, or k releases of one image.
    """

    accounting: str
    epsilon: float
    delta: float
    t0: int
    clip_norm: float
    sigma: float
    signal_to_noise: float
    linkage_auc: float
    linkage_tpr: float
    group_epsilon: dict[int, float]


def calibrate(
    schedule: NoiseSchedule,
    *,
    delta: float,
    epsilon: float | None = None,
    t0: int | None = None,
    clip_norm: float | None = None,
    accounting: str = "exact",
) -> Calibration:
    """Fill in the one of `epsilon`, `t0`, `clip_norm` that is None.

    t0 is the smallest, clip_norm the largest that keeps to epsilon. `ValueError` unless exactly
    two are given, for values out of range, and for an epsilon that no t0 reaches.
    """
    given = {"epsilon": epsilon, "t0": t0, "clip_norm": clip_norm}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        there = ", ".join(name for name in given if name not in missing) or "none"
        raise ValueError(f"give exactly two of epsilon, t0 and clip_norm, got {there}")
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting must be exact or paper, got {accounting!r}")
    if t0 is not None and not 1 <= t0 <= schedule.num_steps:
        raise ValueError(f"t0 must be in [1, {schedule.num_steps}], got {t0}")
    if t0 is None:
        assert epsilon is not None
        assert clip_norm is not None
        t0 = calibrate_t0(
            schedule, clip_norm=clip_norm, epsilon=epsilon, delta=delta, accounting=accounting
        )
    elif clip_norm is None:
        assert epsilon is not None
        needed = multiplier_for if accounting == "exact" else multiplier_for_bound
        clip_norm = schedule.noise_to_signal(t0) / (2.0 * needed(epsilon=epsilon, delta=delta))
    event = release_event(schedule, t0=t0, clip_norm=clip_norm)
    spent = (
        epsilon_spent([event], delta=delta)
        if accounting == "exact"
        else epsilon_bound(event, delta=delta)
    )
    return _describe(
        event, schedule, t0=t0, clip_norm=clip_norm, epsilon=spent, delta=delta, name=accounting
    )


def _describe(
    event: GaussianEvent,
    schedule: NoiseSchedule,
    *,
    t0: int,
    clip_norm: float,
    epsilon: float,
    delta: float,
    name: str,
) -> Calibration:
    normal, sigma = NormalDist(), schedule.noise_to_signal(t0)
    mu = 1.0 / event.noise_multiplier
    return Calibration(
        accounting=name,
        epsilon=epsilon,
        delta=delta,
        t0=t0,
        clip_norm=clip_norm,
        sigma=sigma,
        signal_to_noise=clip_norm / sigma,
        linkage_auc=normal.cdf(mu / math.sqrt(2.0)),
        linkage_tpr=normal.cdf(normal.inv_cdf(0.01) + mu),
        group_epsilon={k: epsilon_spent([event] * k, delta=delta) for k in GROUP_SIZES},
    )
