"""From a run configuration to what is released, and with which noise."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.accountant import epsilon_bound, epsilon_spent
from fedpdm.privacy.calibration import calibrate_t0
from fedpdm.privacy.mechanism import (
    NoiseSource,
    SeededNoise,
    SystemNoise,
    release_event,
    release_parameters,
)
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.rng import Purpose, seed_sequence

__all__ = ["ReleasePlan", "build_noise", "build_release_plan", "build_release_request"]


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """How each client's images are to be released; of a baseline that releases none, t0 is T."""

    t0: int
    clip_norm: float
    shift: float
    epsilon_exact: float
    epsilon_paper: float


def build_release_plan(config: RunConfig, schedule: NoiseSchedule, spec: ImageSpec) -> ReleasePlan:
    """t0 from the budget, or the budget from t0."""
    section = config.privacy
    if not config.kind.releases:
        t0 = schedule.num_steps
    elif section.t0 is not None:
        t0 = section.t0
    else:
        assert section.epsilon is not None
        t0 = calibrate_t0(
            schedule,
            clip_norm=section.clip_norm,
            epsilon=section.epsilon,
            delta=section.delta,
            accounting=section.accounting,
            max_t0=schedule.num_steps - (config.coarse.objective == "truncated"),
        )
    truncated = config.kind.releases and config.coarse.objective == "truncated"
    if truncated and t0 >= schedule.num_steps:
        raise ConfigError(
            f"coarse.objective: truncated needs t0 < T, got t0 = T = {t0}; lower "
            "privacy.clip_norm, raise privacy.epsilon, or use noise_to_noise"
        )
    event = release_event(schedule, t0=t0, clip_norm=section.clip_norm)
    return ReleasePlan(
        t0=t0,
        clip_norm=section.clip_norm,
        shift=spec.shift,
        epsilon_exact=epsilon_spent([event], delta=section.delta),
        epsilon_paper=epsilon_bound(event, delta=section.delta),
    )


def build_noise(config: RunConfig, *, client: int, release: int) -> NoiseSource:
    """Seeded noise in simulation, operating-system noise everywhere else.

    The seeded stream is the client's and the release's own: no two releases share noise.
    """
    if config.run.simulation:
        seed = config.run.seed
        return SeededNoise(seed_sequence(seed, Purpose.RELEASE_NOISE, client=client, chunk=release))
    return SystemNoise()


def build_release_request(
    config: RunConfig,
    schedule: NoiseSchedule,
    plan: ReleasePlan,
    *,
    client: int,
    allow_new_release: bool,
) -> ReleaseRequest:
    """What a client of this run asks of its release store."""
    return ReleaseRequest(
        client_id=client,
        parameters=release_parameters(
            schedule, t0=plan.t0, clip_norm=plan.clip_norm, shift=plan.shift
        ),
        delta=config.privacy.delta,
        noise=lambda release: build_noise(config, client=client, release=release),
        simulation=config.run.simulation,
        allow_new_release=allow_new_release,
    )
