"""How well a shared model knows clean images, by noise level: the squared error of x0_hat.

It needs no samples and no own model, so settings of a shared model are compared by it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule, q_sample

__all__ = ["BANDS", "error_by_level"]

BANDS: Final = ((100, 150), (150, 300), (300, 500), (500, 800))
"""Of t, for T = 1000: where a fine model takes over, and above."""


@torch.no_grad()
def error_by_level(
    denoiser: DenoisingFunction,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    bands: Sequence[tuple[int, int]] = BANDS,
    batch_size: int = 250,
) -> list[float]:
    """Mean squared error per number of x0_hat, for t uniform in each band (both ends included).

    `x_0` float32 (N, C, H, W) are images that nothing was trained on, `labels` int64 (N,) are
    told. Equal seeds give equal noise, whatever the denoiser.
    """
    errors = []
    for number, (low, high) in enumerate(bands):
        generator = torch.Generator(device=x_0.device).manual_seed(seed * len(bands) + number)
        total = 0.0
        for x, told in zip(x_0.split(batch_size), labels.split(batch_size), strict=True):
            t = torch.randint(low, high + 1, (len(x),), generator=generator, device=x.device)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            answer = denoiser(q_sample(schedule, x, t, noise=noise), t, labels=told)
            total += float((answer - x).double().square().flatten(1).mean(dim=1).sum())
        errors.append(total / len(x_0))
    return errors
