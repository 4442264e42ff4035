"""From a run configuration to what is released, and with which noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedpdm.config import ConfigError, RunConfig, run_digest
from fedpdm.data.loading import preparation_of
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.accountant import compose, epsilon_bound, epsilon_spent, has_bound
from fedpdm.privacy.dpsgd.randomness import Draws, SeededDraws, SystemDraws
from fedpdm.privacy.mechanism import (
    GradientParameters,
    NoiseSource,
    ReleaseMechanism,
    SeededNoise,
    StatisticsParameters,
    SystemNoise,
    event_of,
    group_event_of,
    mechanism_named,
    mechanism_of,
)
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.privacy.types import Parameters, PrivacyEvent, ReleaseParameters
from fedpdm.rng import Purpose, seed_sequence, torch_generator

__all__ = [
    "ReleasePlan",
    "build_gradient_noise",
    "build_noise",
    "build_release_plan",
    "build_release_request",
    "build_samples",
    "plan_release",
]


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """What each client of a run releases, and what that costs an image.

    `rounds` are the parameters of each round in which clients release (of a network's rounds the
    last, for all of them), `event` all of them together. `epsilon_paper` is the paper's bound, None
    where it does not apply.
    """

    rounds: tuple[Parameters, ...]
    event: PrivacyEvent
    epsilon_exact: float
    epsilon_paper: float | None

    def group_event(self, count: int) -> PrivacyEvent:
        """At most what all rounds cost `count` of a client's images that are replaced together."""
        return group_event_of([(each, event_of(each)) for each in self.rounds], count)

    @property
    def mechanism(self) -> ReleaseMechanism[Any]:
        """Which makes the releases."""
        return mechanism_of(self.rounds[0])

    @property
    def is_statistics(self) -> bool:
        """Whether clients release class statistics, of which the server computes Gaussians."""
        return isinstance(self.rounds[0], StatisticsParameters)

    @property
    def sums(self) -> tuple[StatisticsParameters, ...]:
        """The rounds of class statistics."""
        return tuple(each for each in self.rounds if isinstance(each, StatisticsParameters))

    @property
    def gradients(self) -> GradientParameters | None:
        """The rounds of a network's gradients, after those of statistics; None where there are
        none."""
        last = self.rounds[-1]
        return last if isinstance(last, GradientParameters) else None

    def sample_warning(self, images: int | None) -> str:
        """Why a network's rounds are noise alone for a client with at most so many images, in a
        line; empty if they are not, or the number is not known."""
        plan = self.gradients
        if plan is None or images is None or plan.sample_rate * images >= 1.0:
            return ""
        return (
            f"{plan.sample_rate:g} draws {plan.sample_rate * images:.2g} of a client's {images:,} "
            "images a round, on average; most of its rounds are noise alone"
        )

    @property
    def images(self) -> ReleaseParameters:
        """What released images are made with; `ConfigError` if the mechanism releases none."""
        first = self.rounds[0]
        if not isinstance(first, ReleaseParameters):
            raise ConfigError(
                f"privacy.release: mechanism {first.mechanism} releases no images that a coarse "
                "model can be trained on"
            )
        return first

    @property
    def t0(self) -> int:
        """Noising steps of released images."""
        return self.images.t0

    @property
    def clip_norm(self) -> float:
        """L2 bound on a released image before noising."""
        return self.images.clip_norm

    @property
    def shift(self) -> float:
        """The public constant that is subtracted from images."""
        return self.images.shift


def build_release_plan(
    config: RunConfig, schedule: NoiseSchedule, spec: ImageSpec
) -> ReleasePlan | None:
    """What a run on these images releases; None for a baseline, which releases nothing.

    `ConfigError` or `ValueError` for a mechanism that there is not, a budget that it cannot keep,
    and a cost that the accountant cannot read.
    """
    if not config.kind.releases:
        return None
    return plan_release(config, schedule, shift=spec.shift, num_classes=spec.num_classes)


def plan_release(
    config: RunConfig, schedule: NoiseSchedule, *, shift: float = 0.0, num_classes: int = 1
) -> ReleasePlan:
    """The plan of a run that releases. What it costs does not depend on the images, so for that
    alone the shift and the number of classes can be left out."""
    mechanism, delta = mechanism_named(config.privacy.release), config.privacy.delta
    rounds = mechanism.plan(config, schedule, shift=shift, num_classes=num_classes)
    events = [event_of(parameters) for parameters in rounds]
    event = events[0] if len(events) == 1 else compose(events)
    return ReleasePlan(
        rounds=rounds,
        event=event,
        epsilon_exact=epsilon_spent(events, delta=delta),
        epsilon_paper=epsilon_bound(event, delta=delta) if has_bound(event) else None,
    )


def build_noise(config: RunConfig, *, client: int, release: int) -> NoiseSource:
    """Seeded noise in simulation, operating-system noise everywhere else.

    The seeded stream is the client's, the release's and the draw's (`privacy.noise_draw`) own: no
    two releases share noise.
    """
    if config.run.simulation:
        stream = seed_sequence(
            config.run.seed, Purpose.RELEASE_NOISE, client=client,
            round=config.privacy.noise_draw, chunk=release,
        )  # fmt: skip
        return SeededNoise(stream)
    return SystemNoise()


def build_gradient_noise(config: RunConfig, *, client: int, number: int) -> NoiseSource:
    """The noise of round `number` of a network's plan. In simulation its seeded stream is the
    client's, the round's and the run's own: no two plans share noise."""
    if config.run.simulation:
        key = _of_round(config, client=client, number=number)
        return SeededNoise(seed_sequence(config.run.seed, Purpose.GRADIENT_NOISE, **key))
    return SystemNoise()


def build_samples(config: RunConfig, *, client: int, number: int) -> Draws:
    """Who is drawn in this round: the operating system's secret outside simulation."""
    if config.run.simulation:
        key = _of_round(config, client=client, number=number)
        return SeededDraws(torch_generator(config.run.seed, Purpose.GRADIENT_SAMPLES, **key))
    return SystemDraws(torch.device("cpu"))


def _of_round(config: RunConfig, *, client: int, number: int) -> dict[str, Any]:
    """What tells a round's streams from those of others, of other plans and draws too."""
    return {"client": client, "round": number, "chunk": int(run_digest(config), 16)}


def build_release_request(
    config: RunConfig,
    plan: ReleasePlan,
    *,
    client: int,
    allow_new_release: bool,
    stage: int = 0,
    public: Mapping[str, torch.Tensor] | None = None,
) -> ReleaseRequest:
    """What a client of this run asks of its release store.

    `stage` counts the rounds of the plan from 0, `public` is what the server made of earlier ones.
    """
    return ReleaseRequest(
        client_id=client,
        parameters=plan.rounds[stage],
        public=public or {},
        planned=plan.rounds,
        delta=config.privacy.delta,
        noise=lambda release: build_noise(config, client=client, release=release),
        simulation=config.run.simulation,
        allow_new_release=allow_new_release,
        preparation=preparation_of(config),
    )
