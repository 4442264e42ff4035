"""Custom release mechanisms, planted: rows of images, sums in two rounds, an unknown cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import normalize
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.mechanism import (
    ImageMechanism,
    NoiseSource,
    ReleaseMechanism,
    ReleaseSource,
    StoredRelease,
    clip_l2,
)
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.types import (
    GaussianEvent,
    Parameters,
    PrivacyEvent,
    Release,
    ReleaseParameters,
)


@dataclass(frozen=True, kw_only=True)
class HalfParameters(ReleaseParameters):
    mechanism: ClassVar[str] = "half"
    factor: float = 0.5


class Half(ImageMechanism):
    """Images of half the contrast."""

    parameters = HalfParameters

    def prepare(self, x: np.ndarray) -> np.ndarray:
        return 0.5 * x


@dataclass(frozen=True, kw_only=True)
class SumParameters(Parameters):
    mechanism: ClassVar[str] = "class_sums"
    stage: str
    clip_norm: float
    sigma: float
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class ReleasedSums(Release):
    """`sums` is float32 (K, D)."""

    parameters: SumParameters
    sums: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums}


class ClassSums(ReleaseMechanism[SumParameters]):
    """Sums over a client's images by class, then sums of their distances from public means."""

    parameters = SumParameters
    names = ("sums",)
    STAGES = ("means", "residuals")

    def plan(
        self, config: RunConfig, schedule: NoiseSchedule, *, shift: float, num_classes: int
    ) -> tuple[SumParameters, ...]:
        return sum_rounds(clip_norm=config.privacy.clip_norm)

    def event(self, parameters: SumParameters) -> GaussianEvent:
        return GaussianEvent(noise_multiplier=parameters.sigma / (2.0 * parameters.clip_norm))

    def check(self, parameters: SumParameters) -> None:
        if parameters.stage not in self.STAGES or not parameters.clip_norm > 0:
            raise ValueError(f"stage must be one of {', '.join(self.STAGES)}")

    def layout(
        self, parameters: SumParameters, count: int, image_shape: tuple[int, int, int]
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"sums": ("F32", (parameters.num_classes, int(np.prod(image_shape))))}

    def make(
        self, source: ReleaseSource, parameters: SumParameters, noise: NoiseSource
    ) -> Iterator[np.ndarray]:
        x = normalize(source.images, shift=0.0).flatten(1)
        if parameters.stage == "residuals":
            x = x - source.public["means"][torch.from_numpy(source.labels.copy())]
        x = clip_l2(x, clip_norm=parameters.clip_norm)
        sums = torch.zeros(parameters.num_classes, x.shape[1])
        sums.index_add_(0, torch.from_numpy(source.labels.copy()), x)
        z = np.empty(tuple(sums.shape), dtype=np.float32)
        noise.fill(z)
        yield sums.numpy() + z * np.float32(parameters.sigma / GRID)

    def gather(
        self, stored: Sequence[StoredRelease], digests: Sequence[bytes], labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        return {"sums": torch.stack([part.tensors["sums"] for part in stored]).sum(dim=0)}

    def restore(
        self, tensors: Mapping[str, torch.Tensor], *, check_values: bool, **made: Any
    ) -> ReleasedSums:
        sums = tensors["sums"]
        if sums.ndim != 2 or sums.dtype != torch.float32:
            raise ValueError(f"sums must be float32 (K, D), got {sums.dtype} {tuple(sums.shape)}")
        if check_values and not bool(sums.isfinite().all()):
            raise ValueError("sums: values that are not finite")
        return ReleasedSums(sums=sums, **made)

    def describe(self, parameters: SumParameters) -> str:
        return f"class sums, {parameters.stage}"

    def sentence(self, parameters: SumParameters) -> str:
        return "Sums over all images of a class are sent, covered with random noise."


def sum_rounds(*, clip_norm: float = 4.0) -> tuple[SumParameters, ...]:
    """Both rounds of class sums."""
    return tuple(
        SumParameters(stage=stage, clip_norm=clip_norm, sigma=5.0 * clip_norm, num_classes=3)
        for stage in ClassSums.STAGES
    )


@dataclass(frozen=True, kw_only=True)
class LaplaceEvent(PrivacyEvent):
    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class OddParameters(ReleaseParameters):
    mechanism: ClassVar[str] = "odd"


class Odd(ImageMechanism):
    """Costs what the accountant has never heard of."""

    parameters = OddParameters

    def event(self, parameters: ReleaseParameters) -> Any:
        return LaplaceEvent(noise_multiplier=1.0)
