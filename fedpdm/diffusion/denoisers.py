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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import UNet2DModel
from torch import nn

from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = [
    "NO_LABEL",
    "PRESETS",
    "Denoiser",
    "DenoiserSpec",
    "DenoisingFunction",
    "Preset",
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
class Preset:
    """A U-Net by name: diffusers keyword arguments and the prediction type that suits it.

    With `patch` p it works on p x p pixels as one with p^2 times the channels (pixel-unshuffle, Shi
    et al. 2016): a wider network at a quarter of the positions for p = 2. `resolutions` are the
    image sizes it is meant for, smallest and largest; it runs on any of at least its stride.
    """

    unet: Mapping[str, Any]
    prediction: str
    resolutions: tuple[int, int]
    description: str
    patch: int = 1

    @property
    def stride(self) -> int:
        """Pixels per side that one position of the coarsest level stands for."""
        return int(self.patch * 2 ** (len(self.unet["block_out_channels"]) - 1))


def _blocks(kinds: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`kinds` has a letter per level, top first: R residual, A residual with attention."""
    down = tuple("DownBlock2D" if k == "R" else "AttnDownBlock2D" for k in kinds)
    up = tuple("UpBlock2D" if k == "R" else "AttnUpBlock2D" for k in reversed(kinds))
    return down, up


def _unet(
    kinds: str,
    channels: tuple[int, ...],
    layers: int,
    groups: int,
    head: int,
    dropout: float = 0.0,
) -> dict[str, Any]:
    down, up = _blocks(kinds)
    return {
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "attention_head_dim": head,
        "dropout": dropout,
    }


PRESETS: Mapping[str, Preset] = {
    "micro": Preset(
        unet=_unet("RA", (24, 48), 1, 8, 16),
        prediction="v",
        resolutions=(8, 16),
        description="8x8 on a laptop, about 0.4 M parameters",
    ),
    "tiny": Preset(
        unet=_unet("RA", (32, 64), 1, 8, 16),
        prediction="v",
        resolutions=(8, 16),
        description="8x8 and 16x16, about 0.7 M parameters",
    ),
    "tiny_patch": Preset(
        unet=_unet("RA", (48, 96), 1, 8, 16),
        prediction="v",
        resolutions=(12, 32),
        description="16x16 as 8x8 patches, about 1.6 M parameters, half of tiny's FLOPs",
        patch=2,
    ),
    "small": Preset(
        unet=_unet("RAR", (32, 64, 128), 1, 8, 16),
        prediction="v",
        resolutions=(16, 64),
        description="28x28 and 32x32, about 2.6 M parameters",
    ),
    # Ho et al. 2020, appendix B: the CIFAR-10 U-Net, 35.7 M parameters.
    "paper": Preset(
        unet=_unet("RARR", (128, 256, 256, 256), 2, 32, 256, dropout=0.1),
        prediction="epsilon",
        resolutions=(32, 64),
        description="the DDPM CIFAR-10 U-Net, about 35 M parameters",
    ),
}


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """Everything that determines a denoiser's architecture.

    `resolution` in pixels (square images), `channels` 1 or 3, `num_classes` K; `knows_clipping`
    doubles the label table (fine models).
    """

    preset: str
    resolution: int
    channels: int
    num_classes: int
    prediction: str
    knows_clipping: bool

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {self.preset}")
        if self.prediction not in ("sample", "epsilon", "v"):
            raise ValueError(f"prediction must be sample, epsilon or v, got {self.prediction!r}")
        for name in ("resolution", "channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def padded_resolution(self) -> int:
        """The network's resolution: images are zero-padded up to a multiple of its stride."""
        stride = PRESETS[self.preset].stride
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
        super().__init__()
        self.spec = spec
        preset = PRESETS[spec.preset]
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
