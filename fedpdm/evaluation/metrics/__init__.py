"""How good and how new generated images are; numpy and scipy alone, all in float64.

Features are (N, d) arrays, one row per image; `PixelFeatures` makes them from pixels and any
network can make others. Every number here that is computed on raw images is a statistic of
raw data: the privacy guarantee does not cover it.
"""

from fedpdm.evaluation.metrics.distances import (
    FeatureStatistics,
    assignment_distance,
    frechet_distance,
    gaussian_statistics,
    kernel_distance,
)
from fedpdm.evaluation.metrics.extrapolation import (
    ExtrapolatedFrechet,
    FrechetReference,
    KernelDistance,
    frechet_at_infinity,
    kernel_distance_of_subsets,
)
from fedpdm.evaluation.metrics.manifolds import (
    DensityCoverage,
    ManifoldScores,
    PrecisionRecall,
    density_coverage,
    expected_coverage,
    manifold_scores,
    precision_recall,
)
from fedpdm.evaluation.metrics.nearest import Nearest, nearest_rows
from fedpdm.evaluation.metrics.neighbors import (
    near_copy_fraction,
    near_copy_ratio,
    nearest_label,
    search_copies,
)
from fedpdm.evaluation.metrics.pixels import PixelFeatures

__all__ = [
    "DensityCoverage",
    "ExtrapolatedFrechet",
    "FeatureStatistics",
    "FrechetReference",
    "KernelDistance",
    "ManifoldScores",
    "Nearest",
    "PixelFeatures",
    "PrecisionRecall",
    "assignment_distance",
    "density_coverage",
    "expected_coverage",
    "frechet_at_infinity",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "manifold_scores",
    "near_copy_fraction",
    "near_copy_ratio",
    "nearest_label",
    "nearest_rows",
    "precision_recall",
    "search_copies",
]
