"""What a run's configuration means, worked out once and passed on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.spec import ImageSpec, build_image_spec
from fedpdm.diffusion.schedule import NoiseSchedule, make_schedule
from fedpdm.privacy.planning import ReleasePlan, build_release_plan, build_release_request
from fedpdm.privacy.releases import ReleaseRequest

__all__ = ["RunSetup", "build_schedule", "check_rounds", "set_up", "set_up_for"]

HANDOVER = 0.15  # of T, with class statistics
LOWEST, HIGHEST = 0.10, 0.30  # of T: what a network above the hand-over is trained for


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """A run's configuration, the shape of its images, its noise schedule and what is released.

    `set_up` makes one from a config and the images at hand, `set_up_for` from their shape.
    """

    config: RunConfig
    spec: ImageSpec
    schedule: NoiseSchedule
    plan: ReleasePlan | None

    @property
    def release_plan(self) -> ReleasePlan:
        """What is released; `ConfigError` for a baseline, which releases nothing (`plan` None)."""
        if self.plan is None:
            coarse = self.config.coarse
            raise ConfigError(
                f"coarse: images {coarse.images}, training {coarse.training} releases nothing; "
                "must be released, and trained somewhere"
            )
        return self.plan

    @property
    def has_gaussians(self) -> bool:
        """Whether the shared model has class Gaussians, computed and not trained."""
        return self.plan is not None and self.plan.is_statistics

    @property
    def has_network(self) -> bool:
        """Whether a network is trained above the hand-over, beside these Gaussians."""
        return self.plan is not None and self.plan.gradients is not None

    @property
    def network_levels(self) -> tuple[int, int]:
        """The least and the greatest t that this network is trained for."""
        section, T = self.config.network, self.schedule.num_steps
        low = section.lowest_t or min(self.handover, max(1, round(LOWEST * T)))
        high = max(1, round(HIGHEST * T))
        return low, section.highest_t or (high if high > max(low, self.handover) else T)

    @property
    def handover(self) -> int:
        """The t at and under which the fine model answers: T without a release, t0 of released
        images; with class statistics as configured, 0.15 T where each client chooses."""
        T = self.schedule.num_steps
        if self.plan is None:
            return T
        if self.plan.is_statistics:
            return self.config.sampling.handover or max(1, round(HANDOVER * T))
        return self.plan.t0

    def release_request(
        self,
        *,
        client: int,
        allow_new_release: bool,
        stage: int = 0,
        public: Mapping[str, torch.Tensor] | None = None,
    ) -> ReleaseRequest:
        """What a client of this run asks of its release store, as `build_release_request`."""
        return build_release_request(
            self.config,
            self.release_plan,
            client=client,
            allow_new_release=allow_new_release,
            stage=stage,
            public=public,
        )


def build_schedule(config: RunConfig) -> NoiseSchedule:
    """The configured noise schedule."""
    section = config.schedule
    return make_schedule(
        section.kind,
        num_steps=section.num_steps,
        beta_start=section.beta_start,
        beta_end=section.beta_end,
    )


def check_rounds(config: RunConfig) -> None:
    """`ConfigError` for a run with fewer rounds than its clients release in.

    Before anything is released: all images pay for all rounds of a network. An experiment's config
    may have fewer, where the shared model comes from a run of its own.
    """
    least, rounds = config.least_rounds, config.run.rounds
    if config.has_network and rounds < least:
        raise ConfigError(
            f"run.rounds: must be at least {least} with privacy.release: network "
            f"({least - config.network.rounds} of class statistics, network.rounds = "
            f"{config.network.rounds}), got {rounds}"
        )


def set_up(config: RunConfig, images: ImageSet | None = None) -> RunSetup:
    """The set-up of a run on these images; without them, on the shape of the configured set.

    `ConfigError` for images that are not square and for a budget that no release keeps to.
    """
    return set_up_for(config, build_image_spec(config, images))


@functools.lru_cache(maxsize=8)
def set_up_for(config: RunConfig, spec: ImageSpec) -> RunSetup:
    """The set-up of a run on images of this shape. A process calibrates once, not per message."""
    schedule = build_schedule(config)
    plan = build_release_plan(config, schedule, spec)
    return RunSetup(config=config, spec=spec, schedule=schedule, plan=plan)
