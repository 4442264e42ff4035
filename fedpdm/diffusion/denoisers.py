"""Denoisers: diffusers U-Nets behind one interface.

A denoiser maps (x_t, t, label) to an estimate `x0_hat` of the clean image. The network's raw
output F may be any of three targets (`prediction`), each an invertible linear function of x0_hat
given x_t, with a = sqrt(abar_t) and s = sqrt(1 - abar_t):

    sample:   x0_hat = F
    epsilon:  x0_hat = (x_t - s F) / a                                     (DDPM Eq. 15)
    v:        x0_hat = a x_t - s F                    (Salimans and Ho 2022, appendix D)

Conditions are class labels, with one extra index for "no label" (classifier-free guidance, Ho and
Salimans 2022), and for fine models a second block of the same indices that means "clipped".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fedpdm.diffusion.names import PREDICTIONS
from fedpdm.diffusion.presets import Preset
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = [
    "NO_LABEL",
    "Denoiser",
    "DenoiserSpec",
    "DenoisingFunction",
    "TrainableDenoiser",
]

NO_LABEL = -1


class DenoisingFunction(Protocol):
    """What objectives and samplers need: (B, *), t int (B,), labels int (B,) -> x0_hat (B, *)."""

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """Everything that determines a denoiser's architecture.

    `resolution` in pixels (square images), `channels` 1 or 3, `num_classes` K; `knows_clipping`
    doubles the label table (fine models).
    """

    preset: Preset
    resolution: int
    channels: int
    num_classes: int
    prediction: str
    knows_clipping: bool

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            known = f"{', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]}"
            raise ValueError(f"prediction must be {known}, got {self.prediction!r}")
        for name in ("resolution", "channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def padded_resolution(self) -> int:
        """The network's resolution: images are zero-padded up to a multiple of its stride."""
        stride = self.preset.stride
        return -(-self.resolution // stride) * stride

    @property
    def num_conditions(self) -> int:
        return (self.num_classes + 1) * (2 if self.knows_clipping else 1)


class TrainableDenoiser(nn.Module):
    """A `DenoisingFunction` whose parameters are those of its `network`."""

    network: nn.Module


class Denoiser(TrainableDenoiser):
    """A diffusers `UNet2DModel` as a `DenoisingFunction`.

    The U-Net is `self.network`, unmodified, so it saves and loads as any diffusers model does.
    """

    def __init__(self, spec: DenoiserSpec, schedule: NoiseSchedule) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel  # it takes seconds

        super().__init__()
        self.spec = spec
        preset = spec.preset
        self._patch = preset.patch
        network: Any = UNet2DModel(
            sample_size=spec.padded_resolution // preset.patch,
            in_channels=spec.channels * preset.patch**2,
            out_channels=spec.channels * preset.patch**2,
            num_class_embeds=spec.num_conditions,
            **preset.unet,
        )
        self.network = network
        abar = torch.tensor(schedule.alphas_cumprod)
        self.register_buffer("_signal", abar.sqrt().float(), persistent=False)
        self.register_buffer("_noise", (1.0 - abar).sqrt().float(), persistent=False)
        self._signal: torch.Tensor
        self._noise: torch.Tensor

    def condition(self, labels: torch.Tensor, clipped: torch.Tensor | None) -> torch.Tensor:
        """Index into the label table: label, or K for `NO_LABEL`, plus K + 1 where clipped."""
        num_classes = self.spec.num_classes
        index = torch.where(labels == NO_LABEL, num_classes, labels)
        if clipped is not None:
            if not self.spec.knows_clipping:
                raise ValueError("this denoiser was built without the clipped flag")
            index = index + (num_classes + 1) * clipped.to(index.dtype)
        return index

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat float32 (B, C, H, W) from x_t of that shape, t int (B,) in [1, T], labels (B,)."""
        pad = self.spec.padded_resolution - self.spec.resolution
        x_in = nn.functional.pad(x_t, (0, pad, 0, pad)) if pad else x_t
        x_in = nn.functional.pixel_unshuffle(x_in, self._patch)
        # diffusers' timestep k is the state after k + 1 steps of noise.
        raw = self.network(x_in, t - 1, class_labels=self.condition(labels, clipped)).sample
        raw = nn.functional.pixel_shuffle(raw, self._patch)
        if pad:
            raw = raw[..., : self.spec.resolution, : self.spec.resolution]
        raw = raw.float()
        if self.spec.prediction == "sample":
            return raw
        signal, noise = self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)
        if self.spec.prediction == "epsilon":
            return (x_t - noise * raw) / signal
        return signal * x_t - noise * raw
