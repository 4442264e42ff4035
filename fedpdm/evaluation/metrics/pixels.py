"""Features from pixels: principal components, where no pretrained network is at hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from fedpdm.evaluation.metrics.arrays import Array, flat_pixels

__all__ = ["PixelFeatures"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelFeatures:
    """Principal components of pixels scaled to [-1, 1] (`x / 127.5 - 1`).

    Features for a Frechet or kernel distance where no pretrained network is at hand. Such
    distances are no FID: compare them with each other only, at the same reference images.

    Attributes:
        mean: (D,) mean scaled image, D = C * H * W.
        components: (k, D) orthonormal rows, by falling variance; in each row the entry of
            largest size is positive, so that a fit is reproducible.
    """

    mean: Array
    components: Array

    @classmethod
    def fit(
        cls, reference_images_uint8: NDArray[np.uint8], *, num_components: int
    ) -> PixelFeatures:
        """Fit on (N, C, H, W) uint8 images; `num_components` k is in [1, min(N - 1, D)].

        Time grows with min(N, D)^3: at 64x64 RGB, give a few thousand images.

        Raises:
            ValueError: if the images are not uint8 (N, C, H, W) or k is out of bounds.
        """
        scaled = flat_pixels(reference_images_uint8, name="reference_images_uint8") / 127.5 - 1.0
        num_images, num_pixels = scaled.shape
        highest = min(num_images - 1, num_pixels)
        if not 1 <= num_components <= highest:
            raise ValueError(f"num_components must be in [1, {highest}], got {num_components}")
        mean = scaled.mean(axis=0)
        scaled -= mean
        if num_images > num_pixels:
            _, vectors = _largest_eigenvectors(scaled.T @ scaled, num_components)
            components = vectors.T
        else:
            _, vectors = _largest_eigenvectors(scaled @ scaled.T, num_components)
            components = np.linalg.qr(scaled.T @ vectors)[0].T
        largest = np.abs(components).argmax(axis=1)[:, None]
        components = components * np.where(np.take_along_axis(components, largest, 1) < 0, -1, 1)
        return cls(mean=mean, components=components)

    def __call__(self, images: NDArray[np.uint8]) -> Array:
        """(N, k) float64 coordinates of (N, C, H, W) uint8 images of the fitted size."""
        pixels = flat_pixels(images, name="images")
        if pixels.shape[1] != len(self.mean):
            raise ValueError(f"images must have {len(self.mean)} values, got {pixels.shape[1]}")
        centred = pixels / 127.5 - 1.0 - self.mean
        features: Array = centred @ self.components.T
        return features


def _largest_eigenvectors(matrix: Array, count: int) -> tuple[Array, Array]:
    """Largest `count` eigenvalues (count,) and eigenvectors (n, count), falling."""
    bounds = (len(matrix) - count, len(matrix) - 1)
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=bounds)
    return values[::-1], vectors[:, ::-1]
