"""Denoisers made of denoisers: which model answers at which t, mixed how, asked with what.

Each class here is a `DenoisingFunction`, so they nest, and samplers, attacks and objectives take
the result as they take a network. The personalised model of docs/method.md section 3 is

    HandOver(Guided(coarse, w), Guided(Unclipped(fine), w), t0)

and with a share of the coarse model above t0

    fine = Guided(Unclipped(fine), w)
    HandOver(Mixed(Guided(coarse, w), fine, share), fine, t0).

Any function of the protocol can take a place, for example a closed form above the hand-over.
Values by label are (K + 1,): one for each class, and at last one for no label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = [
    "Guided",
    "HandOver",
    "ImagesFromReleases",
    "Mixed",
    "Unclipped",
    "Unlabelled",
    "Watched",
]


def _by_label(values: Tensor, labels: Tensor) -> Tensor:
    """(K + 1,) and labels int (B,) -> (B,), on the labels' device."""
    place = torch.where(labels == NO_LABEL, len(values) - 1, labels)
    return values.to(labels.device)[place]


@dataclass(frozen=True, eq=False)
class HandOver:
    """`above` where t > level, `below` at and under it.

    `level` is a whole number in [0, T], or int (K + 1,) by label. A model is asked only about the
    rows that are its own.
    """

    above: DenoisingFunction
    below: DenoisingFunction
    level: int | Tensor

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        level = self.level if isinstance(self.level, int) else _by_label(self.level, labels)
        is_above = t > level
        num_above = int(is_above.sum())
        if num_above in (0, len(t)):
            asked = self.above if num_above else self.below
            return asked(x_t, t, labels=labels, clipped=clipped)
        x0_hat = torch.empty_like(x_t)
        for rows, asked in ((is_above, self.above), (~is_above, self.below)):
            flag = None if clipped is None else clipped[rows]
            x0_hat[rows] = asked(x_t[rows], t[rows], labels=labels[rows], clipped=flag)
        return x0_hat


@dataclass(frozen=True, eq=False)
class Mixed:
    """`share` of the first model's answer and the rest of the second's.

    `share` is float (K + 1,) in [0, 1], by label.
    """

    first: DenoisingFunction
    second: DenoisingFunction
    share: Tensor

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        share = _by_label(self.share, labels).to(x_t).view(-1, *[1] * (x_t.ndim - 1))
        second = self.second(x_t, t, labels=labels, clipped=clipped)
        return torch.lerp(second, self.first(x_t, t, labels=labels, clipped=clipped), share)


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance in x0 space: null + weight (conditional - null).

    Ho and Salimans 2022. Weight 1 is the model as it is, at half the cost.
    """

    denoiser: DenoisingFunction
    weight: float

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        if self.weight == 1.0:
            return self.denoiser(x_t, t, labels=labels, clipped=clipped)
        both = self.denoiser(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            labels=torch.cat([labels, torch.full_like(labels, NO_LABEL)]),
            clipped=None if clipped is None else torch.cat([clipped, clipped]),
        )
        conditional, null = both.chunk(2)
        return null + self.weight * (conditional - null)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """The model asked without labels, whatever the labels are."""

    denoiser: DenoisingFunction

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        return self.denoiser(x_t, t, labels=torch.full_like(labels, NO_LABEL), clipped=clipped)


@dataclass(frozen=True, eq=False)
class Unclipped:
    """A fine model asked for whole images: its clipped flag is passed, unset."""

    denoiser: DenoisingFunction

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        flag = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
        return self.denoiser(x_t, t, labels=labels, clipped=flag)


@dataclass(frozen=True, eq=False)
class Watched:
    """The model as it is; `watch(x_t, t, x0_hat)` sees each question and its answer."""

    denoiser: DenoisingFunction
    watch: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        x0_hat = self.denoiser(x_t, t, labels=labels, clipped=clipped)
        self.watch(x_t, t, x0_hat)
        return x0_hat


@dataclass(frozen=True, eq=False)
class ImagesFromReleases:
    """The x0_hat that a noise-to-noise coarse model implies, for t > t0.

    That model estimates x_tilde. With r = abar_t / abar_t0, x_t is level s of its own chain,
    abar_s = r, and by docs/method.md section 3

        E[x_tilde | x_t] = A x0_hat + B x_t,  A = sqrt(abar_t0)(1 - r)/(1 - abar_t),
                                              B = sqrt(r)(1 - abar_t0)/(1 - abar_t),

    which is solved for x0_hat, at the level whose abar is nearest to r.
    """

    coarse: DenoisingFunction
    schedule: NoiseSchedule
    t0: int

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        abar_t0 = self.schedule.alpha_bar(self.t0)
        abar = self.schedule.gather(t, x_t)
        r = abar / abar_t0
        table = self.schedule.alphas_cumprod[1:]
        level = 1 + np.abs(table[None, :] - r.flatten().cpu().numpy()[:, None]).argmin(axis=1)
        answer = self.coarse(x_t, torch.from_numpy(level).to(t), labels=labels, clipped=clipped)
        a = abar_t0**0.5 * (1.0 - r) / (1.0 - abar)
        b = r.sqrt() * (1.0 - abar_t0) / (1.0 - abar)
        return (answer - b.to(x_t.dtype) * x_t) / a.to(x_t.dtype)
