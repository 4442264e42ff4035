"""Class sums for their attacks: configs, plans, and sums by the mechanism itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fedpdm.attacks.sum_canaries import SumView
from fedpdm.config import RunConfig
from fedpdm.data import ImageSet
from fedpdm.engines.one_client import attack_config
from fedpdm.privacy.mechanism import (
    ClassStatistics,
    ReleasedStatistics,
    ReleaseSource,
    SeededNoise,
    StatisticsParameters,
)
from fedpdm.setup.run_setup import set_up

__all__ = ["config_of", "made", "planned_of", "view_of"]


def config_of(
    shape: tuple[int, int, int], *, epsilon: float = 10.0, clip_norm: float = 6.0
) -> RunConfig:
    return attack_config(
        epsilon=epsilon, t0=None, delta=1e-5, clip_norm=clip_norm, shift=0.0, schedule="linear",
        num_steps=1000, seed=0, statistics_of=math.prod(shape),
    )  # fmt: skip


def planned_of(config: RunConfig, images: ImageSet) -> tuple[StatisticsParameters, ...]:
    rounds = set_up(config, images).release_plan.rounds
    assert all(isinstance(each, StatisticsParameters) for each in rounds)
    return rounds  # type: ignore[return-value]


def view_of(parameters: StatisticsParameters, shape: tuple[int, int, int], public: Any) -> SumView:
    """A sum of nothing, to ask what images would add to it."""
    layout = ClassStatistics().layout(parameters, 1, shape)
    kinds = {"I64": torch.int64, "F32": torch.float32}
    tensors = {n: torch.zeros((1, *s), dtype=kinds[k]) for n, (k, s) in layout.items()}
    if parameters.stage == "classes":
        tensors["directions"][0] = public["directions"]
    empty = ClassStatistics().restore(
        tensors, parameters=parameters, event=ClassStatistics().event(parameters),
        noise_source="", seeded=True, check_values=False,
    )  # fmt: skip
    return SumView(empty, public)


def made(given: ReleaseSource, parameters: StatisticsParameters, seed: int) -> ReleasedStatistics:
    mechanism, noise = ClassStatistics(), SeededNoise(np.random.SeedSequence(seed))
    parts = [torch.from_numpy(a.copy())[None] for a in mechanism.make(given, parameters, noise)]
    return mechanism.restore(
        dict(zip(mechanism.names, parts, strict=True)), parameters=parameters,
        event=mechanism.event(parameters), noise_source="", seeded=True, check_values=True,
    )  # fmt: skip
