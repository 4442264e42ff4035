"""Small images side by side in one array, and as a PNG in memory."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["png_bytes", "tile_images"]

_BETWEEN = 128  # grey between images


def tile_images(images: NDArray[np.uint8], *, columns: int, gap: int = 1) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W), C 1 or 3, as one RGB array (rows, columns, 3), row by row.

    `gap` grey pixels lie between images; places without an image are grey too. `ValueError` for no
    image, another type or shape, or fewer than one column.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 (N, 1 or 3, H, W), got {images.dtype} {images.shape}"
        )
    if len(images) < 1 or columns < 1:
        raise ValueError(f"need an image and a column, got {len(images)} and {columns}")
    _, _, height, width = images.shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), _BETWEEN, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 RGB (H, W, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return stream.getvalue()
