"""Many features of the small trained classifier: where in the image, not only whether.

A Frechet distance compares means and covariances. Ten images a class, repeated, have a covariance
of rank 49 over five classes: nearly that of 64 features, so these hardly notice. Of 512 features
most directions then have no variance at all, and each of them adds to the distance.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpdm.evaluation.features.extractor import check_images
from fedpdm.evaluation.features.trained import TrainedFeatures
from fedpdm.jobs.progress import sum_progress

__all__ = ["WIDTH", "MapFeatures"]

WIDTH: Final = 512  # 128 channels of the last convolution in each quarter of the image
_BATCH: Final = 256


class MapFeatures:
    """(N, 512): the last convolution's 128 channels, meaned over each quarter of the image."""

    name = f"maps-{WIDTH}"
    width = WIDTH

    def __init__(self, trained: TrainedFeatures) -> None:
        self._trained = trained
        self.digest = trained.digest

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(N, 512) of uint8 (N, C, H, W), of the trained size."""
        check_images(images)
        model, answers = self._trained.model, []
        device = next(model.parameters()).device
        show = sum_progress("features", "image", len(images))
        for start in range(0, len(images), _BATCH):
            x = torch.from_numpy(np.array(images[start : start + _BATCH])).to(device).float()
            maps = model.convolutions(x / 127.5 - 1.0)
            quarters = nn.functional.adaptive_avg_pool2d(maps, 2)
            answers.append(quarters.flatten(1).double().cpu().numpy())
            show(len(x))
        return np.concatenate(answers)
