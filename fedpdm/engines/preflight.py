"""Checks before a run starts: everything that can be refused is refused here, in one line.

Nothing is written, so a refused run leaves the disk as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedpdm.build import (
    build_denoiser,
    build_image_spec,
    build_optimizer_settings,
    build_partitions,
    build_release_plan,
    build_schedule,
    load_split,
)
from fedpdm.config import ConfigError, RunConfig
from fedpdm.runs import RunDirectory
from fedpdm.sampling import make_scheduler
from fedpdm.training import select_device

__all__ = ["check_run"]


def check_run(config: RunConfig, out: Path, *, resume: bool) -> list[str]:
    """Load the data, split it, calibrate, build the models; returns lines that say what will run.

    Raises `ConfigError` or `ValueError` (one line) for whatever would stop the run later.
    """
    RunDirectory(out).check(config, resume=resume)
    device = select_device(config.run.device)
    schedule = build_schedule(config)
    make_scheduler(config.sampling.scheduler, schedule.betas)
    if not config.run.simulation:
        raise ConfigError("run.simulation: false needs a deployed federation, not fedpdm run")
    images = load_split(config, "train")
    load_split(config, "test")
    partitions = build_partitions(config, images)
    spec = build_image_spec(config, images)
    plan = build_release_plan(config, schedule, spec)
    sizes = {
        role: sum(
            p.numel()
            for p in build_denoiser(config, role, spec=spec, schedule=schedule).parameters()
        )
        for role in ("coarse", "fine")
    }
    build_optimizer_settings(config, "coarse")
    _check_space(config, out, sizes, num_bytes=4 * images.images.size)
    counts = [len(part.indices) for part in partitions]
    rounds = config.run.rounds
    return [
        f"{config.name}: {len(images)} images of {config.data.name} "
        f"({spec.channels}x{spec.resolution}x{spec.resolution}, {spec.num_classes} classes), "
        f"{len(counts)} clients with {min(counts)} to {max(counts)} images",
        f"release: t0 = {plan.t0} of {schedule.num_steps}, clip norm {plan.clip_norm:g} around "
        f"{plan.shift:g}, epsilon {plan.epsilon_exact:.4g} at delta {config.privacy.delta:g}",
        f"models: coarse {config.coarse.preset} {sizes['coarse'] / 1e6:.2f} M, fine "
        f"{config.fine.preset} {sizes['fine'] / 1e6:.2f} M parameters, on {device}; "
        f"{rounds} rounds of {config.coarse.steps_per_round} coarse and "
        f"{config.fine.steps_per_round} fine steps",
        f"run directory: {out}",
    ]


def _check_space(config: RunConfig, out: Path, sizes: dict[str, int], *, num_bytes: int) -> None:
    """Refuse a run whose stores would not fit on the disk."""
    per_client = 4 * (3 * (3 * sizes["fine"] + sizes["fine"]) + 3 * 3 * sizes["coarse"])
    needed = config.partition.num_clients * per_client + 16 * sizes["coarse"] + 2 * num_bytes
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{out}: the run needs about {needed / 1e9:.1f} GB of disk space, "
            f"{free / 1e9:.1f} GB are free"
        )
