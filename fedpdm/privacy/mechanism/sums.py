"""Noised sums as a release: what they were made with, what they look like, what they cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpdm.privacy.mechanism.whole import packed_size
from fedpdm.privacy.noise import LARGEST
from fedpdm.privacy.types import Parameters, Release

__all__ = ["STAGES", "ReleasedStatistics", "StatisticsParameters", "check_shapes", "check_sums"]

STAGES = ("means", "pooled", "classes")
MOST_IMAGES = 1 << 32  # in a sum, and sums in a release: what is claimed beyond is refused
MOST_PARTS = 4096


@dataclass(frozen=True, kw_only=True)
class StatisticsParameters(Parameters):
    """What one round of sums was made with.

    `stage` is one of `STAGES`, `mu` the round's Gaussian-DP parameter, `clip_norm` C or C_r in
    units of shifted images in [-1, 1], `dimensions` the most rows of the basis, `directions` the
    most rows of W, `num_classes` K, `shift` the public constant that is subtracted, `grid` as that
    of `ReleaseParameters`.
    """

    mechanism: ClassVar[str] = "statistics"

    stage: str
    mu: float
    clip_norm: float
    dimensions: int
    directions: int
    num_classes: int
    shift: float
    grid: int

    @property
    def limit(self) -> int:
        """Largest sum of squares of an image's whole steps."""
        if self.stage == "means":
            return math.floor((self.grid * self.mu / 2.0) ** 2)
        return math.floor(self.grid * self.mu / math.sqrt(2.0))

    @property
    def steps(self) -> float:
        """Whole steps for one unit of an image's coordinates."""
        return math.sqrt(self.limit) / self.clip_norm

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on a number, in units of images, or of their squares."""
        return self.grid / self.steps ** (1 if self.stage == "means" else 2)

    @property
    def sensitivity(self) -> float:
        """In whole steps: by how much replacing an image by another of its label moves the sums."""
        if self.stage == "means":
            return 2.0 * math.sqrt(self.limit)
        return math.sqrt(2.0) * self.limit

    @property
    def largest(self) -> int:
        """In whole steps: the most that an image adds to a number of a sum, in magnitude."""
        return math.isqrt(self.limit) if self.stage == "means" else self.limit

    def size(self, image_dimensions: int) -> int:
        """Numbers in each sum, of images with so many pixels times channels."""
        p = min(self.dimensions, image_dimensions)
        if self.stage == "means":
            return p
        return packed_size(p if self.stage == "pooled" else min(self.directions, p))


@dataclass(frozen=True, kw_only=True)
class ReleasedStatistics(Release):
    """R noised sums of one client, in whole steps: one for each time that it released new images.

    `counts` is int64 (R, K), images of each class in a sum. `sums` is int64 (R, K, p) for means,
    (R, 1, packed p x p) for pooled, (R, K, packed q x q) for classes. `directions` is float32
    (R, q, p), the W that sums were made with, q = 0 but for classes.

    The total of several clients' sums is one as well, with R = 1 and `totalled`, int64 (R, rows):
    how many noised sums are in each. Of a client it is None.
    """

    parameters: StatisticsParameters
    counts: torch.Tensor
    sums: torch.Tensor
    directions: torch.Tensor
    totalled: torch.Tensor | None = None

    @property
    def noisy(self) -> torch.Tensor:
        """How many times each sum was noised, int64 (R, rows): a sum of no images was not."""
        if self.totalled is not None:
            return self.totalled
        images = self.counts.sum(dim=1, keepdim=True)
        return ((images if self.parameters.stage == "pooled" else self.counts) > 0).long()

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"counts": self.counts, "sums": self.sums, "directions": self.directions}
        return own if self.totalled is None else {**own, "totalled": self.totalled}


def check_shapes(released: ReleasedStatistics) -> None:
    """`ValueError` for types and shapes that no sums with these parameters have."""
    parameters, totalled = released.parameters, released.totalled
    counts, sums, directions = released.counts, released.sums, released.directions
    rows = 1 if parameters.stage == "pooled" else parameters.num_classes
    parts = counts.shape[0] if counts.ndim else 0
    p = directions.shape[-1] if directions.ndim else 0
    q = min(parameters.directions, p) if parameters.stage == "classes" else 0
    if (
        (counts.dtype, sums.dtype, directions.dtype) != (torch.int64, torch.int64, torch.float32)
        or not 1 <= parts <= MOST_PARTS
        or not 1 <= p <= parameters.dimensions
        or counts.shape != (parts, parameters.num_classes)
        or sums.shape != (parts, rows, parameters.size(p))
        or directions.shape != (parts, q, p)
    ):
        raise ValueError(
            f"{parameters.stage}: counts, sums and directions must be int64, int64 and float32 of "
            f"matching shapes for {parameters.num_classes} classes, got {counts.dtype} "
            f"{tuple(counts.shape)}, {sums.dtype} {tuple(sums.shape)} and {directions.dtype} "
            f"{tuple(directions.shape)}"
        )
    if totalled is not None and (totalled.dtype, totalled.shape) != (torch.int64, (parts, rows)):
        raise ValueError(f"{parameters.stage}: totalled must be int64 ({parts}, {rows})")


def check_sums(released: ReleasedStatistics) -> None:
    """`ValueError` for numbers that no images and no noise can give."""
    counts, directions, stage = released.counts, released.directions, released.parameters.stage
    if int(counts.min()) < 0 or int(counts.max()) > MOST_IMAGES:
        raise ValueError(f"{stage}: counts must be in [0, {MOST_IMAGES}]")
    if not bool((directions.abs() <= 1.01).all()):  # NaN is not; bfloat16 rounds a little up
        raise ValueError(f"{stage}: directions must be in [-1, 1]")
    images = counts.sum(dim=1, keepdim=True) if stage == "pooled" else counts
    noise = released.noisy.double() * LARGEST
    most = torch.where(images > 0, images.double() * released.parameters.largest + noise, 0.0)
    largest = released.sums.double().abs().amax(dim=2)
    over = largest > most
    if bool(over.any()):
        part, row = (int(at) for at in over.nonzero()[0])
        raise ValueError(
            f"{stage}: a sum of {int(images[part, row])} images must be within "
            f"{float(most[part, row]):.6g} steps, got {float(largest[part, row]):.6g}"
        )
