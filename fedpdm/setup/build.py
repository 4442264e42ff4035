"""From a run configuration to the objects that do the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch

from fedpdm.config import CoarseConfig, ConfigError, FineConfig, RunConfig
from fedpdm.config.sampling import check_candidates
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.denoisers import Denoiser, DenoiserSpec
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.training import OptimizerSettings
from fedpdm.diffusion.twostage import SamplerSettings
from fedpdm.diffusion.weights import load_named
from fedpdm.privacy.dpsgd import DpSgdSettings, dp_sgd_noise_multiplier
from fedpdm.rng import Purpose, seed_sequence
from fedpdm.setup.choice import SamplingChoice, fallback
from fedpdm.setup.chosen import find_objective, find_preset
from fedpdm.setup.run_setup import RunSetup

__all__ = [
    "GAUSSIANS",
    "NETWORK",
    "build_denoiser",
    "build_dp_sgd",
    "build_gaussians",
    "build_network_settings",
    "build_optimizer_settings",
    "build_shared",
    "coarse_share",
    "model_sizes",
    "named_part",
    "sampler_settings",
]


def build_denoiser(setup: RunSetup, role: str, *, client: int = 0) -> Denoiser:
    """A freshly initialised coarse or fine denoiser, its weights drawn from the run's seed."""
    config, spec = setup.config, setup.spec
    section: CoarseConfig | FineConfig = config.coarse if role == "coarse" else config.fine
    preset = find_preset(config, role)
    smallest = preset.stride
    if spec.resolution < smallest:
        raise ConfigError(
            f"data.resolution: {role}.preset {section.preset} needs images of at least "
            f"{smallest}x{smallest}, got {spec.resolution}x{spec.resolution}"
        )
    denoiser_spec = DenoiserSpec(
        preset=preset,
        resolution=spec.resolution,
        channels=spec.channels,
        num_classes=spec.num_classes,
        prediction=section.prediction or preset.prediction,
        knows_clipping=role == "fine",
    )
    purpose = Purpose.COARSE_INIT if role == "coarse" else Purpose.FINE_INIT
    seed = int(seed_sequence(config.run.seed, purpose, client=client).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(denoiser_spec, setup.schedule)


def build_gaussians(setup: RunSetup, weights: Mapping[str, torch.Tensor]) -> GaussianDenoiser:
    """The shared model of class statistics, from its tensors by name, where they lie.

    `ValueError` for tensors that are not class Gaussians of this run's images.
    """
    names, d = {each.name for each in fields(ClassGaussians)}, math.prod(setup.spec.shape)
    if weights.keys() != names:
        raise ValueError(f"class Gaussians: expected {sorted(names)}, got {sorted(weights)}")
    gaussians = ClassGaussians(**weights)
    classes = gaussians.classes
    if classes.dtype != torch.int64 or gaussians.means.shape[1] != d:
        raise ValueError(
            f"class Gaussians: must be of {d} dimensions, with classes int64, got "
            f"{gaussians.means.shape[1]} and {classes.dtype}"
        )
    if not 0 <= int(classes.min()) <= int(classes.max()) < setup.spec.num_classes:
        raise ValueError(f"class Gaussians: classes must be in [0, {setup.spec.num_classes - 1}]")
    return GaussianDenoiser(gaussians, setup.schedule)


NETWORK, GAUSSIANS = "network.", "gaussians."  # what the shared model's tensors are named by


def build_shared(setup: RunSetup, weights: Mapping[str, torch.Tensor]) -> GaussianDenoiser:
    """The shared model of class statistics, or of a network above the hand-over beside them, from
    its tensors by name, where they lie; `ValueError` for others."""
    if not setup.has_network:
        return build_gaussians(setup, weights)
    parts = {prefix: named_part(weights, prefix) for prefix in (NETWORK, GAUSSIANS)}
    if sum(map(len, parts.values())) != len(weights):
        known = (NETWORK, GAUSSIANS)
        raise ValueError(
            f"shared model: unexpected {min(n for n in weights if not n.startswith(known))}"
        )
    gaussians = build_gaussians(setup, parts[GAUSSIANS]).gaussians
    model = build_denoiser(setup, "coarse").to(gaussians.means.device)
    load_named(dict(model.network.named_parameters()), parts[NETWORK], what="coarse weights")
    return NetworkAboveGaussians(
        model.eval(), gaussians, setup.schedule, levels=setup.network_levels
    )


def named_part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def model_sizes(setup: RunSetup) -> dict[str, int]:
    """Trained parameters of the coarse and the fine model; class Gaussians have none."""
    trained = setup.has_network or not setup.has_gaussians
    roles = ("coarse", "fine") if trained else ("fine",)
    sizes = {r: sum(p.numel() for p in build_denoiser(setup, r).parameters()) for r in roles}
    return {"coarse": 0, **sizes}


def server_steps_per_round(config: RunConfig) -> int:
    """Coarse steps that the server takes per round in server training: as many as all clients
    together would."""
    chosen = config.aggregation.server_steps_per_round
    return chosen or config.coarse.steps_per_round * config.partition.num_clients


def build_optimizer_settings(
    config: RunConfig, role: str, *, at_server: bool = False
) -> OptimizerSettings:
    section: CoarseConfig | FineConfig = config.coarse if role == "coarse" else config.fine
    per_round = server_steps_per_round(config) if at_server else section.steps_per_round
    return OptimizerSettings(
        lr=section.lr,
        batch_size=section.batch_size,
        total_steps=max(1, per_round * config.run.rounds),
        warmup_steps=section.warmup_steps,
        decay=section.decay,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
        ema_decay=section.ema_decay,
        precision=config.run.precision,
    )


def build_network_settings(config: RunConfig, *, warm_up: bool) -> OptimizerSettings:
    """How the server trains the network above the hand-over: on draws of the Gaussians, or with
    the gradients that clients send."""
    section, coarse = config.network, config.coarse
    return OptimizerSettings(
        lr=coarse.lr if warm_up else section.lr,
        batch_size=coarse.batch_size,
        total_steps=section.warmup_steps if warm_up else section.rounds,
        warmup_steps=coarse.warmup_steps if warm_up else 0,
        decay=coarse.decay if warm_up else "constant",
        weight_decay=coarse.weight_decay,
        grad_clip=coarse.grad_clip,
        ema_decay=coarse.ema_decay,
        precision=config.run.precision,
    )


def build_dp_sgd(config: RunConfig, *, num_images: int) -> DpSgdSettings:
    """DP-SGD for one client's whole run at `privacy.epsilon`, of its `num_images` images."""
    section, privacy = config.coarse, config.privacy
    assert privacy.epsilon is not None  # RunConfig
    if section.batch_size > num_images:
        raise ConfigError(
            f"coarse.batch_size: DP-SGD needs at most the client's {num_images} images, "
            f"got {section.batch_size}"
        )
    steps = max(1, section.steps_per_round * config.run.rounds)
    return DpSgdSettings(
        noise_multiplier=dp_sgd_noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sample_rate=section.batch_size / num_images,
            num_steps=steps,
        ),
        max_grad_norm=section.grad_clip,
        multiplicity=section.noise_multiplicity,
        max_steps=steps,
    )


def sampler_settings(
    setup: RunSetup,
    *,
    share: torch.Tensor | None = None,
    choice: SamplingChoice | None = None,
) -> SamplerSettings:
    """How the run samples; `share` is the client's `coarse_share`, `choice` its own choice.

    Without a release the fine model, where there is one, answers at all t: hand-over at T. With
    class statistics and no choice the fallback stands. What the config says stands before both;
    `ConfigError` for candidates without class statistics.
    """
    config, section = setup.config, setup.config.sampling
    if setup.plan is not None and not setup.has_gaussians:
        check_candidates(section, release=config.privacy.release)
    trained = config.kind.releases and not setup.has_gaussians
    chosen = choice or fallback(setup) if setup.has_gaussians else None
    labels = chosen is None or chosen.fine_labels
    alone = share is None and section.own_classes != "never"
    return SamplerSettings(
        schedule=setup.schedule,
        t0=(section.handover or chosen.handover) if chosen else setup.handover,
        scheduler=section.scheduler,
        num_steps=section.num_steps,
        guidance=section.guidance,
        chain=find_objective(config).chain if trained else "truncated",
        fine_labels=labels if section.fine_labels is None else section.fine_labels,
        candidates=(section.candidates or chosen.candidates) if chosen else 1,
        own_classes=chosen.own_classes if chosen and alone else (),
        coarse_share=share,
        batch_size=section.batch_size,
    )


def coarse_share(config: RunConfig, labels: np.ndarray, *, num_classes: int) -> torch.Tensor | None:
    """What a client trusts the coarse model above t0, float32 (K + 1,) by class; None: wholly.

    `labels` int64 (n,) are those of the client's training images. Two estimates of a class's mean,
    one worth w images (`sampling.coarse_worth`) and one of n_k images, are best weighed as w : n_k.
    The last entry is for no label.
    """
    worth = config.sampling.coarse_worth
    if worth is None:
        return None
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    shares = np.append(worth / (worth + counts), worth / (worth + counts.mean()))
    return torch.tensor(shares, dtype=torch.float32)
