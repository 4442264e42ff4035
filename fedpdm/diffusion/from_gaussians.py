"""Samples that begin with class Gaussians: a draw, noised to the hand-over, the fine model below.

A draw of the class's Gaussian is exact and costs no call of a network; all `num_steps` calls are
the fine model's. Of c candidates for an image the one is kept whose class the Gaussians find most
likely, all classes being equally likely before, as read at t = 0.15 T (docs/method.md section 5).
Classes of `own_classes` are the fine model's alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.schedule import NoiseSchedule, q_sample
from fedpdm.diffusion.twostage import (
    SamplerOutput,
    SamplerSettings,
    refine,
    refining,
    sample_in_batches,
    sample_two_stage,
    stages,
    steps_of,
)

__all__ = [
    "READ_AT",
    "begin",
    "goes_down",
    "likeliest",
    "read_level",
    "sample_from_gaussians",
    "steps_from_gaussians",
]

READ_AT = 0.15  # of T: where class posteriors are read


def read_level(schedule: NoiseSchedule) -> float:
    """abar where class posteriors are read."""
    return schedule.alpha_bar(max(1, round(READ_AT * schedule.num_steps)))


def begin(
    gaussians: ClassGaussians,
    settings: SamplerSettings,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A draw for each label, int (N,), and the same noised to the hand-over: float32 (N, *shape).

    A class without components is drawn as no label, from all classes by their weights.
    """
    known = torch.isin(labels, gaussians.classes[gaussians.weights > 0])
    asked = torch.where(known, labels, NO_LABEL)
    x_0 = gaussians.draw(asked, generator=generator).view(-1, *image_shape)
    noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    level = torch.full((len(x_0),), settings.t0, device=x_0.device)
    return x_0, q_sample(settings.schedule, x_0, level, noise=noise)


def likeliest(
    gaussians: ClassGaussians, images: Tensor, labels: Tensor, *, count: int, abar: float
) -> Tensor:
    """Rows of the chosen candidates, int64 (N,): images float (N count, *), those of one label
    (int (N,)) after one another.

    The first one where the label is none or a class without components.
    """
    first = torch.arange(len(labels), device=labels.device) * count
    if count == 1:
        return first
    num_classes = int(gaussians.classes.max()) + 1
    scaled = abar**0.5 * images.flatten(1)
    posterior = gaussians.log_class_posterior(scaled, num_classes, abar, even=True)
    inside = (labels >= 0) & (labels < num_classes)
    own = posterior.view(len(labels), count, num_classes)[
        torch.arange(len(labels), device=labels.device), :, torch.where(inside, labels, 0)
    ]
    known = inside & own.isfinite().all(dim=1)
    return first + torch.where(known, own.argmax(dim=1), 0)


def steps_from_gaussians(
    coarse: GaussianDenoiser,
    fine: DenoisingFunction | None,
    settings: SamplerSettings,
    labels: Tensor,
) -> int:
    """Steps that `sample_from_gaussians` takes for images of these labels, over all candidates."""
    both = goes_down(coarse, fine, settings)
    if fine is None:
        return len(labels) * steps_of(stages(coarse, None, settings), settings) if both else 0
    own = int(_own(labels, settings).sum())
    chains = stages(coarse, fine, settings) if both else (refining(fine, settings, t=settings.t0),)
    others = (len(labels) - own) * settings.candidates * steps_of(chains, settings)
    return others + own * steps_of(stages(None, fine, settings), settings)


def goes_down(
    coarse: GaussianDenoiser, fine: DenoisingFunction | None, settings: SamplerSettings
) -> bool:
    """Whether samples go down from pure noise, by both models, and do not begin with a draw."""
    mixed = settings.coarse_share is not None and fine is not None
    return mixed or isinstance(coarse, NetworkAboveGaussians)


def _own(labels: Tensor, settings: SamplerSettings) -> Tensor:
    """Which labels the fine model draws alone, bool (N,)."""
    return torch.isin(labels, labels.new_tensor(settings.own_classes))


def sample_from_gaussians(
    coarse: GaussianDenoiser,
    fine: DenoisingFunction | None,
    settings: SamplerSettings,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor,
    generator: torch.Generator,
) -> SamplerOutput:
    """One image for each label, int (N,); the best of `settings.candidates`.

    With `settings.coarse_share`, or with a network above the hand-over, both models go down from
    pure noise, as any two do (`sample_two_stage`). Without a fine model the draws are the images,
    one each. `image_shape` is (C, H, W).
    """
    own = _own(labels, settings)
    if fine is not None and bool(own.any()):
        return _with_own_classes(
            coarse, fine, settings, own, image_shape=image_shape, labels=labels,
            generator=generator,
        )  # fmt: skip
    count = settings.candidates if fine is not None else 1
    images, estimates = [], []
    for part in labels.split(max(1, settings.batch_size // count)):
        wanted = part.repeat_interleave(count)
        if goes_down(coarse, fine, settings):
            shape = (len(wanted), *image_shape)
            x_T = torch.randn(shape, generator=generator, device=labels.device)
            output = sample_two_stage(
                coarse, fine, x_T, settings, labels=wanted, generator=generator
            )
            drawn, x = output.coarse, output.images
        else:
            drawn, x = begin(
                coarse.gaussians, settings, image_shape=image_shape, labels=wanted,
                generator=generator,
            )  # fmt: skip
            x = (
                drawn
                if fine is None
                else refine(fine, x, settings, t=settings.t0, labels=wanted, generator=generator)
            )
        chosen = likeliest(
            coarse.gaussians, x, part, count=count, abar=read_level(settings.schedule)
        )
        images.append(x[chosen])
        if drawn is not None:
            estimates.append(drawn[chosen])
    return SamplerOutput(
        images=torch.cat(images), coarse=torch.cat(estimates) if estimates else None
    )


def _with_own_classes(
    coarse: GaussianDenoiser,
    fine: DenoisingFunction,
    settings: SamplerSettings,
    own: Tensor,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor,
    generator: torch.Generator,
) -> SamplerOutput:
    """The labels at `own`, bool (N,), from the fine model alone, then the others. The estimates of
    the first are draws of their Gaussians, which come last."""
    options: dict[str, Any] = {"image_shape": image_shape, "generator": generator}
    alone = sample_in_batches(None, fine, settings, labels=labels[own], **options)
    shape = (len(labels), *image_shape)
    images, estimates = alone.images.new_empty(shape), alone.images.new_empty(shape)
    images[own] = alone.images
    if not bool(own.all()):
        plain = replace(settings, own_classes=())
        rest = sample_from_gaussians(coarse, fine, plain, labels=labels[~own], **options)
        assert rest.coarse is not None
        images[~own], estimates[~own] = rest.images, rest.coarse
    estimates[own], _ = begin(coarse.gaussians, settings, labels=labels[own], **options)
    return SamplerOutput(images=images, coarse=estimates)
