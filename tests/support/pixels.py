"""Random images, and a pattern for `pytest.raises` that matches a whole message."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    """Independent uniform values."""
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def exactly(text: str) -> str:
    """A pattern that only this text matches."""
    return f"^{re.escape(text)}$"
