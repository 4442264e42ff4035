"""What an image is known by: SHA-256 digests of pixels, private like the pixels themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["identity", "pixel_digest", "stack_digests"]


def pixel_digest(pixels: NDArray[np.generic]) -> bytes:
    """SHA-256, 32 bytes, of shape and values of one image (C, H, W), whatever its memory layout."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()


def identity(pixels: NDArray[np.uint8]) -> bytes:
    """The digest of an image (C, H, W) as it came in, before any step that a config can change.

    Three equal bands count as one: a grey picture is the same picture when it is saved in colour.
    """
    if len(pixels) == 3 and (pixels[1:] == pixels[:1]).all():
        pixels = pixels[:1]
    return pixel_digest(pixels)


def stack_digests(digests: Iterable[bytes]) -> NDArray[np.uint8]:
    """Digests as rows, uint8 (n, 32)."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
