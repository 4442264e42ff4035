"""The likelihood ratio of a release between two candidate images.

Of y = x_tilde / sqrt(abar) = c + sigma z with sigma^2 = (1 - abar) / abar, the log-likelihood
ratio of c = c_a against c = c_b, the most powerful statistic (Neyman and Pearson 1933), is

    <y, c_a - c_b> / sigma^2 - (||c_a||^2 - ||c_b||^2) / (2 sigma^2),

which is N(+-D^2 / (2 sigma^2), D^2 / sigma^2) at D = ||c_a - c_b||, + for a and - for b.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import normalize
from fedpdm.privacy.mechanism import clip_l2, prepared
from fedpdm.privacy.types import ReleasedDataset, ReleaseParameters

__all__ = ["Array", "check_release", "chunks", "clipped_means", "log_likelihood_ratios"]

Array = NDArray[np.float64]

_CHUNK_VALUES = 1 << 21


def chunks(num_rows: int, row_size: int) -> Iterator[slice]:
    """Slices of rows that bound memory."""
    rows = max(1, _CHUNK_VALUES // max(1, row_size))
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def clipped_means(images: NDArray[np.uint8], parameters: ReleaseParameters) -> Array:
    """What the noise is added to, before scaling: `CLIP(x - shift, C)`, float64 (n, d).

    A custom mechanism prepares x - shift first (`ImageMechanism.prepare`).

    Args:
        images: (n, C, H, W) uint8.
    """
    shifted = normalize(images, shift=parameters.shift).numpy()
    x = torch.from_numpy(prepared(shifted, parameters))
    clipped = clip_l2(x, clip_norm=parameters.clip_norm)
    return clipped.flatten(1).double().numpy()


def log_likelihood_ratios(
    x_tilde: torch.Tensor, mean_a: Array, mean_b: Array, parameters: ReleaseParameters
) -> Array:
    """For each row, evidence in nats that it shows `a` (positive) and not `b`, float64 (n,)."""
    y = x_tilde.flatten(1).double().numpy() / math.sqrt(parameters.alpha_bar)
    middle = (mean_a + mean_b) / 2.0  # <c_a - c_b, (c_a + c_b) / 2> is half the norms' difference
    ratios: Array = np.vecdot(y - middle, mean_a - mean_b) / parameters.sigma**2
    return ratios


def check_release(released: ReleasedDataset, shape: tuple[int, ...], *, name: str) -> None:
    """`ValueError` unless the release holds one finite row for each of (N, C, H, W) images."""
    x_tilde = released.x_tilde
    if tuple(x_tilde.shape) != tuple(shape):
        raise ValueError(
            f"{name} must release one row per image, {tuple(shape)}, got {tuple(x_tilde.shape)}"
        )
    if not bool(torch.isfinite(x_tilde).all()):
        raise ValueError(f"{name} must release finite values, got inf or nan")
    parameters = released.parameters
    if not (0.0 < parameters.alpha_bar < 1.0 and parameters.clip_norm > 0.0):
        raise ValueError(
            f"{name} must have alpha_bar in (0, 1) and clip_norm positive, "
            f"got {parameters.alpha_bar} and {parameters.clip_norm}"
        )
