"""How much of the images a coarse model knows, measured on releases, which are nearly all noise.

The coarse loss stands near its floor whatever the model has learned: at epsilon 10 the noise is
hundreds of times the images, and knowing them exactly would gain a few thousandths. So the gain is
given as a share of what there is. Given x_t and the clipped image x_0, a release is

    x_tilde ~ N(a x_0 + b x_t, v I),

and a model that answers with the mean m gains, over one that takes x_0 for 0 (the plain image that
`shift` stands for), in squared distance over v,

    (|x_tilde - b x_t|^2 - |x_tilde - m|^2) / v.    At most: a^2 C^2 / v, for |x_0| = C and m exact.

The share is the quotient of both sums: 0 for a model that knows nothing, below 0 for one that is
worse, 1 for one that knows each image, which no model can. The noise of x_tilde cancels but for its
product with m. Pure functions of releases, so whoever has these may say it.
"""

from __future__ import annotations

import torch

from fedpdm.diffusion.names import OBJECTIVES
from fedpdm.diffusion.objectives import bridge_coefficients
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["Knowledge", "release_given"]


def release_given(
    abar_t: torch.Tensor, abar_t0: float, *, chain: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a, b, v) of the module's law of x_tilde, in the shape of `abar_t`, float64.

    In a "truncated" chain x_t goes on from the release (t > t0); in a "noise_to_noise" chain the
    release is the image of a chain of its own.
    """
    if chain == "truncated":
        return bridge_coefficients(abar_t, abar_t0)
    if chain != "noise_to_noise":
        raise ValueError(f"chain must be one of {', '.join(OBJECTIVES)}, got {chain!r}")
    variance = 1.0 / (1.0 / (1.0 - abar_t0) + abar_t / (1.0 - abar_t))
    noisy = variance * abar_t.sqrt() / (1.0 - abar_t)
    return variance * abar_t0**0.5 / (1.0 - abar_t0), noisy, variance


class Knowledge:
    """The share over all answers that it has seen.

    Args:
        schedule, t0: how the releases were noised.
        clip_norm: C; chain: what the model estimates (see `CoarseObjective`).
    """

    def __init__(self, schedule: NoiseSchedule, *, t0: int, clip_norm: float, chain: str) -> None:
        self._schedule, self._t0, self._chain = schedule, t0, chain
        self._most = clip_norm**2
        self._sums: torch.Tensor | None = None  # what was gained, the most of it

    @torch.no_grad()
    def add(
        self, x_tilde: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, answer: torch.Tensor
    ) -> None:
        """Count answers (B, *) of the model, asked about x_t (B, *) at t (B,), for these releases.

        A truncated model has nothing to say of a release at t <= t0: these are left out.
        """
        abar = self._schedule.gather(t, t).double()
        counts = t > (self._t0 if self._chain == "truncated" else 0)
        abar = torch.where(counts, abar, 0.5 * self._schedule.alpha_bar(self._t0))
        clean, noisy, variance = release_given(
            abar, self._schedule.alpha_bar(self._t0), chain=self._chain
        )
        along = (len(t),) + (1,) * (x_t.dim() - 1)
        nothing = noisy.to(x_t.dtype).view(along) * x_t
        mean = answer
        if self._chain == "truncated":
            mean = clean.to(x_t.dtype).view(along) * answer + nothing
        step, off = mean - nothing, x_tilde - nothing
        gained = (step * (2.0 * off - step)).flatten(1).double().sum(1) / variance
        found = torch.stack((gained, clean**2 * self._most / variance))
        found = (found * counts).sum(1)
        self._sums = found if self._sums is None else self._sums + found

    @property
    def share(self) -> float | None:
        """See the module; None before anything was counted."""
        if self._sums is None:
            return None
        gained, most = self._sums.tolist()
        return gained / most if most > 0 else None
