"""What a configuration names: objectives, loss weights and U-Nets, built in or custom."""

from __future__ import annotations

from fedpdm.config import RunConfig
from fedpdm.config.plugins import find, load_kind
from fedpdm.data import data_set
from fedpdm.diffusion.names import OBJECTIVES
from fedpdm.diffusion.objectives import CoarseObjective
from fedpdm.diffusion.presets import PRESETS, Preset
from fedpdm.diffusion.weightings import WEIGHTINGS, Weighting

__all__ = ["check_chosen", "find_objective", "find_preset", "find_weighting"]


def find_preset(config: RunConfig, role: str) -> Preset:
    """The U-Net of the coarse or fine model: a preset by name, or a custom one."""
    name = config.coarse.preset if role == "coarse" else config.fine.preset
    return find(name, PRESETS, Preset, key=f"{role}.preset")


def find_weighting(config: RunConfig, role: str) -> Weighting:
    """The loss weight of the coarse or fine model: one by name, or a custom one."""
    name = config.coarse.weighting if role == "coarse" else config.fine.weighting
    return find(name, WEIGHTINGS, Weighting, key=f"{role}.weighting")


def find_objective(config: RunConfig) -> CoarseObjective:
    """How the shared model is trained on releases."""
    name = config.coarse.objective
    return load_kind(OBJECTIVES.get(name, name), CoarseObjective, key="coarse.objective")


def check_chosen(config: RunConfig) -> None:
    """`ConfigError`, one line, for custom code that is not there or is of another kind."""
    data_set(config.data.name)
    find_objective(config)
    for role in ("coarse", "fine"):
        find_preset(config, role)
        find_weighting(config, role)
