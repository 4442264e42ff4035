"""A network above the hand-over, beside the class Gaussians that it was begun from.

It answers at some levels, from about the hand-over on; at all others the Gaussians do. High up they
are hard to beat, for there an image is hardly more than its class's mean and leading directions. So
a sample begins with a draw of the Gaussians, noised to the highest of these levels. They also say
of what class a sample is: candidates are chosen as with Gaussians alone
(`fedpdm.diffusion.from_gaussians`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["NetworkAboveGaussians"]


class NetworkAboveGaussians(GaussianDenoiser):
    """A `DenoisingFunction` made of a network at `levels`, the least and the greatest t, and of
    `ClassGaussians` at others."""

    def __init__(
        self,
        network: DenoisingFunction,
        gaussians: ClassGaussians,
        schedule: NoiseSchedule,
        *,
        levels: tuple[int, int],
    ) -> None:
        super().__init__(gaussians, schedule)
        self.network = network
        self.lowest, self.highest = levels

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        inside = (t >= self.lowest) & (t <= self.highest)
        if bool(inside.all()):
            return self.network(x_t, t, labels=labels)
        answer = super().__call__(x_t, t, labels=labels)
        if bool(inside.any()):
            answer[inside] = self.network(x_t[inside], t[inside], labels=labels[inside])
        return torch.as_tensor(answer)
