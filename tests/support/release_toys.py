"""Small image sets, release settings and what they cost by arithmetic of another origin."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from fedpdm.data import ImageSet
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.events import release_parameters
from fedpdm.privacy.mechanism import NoiseSource, SeededNoise, SystemNoise
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.privacy.types import ReleaseParameters

DELTA = 1e-5
T0, CLIP_NORM = 675, 3.0


def image_set(count: int, *, seed: int = 0, side: int = 4, labels: int = 3) -> ImageSet:
    """Distinct random grey images; the same seed and a larger count begins with the same ones."""
    rng = np.random.default_rng(seed)
    return ImageSet(
        images=rng.integers(0, 256, (count, 1, side, side), dtype=np.uint8),
        labels=np.arange(count, dtype=np.int64) % labels,
        class_names=tuple("abcdefgh"[:labels]),
        background=0.0,
    )


def settings(
    *,
    t0: int = T0,
    clip_norm: float = CLIP_NORM,
    shift: float = 0.0,
    schedule: str = "linear",
    num_steps: int = 1000,
) -> ReleaseParameters:
    chain = make_schedule(schedule, num_steps=num_steps)
    return release_parameters(chain, t0=t0, clip_norm=clip_norm, shift=shift)


def request(
    *,
    client: int = 3,
    seed: int = 0,
    simulation: bool = True,
    allow: bool = False,
    delta: float = DELTA,
    noise: Callable[[int], NoiseSource] | None = None,
    **changes: Any,
) -> ReleaseRequest:
    """What `fedpdm.setup.build.build_release_request` asks for, with settings replaced."""

    def seeded(release: int) -> NoiseSource:
        return SeededNoise(np.random.SeedSequence(seed, spawn_key=(client, release)))

    return ReleaseRequest(
        client_id=client,
        parameters=settings(**changes),
        delta=delta,
        noise=noise or (seeded if simulation else lambda _: SystemNoise()),
        simulation=simulation,
        allow_new_release=allow,
    )


def multiplier(
    *,
    t0: int = T0,
    clip_norm: float = CLIP_NORM,
    shift: float = 0.0,
    schedule: str = "linear",
    num_steps: int = 1000,
) -> float:
    """sigma / (2 C) from the schedule's definition; the shift costs nothing."""
    if schedule == "linear":
        log_abar = sum(math.log1p(-(1e-4 + (0.02 - 1e-4) * t / (num_steps - 1))) for t in range(t0))
        abar = math.exp(log_abar)
    else:
        angle, first = ((t / num_steps + 0.008) / 1.008 * math.pi / 2 for t in (t0, 0))
        abar = (math.cos(angle) / math.cos(first)) ** {"cosine": 1, "squared_cosine": 2}[schedule]
    return math.sqrt((1 - abar) / abar) / (2 * clip_norm)


def epsilon_of(multipliers: Sequence[float], *, delta: float = DELTA) -> float:
    """The analytic Gaussian mechanism (Balle and Wang 2018) at the composed mu, by scipy alone."""
    mu = math.sqrt(sum(m**-2 for m in multipliers))

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        second = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
        return float(first - second) - delta

    return float(optimize.brentq(excess, 0.0, 500.0, xtol=1e-12))


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file by an edited copy, as an editor does."""
    other = path.with_name("edited")
    other.write_bytes(change(path.read_bytes()))
    os.replace(other, path)
