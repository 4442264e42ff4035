"""Features of reference images with their mean and covariance, kept on disk by content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.evaluation.features.extractor import (
    FeatureExtractor,
    array_digest,
    cache_directory,
    check_images,
    tensor_digest,
)
from fedpdm.evaluation.metrics import FeatureStatistics, gaussian_statistics
from fedpdm.storage.files import StoreError, clear_leftovers, locked, read_tensors, write_tensors

__all__ = ["ReferenceFeatures", "reference_features"]

# Raise it with any change of what is stored.
VERSION: Final = "1"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceFeatures:
    """What an extractor makes of reference images.

    Attributes:
        extractor_name, extractor_digest: whose features these are.
        features: (N, d) float64, N >= 2.
        statistics: their mean and covariance.
    """

    extractor_name: str
    extractor_digest: str
    features: NDArray[np.float64]
    statistics: FeatureStatistics

    def rows(self, indices: NDArray[np.integer]) -> ReferenceFeatures:
        """Those of the images at `indices` (n,), n >= 2."""
        features = self.features[indices]
        return ReferenceFeatures(
            extractor_name=self.extractor_name,
            extractor_digest=self.extractor_digest,
            features=features,
            statistics=gaussian_statistics(features),
        )


def reference_features(
    images: NDArray[np.uint8], extractor: FeatureExtractor, *, cache: Path | None = None
) -> ReferenceFeatures:
    """Features of uint8 images (N, C, H, W), N >= 2, from the cache where it has them.

    The key is the digest of the images and of the extractor. A damaged file is made anew.

    Args:
        cache: a directory; default `cache_directory()`.

    Raises:
        ValueError: for unsuitable images.
        StoreError: if the cache cannot be written.
    """
    check_images(images)
    if len(images) < 2:
        raise ValueError(f"reference images must be at least 2, got {len(images)}")
    key = array_digest(VERSION, extractor.name, extractor.digest, images)
    path = cache_directory(cache) / "features" / f"reference-{key[:32]}.safetensors"
    with locked(path.with_suffix(".lock")):
        clear_leftovers(path.parent, of=path.name)
        stored = _read(path)
        if stored is None:
            features = extractor(images)
            statistics = gaussian_statistics(features)
            stored = {
                "features": torch.from_numpy(_narrowed(features)),
                "mean": torch.from_numpy(statistics.mean),
                "cov": torch.from_numpy(statistics.cov),
            }
            write_tensors(path, stored, {"digest": tensor_digest(stored)})
    features = stored["features"].double().numpy().copy()
    return ReferenceFeatures(
        extractor_name=extractor.name,
        extractor_digest=extractor.digest,
        features=features,
        statistics=FeatureStatistics(
            mean=stored["mean"].numpy().copy(),
            cov=stored["cov"].numpy().copy(),
            num_examples=len(features),
        ),
    )


def _narrowed(features: NDArray[np.float64]) -> NDArray[Any]:
    """As float32 where that keeps every value: networks compute in it."""
    narrow = features.astype(np.float32)
    return narrow if np.array_equal(narrow.astype(np.float64), features) else features


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors in a file, or None if there is none or it is not what was written."""
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
    except StoreError:
        return None
    if tensors.keys() != {"features", "mean", "cov"}:
        return None
    return tensors if tensor_digest(tensors) == metadata.get("digest") else None
