"""Where DP-SGD's batches and noise come from.

Both must be unpredictable for the guarantee to hold: the noise because it is what hides an example,
and the batches because sampling amplifies privacy only while nobody knows who was drawn.
`SeededDraws` is for simulations; `SystemDraws` reads the operating system's generator.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch

__all__ = ["Draws", "SeededDraws", "SystemDraws"]


class Draws(Protocol):
    """A source of Poisson batches and of noise; `description` goes into records."""

    description: str
    seeded: bool

    def poisson_batch(self, num_examples: int, *, rate: float) -> torch.Tensor:
        """Indices of a batch, int64 (B,): each of [0, num_examples) is in it with chance `rate`."""
        ...

    def add_noise(self, total: torch.Tensor, *, scale: float) -> torch.Tensor:
        """`total` (*) plus independent N(0, scale^2) noise, in `total`'s dtype, on its device."""
        ...


class SeededDraws:
    """Draws of a torch generator. Whoever knows the seed can remove the noise."""

    description = "seeded (simulation only: no privacy against whoever knows the seed)"
    seeded = True

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def poisson_batch(self, num_examples: int, *, rate: float) -> torch.Tensor:
        """See `Draws`."""
        uniform = torch.rand(
            num_examples,
            dtype=torch.float64,
            generator=self._generator,
            device=self._generator.device,
        )
        return (uniform < rate).nonzero().flatten()

    def add_noise(self, total: torch.Tensor, *, scale: float) -> torch.Tensor:
        """See `Draws`."""
        noise = torch.randn(
            total.shape, dtype=total.dtype, generator=self._generator, device=total.device
        )
        return total + scale * noise


class SystemDraws:
    """Draws of the operating system's cryptographic generator, which nobody can repeat.

    Noise is a sum of four float64 Box-Muller Gaussians over 2, added in float64: recovering the
    gradient from the gaps between the floating-point numbers that can occur is then out of reach
    (Holohan and Braghin 2021, section 5.1; Opacus' secure mode does the same). The exact integer
    noise of `fedpdm.privacy.noise` is not usable here: it needs what it hides to lie on its grid,
    and rounding a sum of gradients to a grid adds to its sensitivity.
    """

    description = "operating-system entropy, sums of four float64 Gaussians"
    seeded = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def poisson_batch(self, num_examples: int, *, rate: float) -> torch.Tensor:
        """See `Draws`."""
        drawn = _uniform(num_examples).numpy() < rate
        return torch.from_numpy(np.flatnonzero(drawn)).to(self._device)

    def add_noise(self, total: torch.Tensor, *, scale: float) -> torch.Tensor:
        """See `Draws`."""
        count = total.numel()
        noise = torch.zeros(count, dtype=torch.float64)
        for _ in range(2):  # Box and Muller (1958): two Gaussians of two uniforms
            radius = _uniform(count).log_().mul_(-2.0).sqrt_()
            angle = _uniform(count).mul_(2.0 * math.pi)
            noise += radius * (angle.cos() + angle.sin())
        noise = (scale / 2.0 * noise).to(total.device).view(total.shape)
        return (total.double() + noise).to(total.dtype)


def _uniform(count: int) -> torch.Tensor:
    """float64 (count,) uniform on (0, 1): odd multiples of 2^-54."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-53)
