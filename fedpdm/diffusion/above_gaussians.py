"""A network above the hand-over, beside the class Gaussians that it was begun from.

The network answers from `lowest` on, the Gaussians below it. They also say of what class a sample
is, so candidates are chosen as with Gaussians alone (`fedpdm.diffusion.from_gaussians`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["NetworkAboveGaussians"]


class NetworkAboveGaussians(GaussianDenoiser):
    """A `DenoisingFunction` made of a network for t >= `lowest` and `ClassGaussians` for others."""

    def __init__(
        self,
        network: DenoisingFunction,
        gaussians: ClassGaussians,
        schedule: NoiseSchedule,
        *,
        lowest: int,
    ) -> None:
        super().__init__(gaussians, schedule)
        self.network = network
        self.lowest = lowest

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        above = t >= self.lowest
        if bool(above.all()):
            return self.network(x_t, t, labels=labels)
        answer = super().__call__(x_t, t, labels=labels)
        if bool(above.any()):
            answer[above] = self.network(x_t[above], t[above], labels=labels[above])
        return torch.as_tensor(answer)
