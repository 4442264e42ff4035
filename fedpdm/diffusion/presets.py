"""U-Nets by name: diffusers' keyword arguments. A custom preset is a `Preset` anywhere.

Free of torch, so that a configuration is read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

__all__ = ["PRESETS", "Preset", "unet"]


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


def unet(
    kinds: str,
    channels: tuple[int, ...],
    layers: int,
    groups: int,
    head: int,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Arguments of diffusers' `UNet2DModel`, a letter and a number of channels per level.

    `kinds` as in "RA", top level first: R residual, A residual with attention. `layers` per level,
    `groups` of each normalisation, `head` channels of an attention head.
    """
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


#: Name -> U-Net.
PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "nano": Preset(
            unet=unet("R", (16,), 1, 4, 8),
            prediction="v",
            resolutions=(4, 16),
            description="to try the path of a run in seconds, about 0.042 M parameters",
        ),
        "micro": Preset(
            unet=unet("RA", (24, 48), 1, 8, 16),
            prediction="v",
            resolutions=(8, 16),
            description="8x8 on a laptop, about 0.4 M parameters",
        ),
        "micro_patch": Preset(
            unet=unet("RA", (24, 48), 1, 8, 16),
            prediction="v",
            resolutions=(12, 16),
            description="16x16 as 8x8 patches, about 0.4 M parameters: for noised gradients",
            patch=2,
        ),
        "tiny": Preset(
            unet=unet("RA", (32, 64), 1, 8, 16),
            prediction="v",
            resolutions=(8, 16),
            description="8x8 and 16x16, about 0.7 M parameters",
        ),
        "tiny_patch": Preset(
            unet=unet("RA", (48, 96), 1, 8, 16),
            prediction="v",
            resolutions=(12, 32),
            description="16x16 as 8x8 patches, about 1.6 M parameters, half of tiny's FLOPs",
            patch=2,
        ),
        "small": Preset(
            unet=unet("RAR", (32, 64, 128), 1, 8, 16),
            prediction="v",
            resolutions=(16, 64),
            description="28x28 and 32x32, about 2.6 M parameters",
        ),
        # Ho et al. 2020, appendix B: the CIFAR-10 U-Net, 35.7 M parameters.
        "paper": Preset(
            unet=unet("RARR", (128, 256, 256, 256), 2, 32, 256, dropout=0.1),
            prediction="epsilon",
            resolutions=(32, 64),
            description="the DDPM CIFAR-10 U-Net, about 35 M parameters",
        ),
    }
)
