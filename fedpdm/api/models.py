"""The two models: trained on releases and on raw images, and sampled with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet, data_set
from fedpdm.data.spec import ImageSpec, build_image_spec
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.training import BatchLoss, Progress, Trainer, class_weights, select_device
from fedpdm.diffusion.weights import load_named
from fedpdm.evaluation.gaussian_classifier import GaussianClassifier, as_classifier
from fedpdm.privacy.events import same_release
from fedpdm.privacy.mechanism import join
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import (
    build_denoiser,
    build_optimizer_settings,
    coarse_share,
    sampler_settings,
)
from fedpdm.setup.losses import coarse_batch_loss, fine_batch_loss
from fedpdm.setup.pair import ModelPair, check_finished, shared_pair, shared_weights
from fedpdm.setup.run_setup import RunSetup, set_up, set_up_for
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["gaussian_classifier", "sample", "spec_of", "train_coarse", "train_fine"]


def train_coarse(
    config: RunConfig,
    releases: Sequence[ReleasedDataset],
    *,
    num_steps: int | None = None,
    progress: Progress | None = None,
) -> Denoiser:
    """The shared model, trained on all clients' releases: the paper's Algorithm 1 at one place.

    Args:
        config: objective, network and optimiser (`config.coarse`).
        releases: one per client, all made with this config's settings.
        num_steps: default: as many as all clients would take in all rounds.
        progress: called with (steps done, steps in all, loss).

    Returns:
        The denoiser with EMA weights, in `eval()`.

    Raises:
        ValueError: for no release, or releases made with other settings than the config's.
        FloatingPointError: if the training diverged.
    """
    if not releases:
        raise ValueError("releases must hold at least one release, got none")
    first = releases[0]
    channels, resolution, _ = first.x_tilde.shape[1:]
    setup = set_up_for(config, _spec(config, channels=channels, resolution=resolution))
    planned = setup.release_plan.images
    names = ("t0", "clip_norm", "shift", "num_steps")
    wanted = {name: getattr(planned, name) for name in names}
    for number, one in enumerate(releases):
        if (kind := one.parameters.mechanism) != planned.mechanism:
            raise ValueError(
                f"releases[{number}] must be made by mechanism {planned.mechanism}, as the config "
                f"says, got {kind}"
            )
        for name, value in wanted.items():
            if (got := getattr(one.parameters, name)) != value:
                raise ValueError(
                    f"releases[{number}] must have {name} = {value:g}, as the config says, "
                    f"got {got:g}"
                )
        if not same_release(one.parameters, first.parameters):
            raise ValueError(f"releases[{number}] was made with another schedule than releases[0]")
    joined = join(releases)
    trainer = _trainer(setup, "coarse", num_steps)
    loss = coarse_batch_loss(setup, trainer.model, joined, training=True, device=trainer.device)
    weights = class_weights(joined.labels, balance=config.coarse.class_balance)
    stream = torch_generator(config.run.seed, Purpose.SERVER_TRAINING, device=trainer.device)
    return _trained(trainer, loss, weights, stream, progress, what="coarse model")


def train_fine(
    config: RunConfig,
    images: ImageSet,
    *,
    client: int = 0,
    num_steps: int | None = None,
    progress: Progress | None = None,
) -> Denoiser:
    """One client's own model, trained on its raw images. It stays with the client.

    Arguments as for `train_coarse`; `client` chooses the random streams. Default `num_steps`: those
    of all rounds.
    """
    setup = set_up(config, images)
    trainer = _trainer(setup, "fine", num_steps, client=client)
    loss = fine_batch_loss(
        setup,
        trainer.model,
        images=images.images.copy(),  # an image set's arrays cannot be written to
        labels=images.labels.copy(),
        device=trainer.device,
    )
    weights = class_weights(torch.tensor(images.labels), balance=config.fine.class_balance)
    stream = torch_generator(
        config.run.seed, Purpose.FINE_TRAINING, client=client, device=trainer.device
    )
    return _trained(trainer, loss, weights, stream, progress, what=f"fine model of client {client}")


def sample(
    config: RunConfig,
    coarse: Denoiser | GaussianDenoiser | None,
    fine: Denoiser | None,
    labels: Sequence[int] | np.ndarray,
    *,
    own: ImageSet | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Images uint8 (N, C, H, W) for labels in [0, K - 1]: coarse down to t0, fine from there on.

    Args:
        config: `config.sampling` says how. What it leaves open with class statistics is the
            fallback of docs/method.md section 5, for nobody chooses here.
        coarse, fine: one of them may be None: the other one then does all. Class Gaussians,
            and a network above them, are `gaussian_classifier(run).denoiser`.
        labels: N whole numbers; -1 for no label.
        own: the client's training images; needed where `sampling.coarse_worth` mixes both models.
        seed: equal seeds give equal images.
    """
    network = coarse if isinstance(coarse, Denoiser) else fine
    if network is None and coarse is None:
        raise ValueError("give a coarse model, a fine model, or both")
    spec = build_image_spec(config) if network is None else spec_of(config, network)
    num_classes, classes = spec.num_classes, np.asarray(labels, dtype=np.int64)
    if (
        classes.ndim != 1
        or not len(classes)
        or not (-1 <= classes.min() <= classes.max() < num_classes)
    ):
        raise ValueError(f"labels must be whole numbers in [-1, {num_classes - 1}], got {labels}")
    setup, share = set_up_for(config, spec), None
    if isinstance(coarse, GaussianDenoiser):
        device = coarse.gaussians.means.device
        if not setup.has_gaussians or coarse.gaussians.means.shape[1] != math.prod(spec.shape):
            raise ValueError(
                f"class Gaussians of {coarse.gaussians.means.shape[1]} numbers do not belong to "
                f"this config: privacy.release {config.privacy.release}, images {spec.shape}"
            )
    else:
        assert network is not None
        device = next(network.parameters()).device
    if coarse is not None and fine is not None and config.sampling.coarse_worth is not None:
        if own is None:
            raise ConfigError("sampling.coarse_worth: mixing needs the client's images (own)")
        share = coarse_share(config, own.labels, num_classes=num_classes)
    pair: ModelPair[Any] = ModelPair(
        coarse=coarse,
        fine=fine,
        spec=setup.spec,
        settings=sampler_settings(setup, share=share),
        device=device,
    )
    generator = torch_generator(seed, Purpose.SAMPLING, device=device)
    return pair.draw_pixels(classes, generator=generator)


def gaussian_classifier(run: RunDirectory | str | Path) -> GaussianClassifier:
    """The class Gaussians of a finished run of class statistics, or of a network that began with
    them, read as a classifier.

    They are made of what all clients released, and the same for all of them. Their
    log-probabilities can be added to those of a client's own classifier (docs/method.md section
    5).

    Raises:
        ValueError: for a run that has not finished, or whose shared model is another.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory(Path(run))
    config = directory.config()
    if not set_up(config).has_gaussians:
        raise ValueError(
            f"{directory.root}: its shared model is no class Gaussians; privacy.release must be "
            f"statistics or network, got {config.privacy.release}"
        )
    check_finished(directory, config)
    pair = shared_pair(config, shared_weights(directory))
    return as_classifier(pair.coarse, pair.spec)


def spec_of(config: RunConfig, model: Denoiser) -> ImageSpec:
    """Shape and shift of the images that a model was trained on."""
    shift = config.privacy.shift
    return ImageSpec(
        channels=model.spec.channels,
        resolution=model.spec.resolution,
        num_classes=model.spec.num_classes,
        shift=data_set(config.data.name).background if shift is None else shift,
    )


def _spec(config: RunConfig, *, channels: int, resolution: int) -> ImageSpec:
    """Shape of images that are at hand; the classes are those of the configured data set."""
    spec = build_image_spec(config)
    if (spec.channels, spec.resolution) != (channels, resolution):
        raise ValueError(
            f"images must be {spec.channels}x{spec.resolution}x{spec.resolution}, as config.data "
            f"says, got {channels}x{resolution}x{resolution}"
        )
    return spec


def _trainer(
    setup: RunSetup, role: str, num_steps: int | None, *, client: int = 0
) -> Trainer[Denoiser]:
    model = build_denoiser(setup, role, client=client)
    settings = build_optimizer_settings(setup.config, role, at_server=role == "coarse")
    if num_steps is not None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        settings = replace(settings, total_steps=num_steps)
    return Trainer(model, settings, device=select_device(setup.config.run.device))


def _trained(
    trainer: Trainer[Denoiser],
    loss: BatchLoss,
    weights: torch.Tensor,
    generator: torch.Generator,
    progress: Progress | None,
    *,
    what: str,
) -> Denoiser:
    """Take all steps; the model has its EMA weights then."""
    trainer.train(
        loss,
        sample_weights=weights,
        num_steps=trainer.settings.total_steps,
        generator=generator,
        progress=progress,
        what=what,
    )
    load_named(trainer.weights(), trainer.ema(), what="EMA weights")
    return trainer.model.eval()
