"""Names of the choices in this room, free of torch, so that a configuration is read without it.

U-Nets are in `presets`, loss weights in `weightings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["DECAYS", "OBJECTIVES", "PRECISIONS", "PREDICTIONS", "SCHEDULE_KINDS", "TIMESTEPS"]

#: Noise schedules (`schedule.make_schedule`).
SCHEDULE_KINDS: Final = ("linear", "cosine", "squared_cosine")
#: What a network's output is (`denoisers.Denoiser`).
PREDICTIONS: Final = ("sample", "epsilon", "v")
#: Coarse objective -> where it is defined, an `objectives.CoarseObjective`.
OBJECTIVES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "truncated": "fedpdm.diffusion.objectives:TRUNCATED",
        "noise_to_noise": "fedpdm.diffusion.objectives:NOISE_TO_NOISE",
    }
)
#: How often each t is trained at (`objectives.draw_timesteps`).
TIMESTEPS: Final = ("uniform", "logit_normal")
#: Learning rate after warm-up, and the number format of steps (`training.OptimizerSettings`).
DECAYS: Final = ("constant", "cosine")
PRECISIONS: Final = ("auto", "float32", "bfloat16")
