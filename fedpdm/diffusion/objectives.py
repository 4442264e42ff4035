"""Training losses, per example.

All networks are trained through their clean-image estimate x0_hat, whose squared error is weighted
by a function of SNR_t = abar_t / (1 - abar_t) (`fedpdm.diffusion.weightings`).

Coarse, truncated (docs/method.md section 3): for t > t0, with r = abar_t / abar_t0 and
x_t = sqrt(r) x_tilde + sqrt(1 - r) z, the mean of x_tilde given x_t and the clean image is

    sqrt(abar_t0) (1 - r) / (1 - abar_t) x_0 + sqrt(r) (1 - abar_t0) / (1 - abar_t) x_t,

and regressing x_tilde on it trains x0_hat towards E[CLIP(x) | x_t]. The residual has variance
(1 - r) (1 - abar_t0) / (1 - abar_t) at least, by which the loss is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.names import OBJECTIVES, TIMESTEPS
from fedpdm.diffusion.schedule import NoiseSchedule, q_sample, q_sample_from
from fedpdm.diffusion.weightings import WEIGHTINGS, Weighting

__all__ = [
    "NOISE_TO_NOISE",
    "TRUNCATED",
    "CoarseObjective",
    "bridge_coefficients",
    "denoising_error",
    "denoising_loss",
    "draw_timesteps",
    "drop_labels",
    "snr_weight",
    "truncated_loss",
    "weighted_error",
]


def snr_weight(abar: torch.Tensor, *, weighting: str | Weighting) -> torch.Tensor:
    """Weight of the squared x0 error at abar (any shape): one of `WEIGHTINGS` or a custom one."""
    if isinstance(weighting, str):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        weighting = WEIGHTINGS[weighting]
    return weighting.of_snr(abar / (1.0 - abar))


def weighted_error(
    estimate: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Mean squared error per example of (B, *) tensors times weight (B,) -> (B,)."""
    return weight * (estimate - target).square().flatten(1).mean(dim=1)


def drop_labels(
    labels: torch.Tensor, *, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """Replace each label by `NO_LABEL` with the given probability (classifier-free guidance)."""
    if probability <= 0:
        return labels
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < probability
    return torch.where(dropped, NO_LABEL, labels)


def draw_timesteps(
    count: int, *, t_max: int, timesteps: str, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """`count` draws from [1, t_max], int64 (count,): `uniform`, or `logit_normal`.

    logit_normal is t_max sigmoid(z) rounded up, z normal with mean -1 and variance 1 (Esser et al.
    2024, section 3.1, with a mean of our own): half of the draws are below 0.27 t_max, where
    the image is made out; one in 700 is in the top tenth, where there is little to learn.
    """
    if timesteps == "uniform":
        return torch.randint(1, t_max + 1, (count,), generator=generator, device=device)
    if timesteps == "logit_normal":
        z = torch.randn(count, generator=generator, device=device) - 1.0
        return (t_max * torch.sigmoid(z)).ceil().long().clamp_(1, t_max)
    raise ValueError(f"timesteps must be one of {', '.join(TIMESTEPS)}, got {timesteps!r}")


def denoising_loss(
    denoiser: DenoisingFunction,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    *,
    labels: torch.Tensor,
    clipped: torch.Tensor | None = None,
    t_max: int,
    t_min: int = 1,
    weighting: str | Weighting,
    timesteps: str = "uniform",
    generator: torch.Generator,
) -> torch.Tensor:
    """DDPM loss at t drawn from [t_min, t_max]: x_0 (B, *), labels int (B,) -> (B,).

    The fine objective on raw images, and the noise-to-noise coarse objective (the paper's) with
    the release x_tilde as `x_0` and t_max = T.
    """
    if not 1 <= t_min <= t_max <= schedule.num_steps:
        raise ValueError(
            f"t_min and t_max must be in [1, {schedule.num_steps}], in this order, got {t_min} and "
            f"{t_max}"
        )
    width = t_max - t_min + 1
    t = draw_timesteps(
        len(x_0), t_max=width, timesteps=timesteps, generator=generator, device=x_0.device
    )
    t += t_min - 1
    noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return denoising_error(
        denoiser, schedule, x_0, t, noise, labels=labels, clipped=clipped, weighting=weighting
    )


def denoising_error(
    denoiser: DenoisingFunction,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    *,
    labels: torch.Tensor,
    clipped: torch.Tensor | None = None,
    weighting: str | Weighting,
) -> torch.Tensor:
    """The same at given t, int (B,), and noise of x_0's shape: (B,)."""
    x_t = q_sample(schedule, x_0, t, noise=noise)
    x0_hat = denoiser(x_t, t, labels=labels, clipped=clipped)
    weight = snr_weight(schedule.gather(t, t), weighting=weighting).to(x_0.dtype)
    return weighted_error(x0_hat, x_0, weight)


@dataclass(frozen=True, kw_only=True)
class CoarseObjective:
    """How the shared model is trained on releases, and sampled.

    `loss(denoiser, schedule, x_tilde, *, labels, t0, weighting, timesteps, generator)` gives a loss
    per example (B,) of stored releases x_tilde (B, *) made by t0 steps. `chain` is the way to
    sample that suits the model: "truncated" where it estimates the clean image at t > t0 (one
    chain, handed over at t0), "noise_to_noise" where it estimates the release itself.
    """

    loss: Callable[..., torch.Tensor]
    chain: str

    def __post_init__(self) -> None:
        if self.chain not in OBJECTIVES:
            raise ValueError(f"chain must be one of {', '.join(OBJECTIVES)}, got {self.chain!r}")


def bridge_coefficients(
    abar_t: torch.Tensor, abar_t0: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(coefficient of x_0, coefficient of x_t, variance) of q(x_tilde | x_t, x_0); t > t0.

    Shapes follow `abar_t`, float64. DDPM Eq. 6-7 with the step from t0 to t as one.
    """
    r = abar_t / abar_t0
    clean = abar_t0**0.5 * (1.0 - r) / (1.0 - abar_t)
    noisy = r.sqrt() * (1.0 - abar_t0) / (1.0 - abar_t)
    variance = (1.0 - r) * (1.0 - abar_t0) / (1.0 - abar_t)
    return clean, noisy, variance


def truncated_loss(
    denoiser: DenoisingFunction,
    schedule: NoiseSchedule,
    x_tilde: torch.Tensor,
    *,
    labels: torch.Tensor,
    t0: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Coarse loss on stored releases at t uniform on [t0 + 1, T]: x_tilde (B, *) -> (B,).

    Divided by the bridge variance, so that its floor is 1 at every t (pure noise left over).
    """
    if not 1 <= t0 < schedule.num_steps:
        raise ValueError(f"t0 must be in [1, {schedule.num_steps - 1}], got {t0}")
    t = torch.randint(
        t0 + 1, schedule.num_steps + 1, (len(x_tilde),), generator=generator, device=x_tilde.device
    )
    noise = torch.randn(x_tilde.shape, generator=generator, device=x_tilde.device)
    x_t = q_sample_from(schedule, x_tilde, s=t0, t=t, noise=noise)
    x0_hat = denoiser(x_t, t, labels=labels)
    clean, noisy, variance = bridge_coefficients(
        schedule.gather(t, x_tilde), schedule.alpha_bar(t0)
    )
    estimate = clean.to(x_t.dtype) * x0_hat + noisy.to(x_t.dtype) * x_t
    return weighted_error(estimate, x_tilde, (1.0 / variance.flatten()).to(x_t.dtype))


def _truncated(*arguments: Any, weighting: Any, timesteps: str, **options: Any) -> torch.Tensor:
    """`truncated_loss`, which has a weight and a law of t of its own."""
    return truncated_loss(*arguments, **options)


def _noise_to_noise(
    denoiser: DenoisingFunction,
    schedule: NoiseSchedule,
    x_tilde: torch.Tensor,
    *,
    t0: int,
    **options: Any,
) -> torch.Tensor:
    """`denoising_loss` of the releases at t in [1, T], whatever their t0."""
    return denoising_loss(denoiser, schedule, x_tilde, t_max=schedule.num_steps, **options)


TRUNCATED = CoarseObjective(loss=_truncated, chain="truncated")
NOISE_TO_NOISE = CoarseObjective(loss=_noise_to_noise, chain="noise_to_noise")
