"""Membership statistics that need no fitting: one number per image, high for a likely member.

With eps_hat(x_t, t) what the model implies (`targets`) and lo the smallest level of the target:

    loss    mean over draws of -|| eps - eps_hat(sqrt(abar_t) x + sqrt(1 - abar_t) eps, t) ||_2
            (Matsumoto et al. 2023; Yeom et al. 2018 for the idea)
    PIA     e = eps_hat(sqrt(abar_lo) x, lo),
            -|| e - eps_hat(sqrt(abar_t) x + sqrt(1 - abar_t) e, t) ||_p   (Kong et al. 2024)
    PIAN    PIA with e rescaled, image by image, to a mean |e| of sqrt(2 / pi), which is E|N(0, 1)|
    SecMI   deterministic DDIM from lo up to t, one step on and back, minus the squared L2 error
            (Duan et al. 2023)
    CLiD    mean over t of || eps_hat(x_t, t, null) - eps ||^2 - || eps_hat(x_t, t, y) - eps ||^2
            (Zhai et al. 2024, with class labels for captions)

Where the literature scores members low the sign is turned. A `t` outside the target's range is
moved to the nearest inside. Everything is float64 (N,) in the order of the images.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.membership.targets import (
    AttackTarget,
    Progress,
    noise_like,
    rows_in_batches,
)
from fedpdm.diffusion.denoisers import NO_LABEL

__all__ = [
    "score_clid",
    "score_loss",
    "score_pia",
    "score_secmi",
    "secmi_errors",
    "secmi_levels",
]

Array = NDArray[np.float64]


@torch.no_grad()
def score_loss(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    generator: torch.Generator,
    t: int = 200,
    num_draws: int = 1,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Array:
    """Minus the norm of the error in the noise, its mean over draws from `generator` (CPU).

    One draw of a small image is mostly chance: several bring out what the model knows of it.
    """
    _check_draws(num_draws)
    level, scores = target.nearest(t), []
    for x, y in rows_in_batches(target, x_0, labels, batch_size=batch_size, progress=progress):
        draws = noise_like(x.new_empty((len(x), num_draws, *x.shape[1:])), generator=generator)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for noise in draws.unbind(1):
            error = noise - target.noise_estimate(target.at_level(x, level, noise), level, y)
            total -= _norms(error, 2.0)
        scores.append(total / num_draws)
    return _joined(scores)


@torch.no_grad()
def score_pia(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    t: int = 200,
    norm: float = 4.0,
    rescale: bool = False,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Array:
    """The proximal initialisation attack, two questions per image, no randomness.

    `norm` is p >= 1. `rescale` makes it PIAN: the first answer at the size of standard normal
    noise.
    """
    if not norm >= 1.0:
        raise ValueError(f"norm must be at least 1, got {norm}")
    first, level, scores = target.t_range[0], target.nearest(t), []
    for x, y in rows_in_batches(target, x_0, labels, batch_size=batch_size, progress=progress):
        e = target.noise_estimate(target.noiseless(x, first), first, y)
        if rescale:
            size = e.abs().flatten(1).mean(dim=1).view(-1, 1, 1, 1)
            e = e * torch.where(size > 0, math.sqrt(2.0 / math.pi) / size, 0.0)
        error = e - target.noise_estimate(target.at_level(x, level, e), level, y)
        scores.append(-_norms(error, norm))
    return _joined(scores)


def secmi_levels(target: AttackTarget, *, t: int = 100, step: int = 10) -> tuple[int, ...]:
    """The levels of SecMI's chain, ascending: the last but one is t, the last one step on.

    From the target's smallest level in steps of `step` (the first may be shorter), with t moved
    so that the step on stays in the target's range. `ValueError` for a range of one level.
    """
    smallest, largest = target.t_range
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if smallest == largest:
        raise ValueError(f"SecMI needs a target of at least 2 levels, got t_range {target.t_range}")
    step = min(step, largest - smallest)
    top = min(target.nearest(t), largest - step)
    climb = range(top, smallest, -step)
    return (smallest, *reversed(climb), top + step)


@torch.no_grad()
def secmi_errors(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    t: int = 100,
    step: int = 10,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> torch.Tensor:
    """SecMI's difference images: x_t after a step on and back, minus x_t; (N, C, H, W) on the CPU.

    Each step keeps x0_hat and eps_hat and changes the level: x_u = sqrt(abar_u) x0_hat +
    sqrt(1 - abar_u) eps_hat (Song et al. 2021, Eq. 12 with sigma 0).
    """
    levels, parts = secmi_levels(target, t=t, step=step), []
    for x, y in rows_in_batches(target, x_0, labels, batch_size=batch_size, progress=progress):
        x_t = target.noiseless(x, levels[0])
        for here, there in pairwise(levels[:-1]):
            x_t = _ddim_step(target, x_t, y, here, there)
        ahead = _ddim_step(target, x_t, y, levels[-2], levels[-1])
        back = _ddim_step(target, ahead, y, levels[-1], levels[-2])
        parts.append((back - x_t).cpu())
    return torch.cat(parts)


def score_secmi(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    t: int = 100,
    step: int = 10,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Array:
    """Minus the squared L2 norm of `secmi_errors`; no randomness."""
    errors = secmi_errors(
        target, x_0, labels, t=t, step=step, batch_size=batch_size, progress=progress
    )
    return _joined([-_norms(errors, 2.0).square()])


@torch.no_grad()
def score_clid(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    generator: torch.Generator,
    num_levels: int = 10,
    num_draws: int = 1,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Array:
    """How much the label helps the model, averaged over `target.levels(num_levels)`.

    Both questions see the same noise, `num_draws` per image and level from `generator` (CPU). It
    says something only of a model that was also trained without labels. `ValueError` where the
    target's labels are not known or one is `NO_LABEL`.
    """
    if not target.labels_known:
        raise ValueError("the label-conditional attack needs a target whose labels are known")
    if bool((labels < 0).any()):
        raise ValueError("the label-conditional attack needs a label for every image, got NO_LABEL")
    _check_draws(num_draws)
    levels, scores = target.levels(num_levels) * num_draws, []
    for x, y in rows_in_batches(target, x_0, labels, batch_size=batch_size, progress=progress):
        draws = noise_like(x.new_empty((len(x), len(levels), *x.shape[1:])), generator=generator)
        gain = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for index, level in enumerate(levels):
            noise = draws[:, index]
            x_t = target.at_level(x, level, noise)
            without = target.noise_estimate(x_t, level, torch.full_like(y, NO_LABEL)) - noise
            given = target.noise_estimate(x_t, level, y) - noise
            gain += _norms(without, 2.0).square() - _norms(given, 2.0).square()
        scores.append(gain / len(levels))
    return _joined(scores)


def _check_draws(num_draws: int) -> None:
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")


def _ddim_step(
    target: AttackTarget, x_t: torch.Tensor, labels: torch.Tensor, here: int, there: int
) -> torch.Tensor:
    x0_hat, eps_hat = target.estimates(x_t, here, labels)
    return target.at_level(x0_hat, there, eps_hat)


def _norms(error: torch.Tensor, order: float) -> torch.Tensor:
    """The `order`-norm of each image, float64 (B,)."""
    return torch.linalg.vector_norm(error.double().flatten(1), ord=order, dim=1)


def _joined(parts: list[torch.Tensor]) -> Array:
    scores = torch.cat(parts).cpu().numpy()
    if np.isnan(scores).any():
        raise ValueError(f"the model answered NaN for {int(np.isnan(scores).sum())} images")
    return scores
