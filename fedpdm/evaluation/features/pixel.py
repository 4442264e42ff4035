"""Principal components of pixels as a feature extractor."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpdm.evaluation.features.extractor import array_digest, check_images
from fedpdm.evaluation.metrics import PixelFeatures

__all__ = ["PixelExtractor"]


@dataclass(frozen=True, eq=False)
class PixelExtractor:
    """`PixelFeatures` under the name `pixel-d`, d their number of components."""

    pixels: PixelFeatures

    @classmethod
    def fit(cls, images: NDArray[np.uint8], *, num_components: int = 32) -> PixelExtractor:
        """Fit on (N, C, H, W) uint8 images; bounds and errors as `PixelFeatures.fit`."""
        return cls(PixelFeatures.fit(images, num_components=num_components))

    @property
    def name(self) -> str:
        return f"pixel-{len(self.pixels.components)}"

    @functools.cached_property
    def digest(self) -> str:
        return array_digest(self.pixels.mean, self.pixels.components)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        check_images(images)
        return self.pixels(images)
