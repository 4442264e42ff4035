"""Random affine changes of images: what makes more of few images, for networks and classifiers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["random_affine"]

ROTATION = math.pi / 12.0  # at most, either way
SCALE = 0.15  # at most: the logarithm of each side's stretch
SHEAR = 0.15
SHIFT = 1.0 / 8.0  # of a side


def random_affine(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each image of float x (B, C, H, W) turned, stretched, sheared and moved by itself.

    At most by 15 degrees, a factor exp(0.15), 0.15 and an eighth of a side, all uniform. Values
    between pixels are interpolated, those outside are the border's. No mirror images, which for
    digits are other things. The generator is on x's device.
    """
    n = len(x)
    u = 2.0 * torch.rand((7, n), generator=generator, device=x.device) - 1.0
    angle, shear = ROTATION * u[0], SHEAR * u[1:3]
    cos, sin = angle.cos(), angle.sin()
    width, height = (SCALE * u[3]).exp(), (SCALE * u[4]).exp()
    rows = [
        [width * (cos - shear[1] * sin), height * (shear[0] * cos - sin), 2.0 * SHIFT * u[5]],
        [width * (sin + shear[1] * cos), height * (shear[0] * sin + cos), 2.0 * SHIFT * u[6]],
    ]
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = nn.functional.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
