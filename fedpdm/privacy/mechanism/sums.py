"""Noised sums as a release: what they were made with, what they look like, what they cannot be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedpdm.privacy.mechanism.whole import packed_size
from fedpdm.privacy.noise import LARGEST
from fedpdm.privacy.types import Parameters, Release

__all__ = [
    "STAGES",
    "ReleasedStatistics",
    "StatisticsParameters",
    "check_shapes",
    "check_stage",
    "check_sums",
    "component_stage",
]

STAGES = ("means", "pooled", "classes")
_MOVES = re.compile(r"components-[1-9][0-9]?")
MOST_IMAGES = 1 << 32  # in a sum, and sums in a release: what is claimed beyond is refused
MOST_PARTS = 4096


@dataclass(frozen=True, kw_only=True)
class StatisticsParameters(Parameters):
    """What one round of sums was made with.

    `stage` is one of `STAGES` or a `component_stage`, `mu` the round's Gaussian-DP parameter,
    `clip_norm` C or C_r in units of shifted images in [-1, 1], `dimensions` the most rows of the
    basis, `directions` the most rows of W, `num_classes` K, `shift` the public constant that is
    subtracted, `grid` as that of `ReleaseParameters`, `components` J the places that a class has in
    a component stage (else 1).
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
    components: int = field(default=1, metadata={"younger": True})

    @property
    def moves(self) -> bool:
        """Whether images are summed by the component that they are nearest to."""
        return self.stage not in STAGES

    @property
    def products(self) -> bool:
        """Whether sums are of products a a^T, and not of the vectors a."""
        return self.stage in ("pooled", "classes")

    @property
    def projected(self) -> bool:
        """Whether images are read in the directions W."""
        return self.moves or self.stage == "classes"

    @property
    def limit(self) -> int:
        """Largest sum of squares of an image's whole steps, without what counts it."""
        if self.products:
            return math.floor(self.grid * self.mu / math.sqrt(2.0))
        return math.floor((self.grid * self.mu / 2.0) ** 2)

    @property
    def weight(self) -> int:
        """In whole steps: an image's count of one in a component stage."""
        return math.isqrt(self.limit)

    @property
    def steps(self) -> float:
        """Whole steps for one unit of an image's coordinates."""
        return math.sqrt(self.limit) / self.clip_norm

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on a number, in units of images, or of their squares."""
        return self.grid / self.steps ** (2 if self.products else 1)

    @property
    def sensitivity(self) -> float:
        """In whole steps: by how much replacing an image by another of its label moves the sums."""
        if self.products:
            return math.sqrt(2.0) * self.limit
        return 2.0 * math.sqrt(self.limit)

    @property
    def largest(self) -> int:
        """In whole steps: the most that an image adds to a number of a sum, in magnitude."""
        return self.limit if self.products else math.isqrt(self.limit)

    def size(self, image_dimensions: int) -> int:
        """Numbers in each sum, of images with so many pixels times channels."""
        p = min(self.dimensions, image_dimensions)
        if self.stage == "means":
            return p
        q = min(self.directions, p)
        if self.moves:
            return self.components * (q + 1)
        return packed_size(p if self.stage == "pooled" else q)


@dataclass(frozen=True, kw_only=True)
class ReleasedStatistics(Release):
    """R noised sums of one client, in whole steps: one for each time that it released new images.

    `counts` is int64 (R, K), images of each class in a sum. `sums` is int64 (R, K, p) for means,
    (R, 1, packed p x p) for pooled, (R, K, packed q x q) for classes, (R, K, J (q + 1)) for
    components: of each the sum of its images and their number, in steps of `weight`. `directions`
    is float32 (R, q, p), the W that sums were made with, q = 0 for means and pooled.

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


def component_stage(number: int) -> str:
    """The stage in which components move for the `number`-th time, from 1."""
    return f"components-{number}"


def check_stage(parameters: StatisticsParameters) -> None:
    """`ValueError` for a stage that there is not, or with another number of components."""
    stage, components = parameters.stage, parameters.components
    if stage not in STAGES and not _MOVES.fullmatch(stage):
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, components-N, got {stage!r}")
    if components < 1 or (components > 1) != parameters.moves:
        raise ValueError(f"components must be 1, or more in components-N, got {components}")


def check_shapes(released: ReleasedStatistics) -> None:
    """`ValueError` for types and shapes that no sums with these parameters have."""
    parameters, totalled = released.parameters, released.totalled
    counts, sums, directions = released.counts, released.sums, released.directions
    rows = 1 if parameters.stage == "pooled" else parameters.num_classes
    parts = counts.shape[0] if counts.ndim else 0
    p = directions.shape[-1] if directions.ndim else 0
    q = min(parameters.directions, p) if parameters.projected else 0
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
