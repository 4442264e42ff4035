"""What every feature extractor is, where its files are kept, and digests of contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["FeatureExtractor", "array_digest", "cache_directory", "check_images", "tensor_digest"]


class FeatureExtractor(Protocol):
    """A map from images to vectors.

    Attributes:
        name: what its numbers are printed under, such as `trained-64`.
        digest: SHA-256 over what the map depends on (its weights); hexadecimal. Numbers of two
            extractors compare only if both name and digest are equal.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(N, d) float64 of uint8 (N, C, H, W), N >= 1; `ValueError` for anything else."""
        ...


def cache_directory(given: Path | None = None) -> Path:
    """The directory given, or the environment variable FEDPDM_CACHE, or ~/.cache/fedpdm."""
    chosen = given or os.environ.get("FEDPDM_CACHE") or Path("~/.cache/fedpdm")
    return Path(chosen).expanduser().absolute()


def array_digest(*parts: NDArray[Any] | str) -> str:
    """SHA-256, hexadecimal, over the arrays' shapes, dtypes and values, and over the texts."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            sha.update(f"text {len(part)} {part}".encode())
        else:
            sha.update(f"array {part.shape}{part.dtype.str}".encode())
            sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """`array_digest` of named tensors of any device, in the order of their names."""
    parts: list[NDArray[Any] | str] = []
    for name in sorted(tensors):
        parts += [name, tensors[name].detach().cpu().numpy()]
    return array_digest(*parts)


def check_images(images: Any, *, channels: tuple[int, ...] = (1, 3)) -> None:
    """`ValueError` unless the images are a uint8 array (N, C, H, W), N >= 1, C one of these."""
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1] not in channels
        or 0 in images.shape
    ):
        wanted = " or ".join(map(str, channels))
        raise ValueError(
            f"images must be uint8 of shape (N, C, H, W) with N at least 1 and C {wanted}, got "
            f"{getattr(images, 'dtype', type(images).__name__)} "
            f"of shape {getattr(images, 'shape', ())}"
        )
