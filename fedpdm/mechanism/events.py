"""What a release costs: from settings to its privacy event, and back to the smallest t0.

With sigma^2 = (1 - abar_t0) / abar_t0 the noise in units of the clean image, a release that clips
to C is the Gaussian mechanism with noise multiplier sigma / (2 C) (docs/method.md section 2).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fedpdm.accountant import epsilon_bound, epsilon_spent, multiplier_for, multiplier_for_bound
from fedpdm.noise import GRID
from fedpdm.schedule import NoiseSchedule
from fedpdm.types import GaussianEvent, ReleaseParameters

__all__ = ["calibrate_t0", "implied_event", "release_event", "release_parameters", "same_release"]

LARGEST_BOUND = 1 << 23  # clip norm in grid steps; with the noise, sums stay whole in float32


def release_event(schedule: NoiseSchedule, *, t0: int, clip_norm: float) -> GaussianEvent:
    """The privacy event of one release at `t0`: noise multiplier sigma / (2 C).

    t0 = 0 adds no noise: multiplier 0, infinite epsilon.
    """
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    return GaussianEvent(noise_multiplier=schedule.noise_to_signal(t0) / (2.0 * clip_norm))


def release_parameters(
    schedule: NoiseSchedule, *, t0: int, clip_norm: float, shift: float
) -> ReleaseParameters:
    """What a release with these settings records. `ValueError` for a setting out of range."""
    if not 1 <= t0 <= schedule.num_steps:
        raise ValueError(f"t0 must be in [1, {schedule.num_steps}], got {t0}")
    if not -1.0 <= shift <= 1.0:
        raise ValueError(f"shift must be in [-1, 1], got {shift}")
    release_event(schedule, t0=t0, clip_norm=clip_norm)
    if clip_norm * GRID > LARGEST_BOUND * schedule.noise_to_signal(t0):
        raise ValueError(
            f"clip_norm must be at most {LARGEST_BOUND // GRID} sigma = "
            f"{LARGEST_BOUND / GRID * schedule.noise_to_signal(t0):.4g} at t0 = {t0}, "
            f"got {clip_norm:g}: next to no noise"
        )
    return ReleaseParameters(
        t0=t0,
        clip_norm=float(clip_norm),
        shift=float(shift),
        schedule=schedule.kind,
        num_steps=schedule.num_steps,
        alpha_bar=schedule.alpha_bar(t0),
        grid=GRID,
    )


def implied_event(parameters: ReleaseParameters) -> GaussianEvent:
    """The privacy event that follows from recorded parameters."""
    abar = parameters.alpha_bar
    return GaussianEvent(
        noise_multiplier=math.sqrt((1.0 - abar) / abar) / (2.0 * parameters.clip_norm)
    )


def same_release(a: ReleaseParameters, b: ReleaseParameters) -> bool:
    """Whether two releases were made with the same settings (machines may round alpha_bar)."""
    close = math.isclose(a.alpha_bar, b.alpha_bar, rel_tol=1e-9)
    return close and replace(a, alpha_bar=b.alpha_bar) == b


def calibrate_t0(
    schedule: NoiseSchedule,
    *,
    clip_norm: float,
    epsilon: float,
    delta: float,
    accounting: str = "exact",
) -> int:
    """Smallest t0 in [1, T] whose release costs at most `epsilon` at `delta`.

    `accounting` is `exact` (analytic Gaussian) or `paper` (Theorem 5.1's bound). `ValueError`
    naming the best reachable epsilon if even t0 = T is not noisy enough.
    """
    if accounting not in ("exact", "paper"):
        raise ValueError(f"privacy.accounting must be exact or paper, got {accounting!r}")
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    exact = accounting == "exact"
    needed = (multiplier_for if exact else multiplier_for_bound)(epsilon=epsilon, delta=delta)
    abar = schedule.alphas_cumprod[1:]
    multipliers = np.sqrt((1.0 - abar) / abar) / (2.0 * clip_norm)
    reached = np.flatnonzero(multipliers >= needed)
    if len(reached) == 0:
        last = GaussianEvent(noise_multiplier=float(multipliers[-1]))
        best = epsilon_spent([last], delta=delta) if exact else epsilon_bound(last, delta=delta)
        largest_clip = clip_norm * float(multipliers[-1]) / needed
        unit = 10.0 ** (math.floor(math.log10(largest_clip)) - 3)  # round the advice down
        largest_clip = math.floor(largest_clip / unit) * unit
        raise ValueError(
            f"privacy.epsilon {epsilon:g} cannot be reached with clip_norm {clip_norm:g}: "
            f"t0 = {schedule.num_steps} gives {best:.4g}; lower clip_norm to {largest_clip:.4g} "
            "or less, or raise epsilon"
        )
    return int(reached[0]) + 1
