"""Checks before a deployed run is submitted; the nodes check their own side."""

from __future__ import annotations

from pathlib import Path

from fedpdm.build import (
    build_denoiser,
    build_image_spec,
    build_optimizer_settings,
    build_release_plan,
    build_schedule,
)
from fedpdm.config import ConfigError, RunConfig
from fedpdm.engines.preflight import _check_sampler, _check_writable, _what_leaves
from fedpdm.runs import RunDirectory
from fedpdm.sampling import make_scheduler
from fedpdm.trackers import check_trackers

__all__ = ["check_deployed_run"]


def check_deployed_run(config: RunConfig, out: Path, *, resume: bool) -> list[str]:
    """Calibrate and build the models, without any client's images; lines that say what will run.

    Raises `ConfigError` or `ValueError` (one line) for whatever would stop the run later. Sets of
    own images (`image_folder`, `npz`) need public ones at `data.root`: they tell the shape.
    """
    if config.run.simulation:
        raise ConfigError("run.simulation: must be false for a deployed federation, got true")
    wanted, there = config.aggregation.min_clients or 1, config.partition.num_clients
    if wanted > there:
        raise ConfigError(
            f"aggregation.min_clients: must be at most partition.num_clients = {there}, "
            f"got {wanted}"
        )
    check_trackers(config)
    RunDirectory(out).check(config, resume=resume)
    _check_writable(out)
    schedule = build_schedule(config)
    make_scheduler(config.sampling.scheduler, schedule.betas)
    spec = build_image_spec(config)
    plan = build_release_plan(config, schedule, spec)
    _check_sampler(config, schedule, plan)
    sizes = [
        sum(
            parameter.numel()
            for parameter in build_denoiser(config, role, spec=spec, schedule=schedule).parameters()
        )
        for role in ("coarse", "fine")
    ]
    build_optimizer_settings(config, "coarse")
    needed = config.aggregation.min_clients or there
    return [
        f"{config.name}: {config.data.name} ({spec.channels}x{spec.resolution}x{spec.resolution}, "
        f"{spec.num_classes} classes), {there} clients, {needed} needed for a round",
        _what_leaves(config, plan),
        f"models: coarse {config.coarse.preset} {sizes[0] / 1e6:.2f} M, fine {config.fine.preset} "
        f"{sizes[1] / 1e6:.2f} M parameters; {config.run.rounds} rounds of "
        f"{config.coarse.steps_per_round} coarse and {config.fine.steps_per_round} fine steps",
        f"run directory: {out}",
    ]
