"""How good and how new generated images are; numpy and scipy alone, all in float64.

Features are (N, d) arrays, one row per image; `PixelFeatures` makes them from pixels and any
network can make others. Every number here that is computed on raw images is a statistic of
raw data: the privacy guarantee does not cover it.
"""

from fedpdm.metrics.distances import (
    FeatureStatistics,
    assignment_distance,
    frechet_distance,
    gaussian_statistics,
    kernel_distance,
)
from fedpdm.metrics.neighbors import (
    PrecisionRecall,
    near_copy_fraction,
    near_copy_ratio,
    nearest_label,
    precision_recall,
)
from fedpdm.metrics.pixels import PixelFeatures

__all__ = [
    "FeatureStatistics",
    "PixelFeatures",
    "PrecisionRecall",
    "assignment_distance",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "near_copy_fraction",
    "near_copy_ratio",
    "nearest_label",
    "precision_recall",
]
