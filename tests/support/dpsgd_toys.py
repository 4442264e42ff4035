"""A small U-Net at 8x8 with given draws of (t, noise), for the tests of DP-SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedpdm.diffusion.denoisers import Denoiser, DenoiserSpec
from fedpdm.diffusion.objectives import denoising_loss, weighted_error
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.schedule import make_schedule, q_sample
from tests.support.toys import seeded

SCHEDULE = make_schedule("linear")
N, K = 5, 3
IMAGES = torch.randn((N, 3, 8, 8), generator=seeded(1))
LABELS = torch.arange(N) % 3
UNIFORM = torch.ones(N, dtype=torch.float64)


def denoiser(preset: str = "nano", seed: int = 0) -> Denoiser:
    spec = DenoiserSpec(
        preset=PRESETS[preset], resolution=8, channels=3, num_classes=3, prediction="v",
        knows_clipping=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Denoiser(spec, SCHEDULE).train()
    with torch.no_grad():  # biases and norms that start at 0 and 1 would hide mistakes
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.05)
    return model


def rows_loss(
    model: Denoiser, indices: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Loss of every row at its own given t and noise."""
    x_t = q_sample(SCHEDULE, IMAGES[indices], t, noise=noise)
    estimate = model(x_t, t, labels=LABELS[indices])
    return weighted_error(estimate, IMAGES[indices], torch.ones(len(indices)))


def drawn(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(2)
    t = torch.randint(1, 1001, (num_rows,), generator=generator)
    return t, torch.randn((num_rows, 3, 8, 8), generator=generator)


def diffusion_loss(model: Denoiser) -> Callable[..., torch.Tensor]:
    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            model, SCHEDULE, IMAGES[indices], labels=LABELS[indices], t_max=1000, weighting="v",
            generator=generator,
        )  # fmt: skip

    return loss
