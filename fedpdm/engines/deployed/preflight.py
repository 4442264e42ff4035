"""Checks before a deployed run is submitted; the nodes check their own side."""

from __future__ import annotations

from pathlib import Path

from fedpdm.config import ConfigError, RunConfig
from fedpdm.engines.run_checks import check_models, check_place
from fedpdm.setup.run_setup import set_up

__all__ = ["check_deployed_run"]


def check_deployed_run(config: RunConfig, out: Path, *, resume: bool) -> list[str]:
    """Calibrate and build the models, without any client's images; lines that say what will run.

    Raises `ConfigError` or `ValueError` (one line) for whatever would stop the run later. For sets
    of own images (`image_folder`, `npz`, ...) the config states the shape (`data.classes`,
    `data.channels`, `data.resolution`), or public look-alikes at `data.root` tell it.
    """
    if config.run.simulation:
        raise ConfigError("run.simulation: must be false for a deployed federation, got true")
    check_place(config, out, resume=resume)
    setup = set_up(config)
    models, spec = check_models(setup), setup.spec
    there = config.partition.num_clients
    needed = config.aggregation.min_clients or there
    return [
        f"{config.name}: {config.data.name} ({spec.channels}x{spec.resolution}x{spec.resolution}, "
        f"{spec.num_classes} classes), {there} clients, {needed} needed for a round",
        *models.lines(),
        f"run directory: {out}",
        *_notes(config),
    ]


def _notes(config: RunConfig) -> list[str]:
    """A node that was lost in a round and is let in again before Flower has looked (every 3 s)
    leaves a message that nobody answers."""
    if config.aggregation.round_timeout is not None:
        return []
    return [
        "note: aggregation.round_timeout is not set: a participant that never answers is waited for"
        " without end"
    ]
