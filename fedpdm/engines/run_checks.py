"""Checks before any run starts, simulated or deployed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpdm.config import ConfigError, RunConfig, RunKind
from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.diffusion.twostage import sample_two_stage
from fedpdm.privacy.accountant import delta_warning
from fedpdm.privacy.mechanism import mechanism_named, mechanism_of
from fedpdm.privacy.statement import baseline_statement
from fedpdm.reporting.trackers import check_trackers
from fedpdm.setup.build import build_optimizer_settings, model_sizes, sampler_settings
from fedpdm.setup.chosen import check_chosen
from fedpdm.setup.run_setup import RunSetup, build_schedule, check_rounds
from fedpdm.storage.run_directory import RunDirectory
from strategies.own import own_strategy

__all__ = [
    "RunModels",
    "check_models",
    "check_named",
    "check_place",
    "check_writable",
    "nearest_folder",
]


def check_place(config: RunConfig, out: Path, *, resume: bool) -> None:
    """Checks that need no images; `ConfigError` if one fails."""
    wanted, there = config.aggregation.min_clients or 1, config.partition.num_clients
    if wanted > there:
        raise ConfigError(
            f"aggregation.min_clients: must be at most partition.num_clients = {there}, "
            f"got {wanted}"
        )
    check_named(config)
    check_trackers(config)
    RunDirectory(out).check(config, resume=resume)
    check_writable(out)
    make_scheduler(config.sampling.scheduler, build_schedule(config).betas)


def check_named(config: RunConfig) -> None:
    """`ConfigError`, one line, for custom code that is not there or is of another kind."""
    check_rounds(config)
    own_strategy(config.aggregation.method)
    mechanism_named(config.privacy.release)
    check_chosen(config)


@dataclass(frozen=True, kw_only=True)
class RunModels:
    """The release that is planned and the parameters of the two models, by role."""

    setup: RunSetup
    sizes: dict[str, int]

    def lines(self, *, where: str = "", images: int | None = None) -> list[str]:
        """What clients send at which epsilon, and what is trained; `where` says on what. A client
        holds at most so many `images`, as far as that is known."""
        config = self.setup.config
        coarse, fine = config.coarse, config.fine
        promises = config.kind.releases or config.kind is RunKind.DP_SGD
        warning = delta_warning(config.privacy.delta, images=images) if promises else ""
        warnings = [f"WARNING: privacy.delta: {warning}"] if warning else []
        plan = self.setup.plan
        if plan is not None and (few := plan.sample_warning(images)):
            warnings.append(f"WARNING: network.sample_rate: {few}")
        if plan is not None and plan.gradients is not None:
            first, last = len(plan.sums), plan.gradients.rounds
            low, high = self.setup.network_levels
            return [
                _what_leaves(self.setup),
                *warnings,
                f"models: coarse network {coarse.preset} {self.sizes['coarse'] / 1e6:.2f} M for "
                f"t = {low} to {high}, fine {fine.preset} {self.sizes['fine'] / 1e6:.2f} M "
                f"parameters{where}; {config.run.rounds} rounds of {fine.steps_per_round} fine "
                f"steps: {first} of class statistics, then {config.network.warmup_steps} steps of "
                f"warm-up, {last} of gradients, {config.run.rounds - first - last} of fine "
                "training alone",
            ]
        if self.setup.has_gaussians:
            return [
                _what_leaves(self.setup),
                *warnings,
                f"models: class Gaussians above {_handover(self.setup)}, fine {fine.preset} "
                f"{self.sizes['fine'] / 1e6:.2f} M parameters{where}; {config.run.rounds} rounds "
                f"of {fine.steps_per_round} fine steps",
            ]
        return [
            _what_leaves(self.setup),
            *warnings,
            f"models: coarse {coarse.preset} {self.sizes['coarse'] / 1e6:.2f} M, fine "
            f"{fine.preset} {self.sizes['fine'] / 1e6:.2f} M parameters{where}; "
            f"{config.run.rounds} rounds of {coarse.steps_per_round} coarse and "
            f"{fine.steps_per_round} fine steps",
        ]


def _handover(setup: RunSetup) -> str:
    given = setup.config.sampling.handover
    return f"t = {given}" if given else "a t that each client chooses"


def check_models(setup: RunSetup) -> RunModels:
    """Build the models, and sample once; `ConfigError` or `ValueError`."""
    _check_sampler(setup)
    sizes = model_sizes(setup)
    build_optimizer_settings(setup.config, "coarse")
    return RunModels(setup=setup, sizes=sizes)


def _what_leaves(setup: RunSetup) -> str:
    """The line that says what clients send and at which epsilon."""
    config, plan = setup.config, setup.plan
    if plan is None:
        statement = baseline_statement(config)
        epsilon = statement["epsilon"]
        return f"baseline: {statement['guarantee']}" + (f", epsilon {epsilon:g}" if epsilon else "")
    described = " + ".join(mechanism_of(each).describe(each) for each in plan.rounds)
    return (
        f"release: {described}, epsilon {plan.epsilon_exact:.4g} at delta {config.privacy.delta:g}"
    )


def nearest_folder(out: Path) -> Path:
    """`out`, or its nearest parent that exists."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    return folder


def check_writable(out: Path) -> None:
    """Refuse a run directory that cannot be made or written."""
    folder = nearest_folder(out)
    if not folder.is_dir():
        raise ConfigError(f"{out}: cannot be made, {folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: cannot be written, no permission in {folder}")


def _check_sampler(setup: RunSetup) -> None:
    """Sample one pixel with denoisers that answer 0, to see that the scheduler can.

    Some diffusers schedulers can be made but not stepped, or run from image to noise.
    """

    def black(
        x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor, clipped: Any = None
    ) -> torch.Tensor:
        return torch.zeros_like(x_t)

    name, settings = setup.config.sampling.scheduler, sampler_settings(setup)
    try:
        output = sample_two_stage(
            black,
            black,
            torch.ones(1, 1, 1, 1),
            settings,
            labels=torch.zeros(1, dtype=torch.int64),
            generator=torch.Generator().manual_seed(0),
        )
    except Exception as error:  # third-party schedulers raise anything
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"sampling.scheduler: {name!r} cannot run here: {line}") from None
    if not float(output.images.abs().max()) < 0.1:
        raise ConfigError(f"sampling.scheduler: {name!r} does not lead from noise to images")
