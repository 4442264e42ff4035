"""Samples that begin with class Gaussians: a draw, noised to the hand-over, the fine model below.

A draw of the class's Gaussian is exact and costs no call of a network; all `num_steps` calls are
the fine model's. Of c candidates for an image the one is kept whose class the Gaussians find most
likely, all classes being equally likely before, as read at t = 0.15 T (docs/method.md section 5).
Classes of `own_classes` are the fine model's alone.
"""

from __future__ import annotations

from collections.abc import Callable
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
    Stage,
    as_asked,
    hand_over,
    refining,
    run_stages,
    sample_in_batches,
    sample_two_stage,
    stages,
    steps_of,
)

__all__ = [
    "READ_AT",
    "begin",
    "first_level",
    "likeliest",
    "read_level",
    "sample_from_gaussians",
    "steps_from_gaussians",
    "way_down",
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
    level: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A draw for each label, int (N,), and the same noised to the hand-over, or to `level`:
    float32 (N, *shape).

    A class without components is drawn as no label, from all classes by their weights.
    """
    known = torch.isin(labels, gaussians.classes[gaussians.weights > 0])
    asked = torch.where(known, labels, NO_LABEL)
    x_0 = gaussians.draw(asked, generator=generator).view(-1, *image_shape)
    noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    t = torch.full((len(x_0),), settings.t0 if level is None else level, device=x_0.device)
    return x_0, q_sample(settings.schedule, x_0, t, noise=noise)


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
    if fine is None:
        return len(labels) * steps_of(way_down(coarse, None, settings), settings)
    own = int(_own(labels, settings).sum())
    mixed = settings.coarse_share is not None
    chains = stages(coarse, fine, settings) if mixed else way_down(coarse, fine, settings)
    others = (len(labels) - own) * settings.candidates * steps_of(chains, settings)
    return others + own * steps_of(stages(None, fine, settings), settings)


def first_level(coarse: GaussianDenoiser, settings: SamplerSettings) -> int:
    """To which a draw is noised: the highest level of a network, or the hand-over."""
    return coarse.highest if isinstance(coarse, NetworkAboveGaussians) else settings.t0


def way_down(
    coarse: GaussianDenoiser,
    fine: DenoisingFunction | None,
    settings: SamplerSettings,
    *,
    watched: Callable[[str, DenoisingFunction], DenoisingFunction] | None = None,
) -> tuple[Stage, ...]:
    """The chains from a draw at `first_level` on: a network's, handed over to the fine model, or
    the fine model's alone; none where the draws are the images.

    `watched` gets each model, as it is asked, with its role and gives what is used in its place.
    """
    network = coarse if isinstance(coarse, NetworkAboveGaussians) else None
    above, below = as_asked(network, fine, settings)
    if watched is not None:
        above = None if above is None else watched("coarse", above)
        below = None if below is None else watched("fine", below)
    if above is None:
        return () if below is None else (refining(below, settings, t=settings.t0),)
    denoiser = above if below is None else hand_over(above, below, settings)
    start = first_level(coarse, settings)
    return (Stage(denoiser=denoiser, start=start, num_steps=settings.num_steps),)


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

    With `settings.coarse_share` the Gaussians and the fine model go down from pure noise together,
    as any two models do (`sample_two_stage`). Without a fine model and a network the draws are the
    images, one each. `image_shape` is (C, H, W).
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
        if fine is not None and settings.coarse_share is not None:
            shape = (len(wanted), *image_shape)
            x_T = torch.randn(shape, generator=generator, device=labels.device)
            output = sample_two_stage(
                coarse, fine, x_T, settings, labels=wanted, generator=generator
            )
            drawn, x = output.coarse, output.images
        else:
            drawn, x = begin(
                coarse.gaussians, settings, image_shape=image_shape, labels=wanted,
                generator=generator, level=first_level(coarse, settings),
            )  # fmt: skip
            chains = way_down(coarse, fine, settings)
            if chains:
                x = run_stages(chains, x, settings, labels=wanted, generator=generator)
            else:
                x = drawn
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
