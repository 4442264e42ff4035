"""Bring images to one square size: centre crop to a square, then antialiased bilinear resize."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

__all__ = ["center_square", "resize"]

_CHUNK: Final = 4096


def center_square(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The square in the middle: (..., H, W) uint8 to a view of (..., S, S), S = min(H, W)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def resize(images: NDArray[np.uint8], *, resolution: int) -> NDArray[np.uint8]:
    """Centre-crop to a square and resize; images that have the size already stay untouched.

    Args:
        images: (N, C, H, W) uint8.
        resolution: new height and width in pixels, >= 1.

    Returns:
        (N, C, resolution, resolution) uint8, rounded to the nearest level.
    """
    if images.shape[-2:] == (resolution, resolution):
        return images
    square = center_square(images)
    if square.shape[-1] == resolution:
        return np.ascontiguousarray(square)
    resized = np.empty((*square.shape[:2], resolution, resolution), dtype=np.uint8)
    for start in range(0, len(square), _CHUNK):
        pixels = torch.from_numpy(square[start : start + _CHUNK].astype(np.float32))
        smooth = functional.interpolate(
            pixels,
            size=(resolution, resolution),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        levels = smooth.round_().clamp_(0.0, 255.0).to(torch.uint8)
        resized[start : start + _CHUNK] = levels.numpy()
    return resized
