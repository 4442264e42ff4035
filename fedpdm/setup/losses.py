"""The configured objectives as losses of a batch of indices into a client's data."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from fedpdm.data import normalize
from fedpdm.data.augment import random_affine
from fedpdm.diffusion.combined import Watched
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.diffusion.knowledge import Knowledge
from fedpdm.diffusion.objectives import (
    denoising_error,
    denoising_loss,
    draw_timesteps,
    drop_labels,
)
from fedpdm.diffusion.training import BatchLoss
from fedpdm.privacy.dpsgd import ExampleLosses
from fedpdm.privacy.mechanism import clip_l2
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.chosen import find_objective, find_weighting
from fedpdm.setup.run_setup import RunSetup

__all__ = [
    "coarse_batch_loss",
    "coarse_knowledge",
    "drawn_batch_loss",
    "fine_batch_loss",
    "network_losses",
    "raw_coarse_batch_loss",
]


def coarse_knowledge(setup: RunSetup) -> Knowledge | None:
    """To measure what the shared model knows of released images; None where none are released."""
    parameters = setup.plan and setup.release_plan.images
    if not parameters:
        return None
    return Knowledge(
        setup.schedule,
        t0=parameters.t0,
        clip_norm=parameters.clip_norm,
        chain=find_objective(setup.config).chain,
    )


def coarse_batch_loss(
    setup: RunSetup,
    denoiser: Denoiser,
    released: ReleasedDataset,
    *,
    training: bool,
    device: torch.device,
    subset: np.ndarray | None = None,
    known: Knowledge | None = None,
) -> BatchLoss:
    """The configured coarse objective on a release, as loss of a batch of indices.

    Indices count within `subset` (int64 positions in the release) where it is given. `known` counts
    what each answer knows.
    """
    section, schedule = setup.config.coarse, setup.schedule
    x_tilde, labels = released.x_tilde.to(device), released.labels.to(device)
    positions = None if subset is None else torch.from_numpy(subset).to(device)
    dropout = section.label_dropout if training else 0.0
    weighting = find_weighting(setup.config, "coarse")
    objective = find_objective(setup.config)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if positions is not None:
            indices = positions[indices]
        chosen = drop_labels(labels[indices], probability=dropout, generator=generator)
        batch = x_tilde[indices]
        watched = Watched(denoiser, functools.partial(known.add, batch)) if known else denoiser
        return objective.loss(
            watched,
            schedule,
            batch,
            labels=chosen,
            t0=released.parameters.t0,
            weighting=weighting,
            timesteps=section.timesteps,
            generator=generator,
        )

    return loss


def raw_coarse_batch_loss(
    setup: RunSetup,
    denoiser: Denoiser,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    training: bool,
    device: torch.device,
) -> BatchLoss:
    """The loss of baselines whose shared model sees raw images (`coarse.images` raw or dp_sgd).

    Arguments as in `fine_batch_loss`; t is drawn from [1, T].
    """
    section, schedule, shift = setup.config.coarse, setup.schedule, setup.spec.shift
    pixels, classes = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    dropout = section.label_dropout if training else 0.0
    weighting = find_weighting(setup.config, "coarse")

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            denoiser,
            schedule,
            normalize(pixels[indices], shift=shift),
            labels=drop_labels(classes[indices], probability=dropout, generator=generator),
            t_max=schedule.num_steps,
            weighting=weighting,
            timesteps=section.timesteps,
            generator=generator,
        )

    return loss


def network_losses(
    setup: RunSetup,
    denoiser: Denoiser,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    draws: int,
    device: torch.device,
    stream: Callable[[int], torch.Generator],
) -> ExampleLosses:
    """The losses of a network above the hand-over on a client's raw images, `draws` of each.

    Images and labels as in `fine_batch_loss`. What an image is noised with comes from its own
    `stream`, by index, on the CPU: it does not depend on which other images are drawn, or the
    accounting of drawn images would not hold (`fedpdm.privacy.mechanism.gradients`).
    """
    shift = setup.spec.shift
    pixels, classes = torch.from_numpy(images), torch.from_numpy(labels)

    def losses(indices: torch.Tensor) -> torch.Tensor:
        x_0 = normalize(pixels[indices], shift=shift)
        drawn = [
            _levels(setup, draws, x[None].expand(draws, -1, -1, -1), label, stream(int(index)))
            for index, x, label in zip(indices, x_0, classes[indices], strict=True)
        ]
        t, noise, told = (torch.cat(each).to(device) for each in zip(*drawn, strict=True))
        return denoising_error(
            denoiser,
            setup.schedule,
            x_0.repeat_interleave(draws, dim=0).to(device),
            t,
            noise,
            labels=told,
            weighting=find_weighting(setup.config, "coarse"),
        )

    return losses


def _levels(
    setup: RunSetup,
    count: int,
    x_0: torch.Tensor,
    label: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` draws of t from `setup.network_levels`, noise as x_0 and the label or none."""
    section, (low, high) = setup.config.coarse, setup.network_levels
    t = draw_timesteps(
        count,
        t_max=high - low + 1,
        timesteps=section.timesteps,
        generator=generator,
        device=x_0.device,
    )
    noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    told = drop_labels(label.expand(count), probability=section.label_dropout, generator=generator)
    return t + low - 1, noise, told


def drawn_batch_loss(
    setup: RunSetup, denoiser: Denoiser, gaussians: ClassGaussians
) -> tuple[BatchLoss, torch.Tensor]:
    """(the loss of such a network on fresh draws of class Gaussians, of the classes at its indices;
    how often each class is to be drawn, float64 (K,)): a warm-up that costs nothing."""
    section, (low, high) = setup.config.coarse, setup.network_levels
    share = torch.zeros(setup.spec.num_classes, dtype=torch.float64, device=gaussians.means.device)
    share.index_add_(0, gaussians.classes, gaussians.weights)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            denoiser,
            setup.schedule,
            gaussians.draw(indices, generator=generator).view(-1, *setup.spec.shape),
            labels=drop_labels(indices, probability=section.label_dropout, generator=generator),
            t_min=low,
            t_max=high,
            weighting=find_weighting(setup.config, "coarse"),
            timesteps=section.timesteps,
            generator=generator,
        )

    return loss, share.cpu()


def fine_batch_loss(
    setup: RunSetup,
    denoiser: Denoiser,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
) -> BatchLoss:
    """The configured fine objective on raw images, as loss of a batch of indices.

    `images` uint8 (N, C, H, W) stay so on the device and are normalised there, `labels` int64 (N,).
    Images are changed as `fine.augment` says, then a share of each batch is clipped and flagged
    so. Without a release t is drawn from [1, T].
    """
    section, schedule, shift = setup.config.fine, setup.schedule, setup.spec.shift
    clip_norm, t_max = setup.config.privacy.clip_norm, schedule.num_steps
    if setup.plan is not None and section.t_range == "below_t0":
        t_max = setup.handover
    pixels, classes = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    weighting = find_weighting(setup.config, "fine")

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x_0 = normalize(pixels[indices], shift=shift)
        if section.augment == "affine":
            x_0 = random_affine(x_0, generator=generator)
        draw = torch.rand(len(indices), generator=generator, device=device)
        clipped = draw < section.clipped_fraction
        bounded = clip_l2(x_0, clip_norm=clip_norm)
        x_0 = torch.where(clipped.view(-1, 1, 1, 1), bounded, x_0)
        chosen = drop_labels(
            classes[indices], probability=section.label_dropout, generator=generator
        )
        return denoising_loss(
            denoiser,
            schedule,
            x_0,
            labels=chosen,
            clipped=clipped,
            t_max=t_max,
            weighting=weighting,
            timesteps=section.timesteps,
            generator=generator,
        )

    return loss
