"""The mechanism once more, in numpy, with faults to plant; the attacks' tests release with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import ImageSet
from fedpdm.privacy.types import GaussianEvent, ReleasedDataset, ReleaseParameters

Array = NDArray[np.float64]
STEPS = 4096


@dataclass(frozen=True, kw_only=True)
class Path:
    """A release path. `mu` is 2 C / sigma; the rest are faults, absent by default."""

    clip_norm: float = 4.0
    mu: float = 2.0
    shift: float = 0.0
    noise_scale: float = 1.0
    real_clip_norm: float | None = None
    change: Callable[[Array], Array] | None = None  # of the noise z, (N, d)

    @property
    def parameters(self) -> ReleaseParameters:
        sigma = 2.0 * self.clip_norm / self.mu
        return ReleaseParameters(
            t0=500,
            clip_norm=self.clip_norm,
            shift=self.shift,
            schedule="linear",
            num_steps=1000,
            alpha_bar=1.0 / (1.0 + sigma**2),
            grid=STEPS,
        )

    def clipped(self, images: ImageSet, clip_norm: float | None = None) -> Array:
        """CLIP(x - shift, C), float64 (N, d)."""
        x = images.images.reshape(len(images), -1) / 127.5 - 1.0 - self.shift
        norms = np.maximum(np.linalg.norm(x, axis=1), 1e-12)
        return x * np.minimum(1.0, (clip_norm or self.clip_norm) / norms)[:, None]

    def release(self, images: ImageSet, rng: np.random.Generator) -> ReleasedDataset:
        """On the grid, like the real one."""
        z = rng.standard_normal((len(images), images.images[0].size))
        z = self.noise_scale * (self.change(z) if self.change else z)
        abar = self.parameters.alpha_bar
        step = math.sqrt(1.0 - abar) / STEPS
        signal = math.sqrt(abar) * self.clipped(images, self.real_clip_norm)
        x_tilde = step * (np.rint(signal / step) + np.rint(STEPS * z))
        extra: dict[str, Any] = {"noise_source": "test", "seeded": True}
        return ReleasedDataset(
            x_tilde=torch.from_numpy(x_tilde.reshape(images.images.shape).astype(np.float32)),
            labels=torch.from_numpy(np.array(images.labels)),
            parameters=self.parameters,
            event=GaussianEvent(noise_multiplier=1.0 / self.mu),
            **extra,
        )


class KnownNoise:
    """A stream that somebody else could draw again."""

    seeded = True

    def __init__(self, seed: int) -> None:
        self.description = f"seed {seed}"
        self._rng = np.random.default_rng(seed)

    def fill(self, out: np.ndarray) -> None:
        out[...] = np.rint(STEPS * self._rng.standard_normal(out.shape))


def random_images(
    count: int, rng: np.random.Generator, shape: tuple[int, int, int] = (1, 8, 8)
) -> ImageSet:
    """Images of varied brightness and contrast, so that their distances differ."""
    contrast = rng.uniform(5, 120, size=(count, 1, 1, 1))
    pixels = rng.uniform(0, 255, size=(count, 1, 1, 1)) + contrast * rng.standard_normal(
        (count, *shape)
    )
    return ImageSet(
        images=np.clip(np.rint(pixels), 0, 255).astype(np.uint8),
        labels=np.zeros(count, dtype=np.int64),
        class_names=("any",),
        background=0.0,
    )
