"""What a release of noised images costs: from settings and records to its privacy event.

With sigma^2 = (1 - abar_t0) / abar_t0 the noise in units of the clean image, a release that clips
to C is the Gaussian mechanism with noise multiplier sigma / (2 C) (docs/method.md section 2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.types import GaussianEvent, ReleaseParameters

__all__ = [
    "check_parameters",
    "implied_event",
    "noise_multiplier",
    "release_event",
    "release_parameters",
    "same_release",
]

LARGEST_BOUND = 1 << 23  # clip norm in grid steps; with the noise, sums stay whole in float32
Number = TypeVar("Number", float, np.ndarray)


def noise_multiplier(sigma: Number, *, clip_norm: float) -> Number:
    """sigma / (2 C): replacing an image moves what is noised by at most 2 C."""
    return sigma / (2.0 * clip_norm)


def release_event(schedule: NoiseSchedule, *, t0: int, clip_norm: float) -> GaussianEvent:
    """The privacy event of one release at `t0`.

    t0 = 0 adds no noise: multiplier 0, infinite epsilon.
    """
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    sigma = schedule.noise_to_signal(t0)
    return GaussianEvent(noise_multiplier=noise_multiplier(sigma, clip_norm=clip_norm))


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


def check_parameters(parameters: ReleaseParameters) -> None:
    """`ValueError` with one line for parameters that no release can have."""
    abar = parameters.alpha_bar
    if not 0.0 < abar < 1.0 or not 0.0 < parameters.clip_norm < math.inf:
        raise ValueError(
            f"alpha_bar must be in (0, 1) and clip_norm positive and finite, "
            f"got {abar} and {parameters.clip_norm}"
        )
    if not 1 <= parameters.t0 <= parameters.num_steps or not math.isfinite(parameters.shift):
        raise ValueError(
            f"t0 must be in [1, {parameters.num_steps}] and shift finite, "
            f"got {parameters.t0} and {parameters.shift}"
        )
    if parameters.grid < 1:
        raise ValueError(f"grid must be at least 1, got {parameters.grid}")


def implied_event(parameters: ReleaseParameters) -> GaussianEvent:
    """The privacy event that follows from recorded parameters."""
    sigma = parameters.sigma
    return GaussianEvent(noise_multiplier=noise_multiplier(sigma, clip_norm=parameters.clip_norm))


def same_release(a: ReleaseParameters, b: ReleaseParameters) -> bool:
    """Whether two releases were made with the same settings (machines may round alpha_bar)."""
    close = math.isclose(a.alpha_bar, b.alpha_bar, rel_tol=1e-9)
    return close and replace(a, alpha_bar=b.alpha_bar) == b
