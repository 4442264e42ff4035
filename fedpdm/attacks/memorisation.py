"""Memorisation: generated images that are copies of training images.

Carlini et al. 2023, "Extracting training data from diffusion models", section 5.1. With x the
nearest of the training images to a generated image g and S its n nearest ones, the *ratio* is

    l2(g, x) / (a mean over y in S of l2(g, y)),      flagged at <= 1,  n = 50, a = 0.5,

(docs/attacks.md). The *absolute distance* is their section 4.1's, the root mean square of
the differences, with pixels in [0, 1]; which distance is near depends on the data, so the
threshold is taken from images that nobody trained on: the distance that only a small share of
held-out images comes below (`judge_by_control`).

Both run on pixels or on features of any network (float arrays).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedpdm.evaluation.metrics import search_copies

__all__ = [
    "ControlJudgement",
    "Memorisation",
    "MemorisationSummary",
    "binomial_interval",
    "find_memorised",
    "judge_by_control",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MemorisationSummary:
    """The search in numbers; `dataclasses.asdict` of it is JSON.

    `space` is what distances were taken in. `flagged_low` and `flagged_high` bound the rate of
    flagged images at `confidence` (Clopper and Pearson 1934). `distance_unit` says what
    `distance_quantiles` (minimum, 1%, 5%, 50%, 95%, maximum) are in.
    """

    space: str
    num_generated: int
    num_training: int
    num_neighbors: int
    threshold_ratio: float
    num_flagged: int
    flagged_fraction: float
    flagged_low: float
    flagged_high: float
    confidence: float
    smallest_ratio: float
    distance_unit: str
    distance_quantiles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Memorisation:
    """`summary`, and per generated image (N,): `ratios` and `distances` float64, `nearest` int64
    (position of the nearest training image), `flagged` bool (ratio at most 1).
    """

    summary: MemorisationSummary
    ratios: Array
    distances: Array
    nearest: NDArray[np.int64]
    flagged: NDArray[np.bool_]

    def worst(self, count: int) -> NDArray[np.int64]:
        """Positions of the `count` generated images with the smallest ratios, worst first."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return np.lexsort((self.distances, self.ratios))[:count].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ControlJudgement:
    """Absolute distances of generated images against those of held-out images.

    `threshold` is the distance below which a share `control_share` of the held-out images (at most)
    lies; `num_near` of the generated images, a share `near_fraction` in [`near_low`, `near_high`],
    lie below it. At chance the share is `control_share` or less. `control_flagged_fraction` of the
    held-out images have a ratio of at most 1, in [`control_flagged_low`, `control_flagged_high`]:
    some images differ little by nature, such as the digit one. Only a flagged share above this one
    means memorisation.
    """

    control_share: float
    num_control: int
    threshold: float
    num_near: int
    near_fraction: float
    near_low: float
    near_high: float
    control_flagged_fraction: float
    control_flagged_low: float
    control_flagged_high: float
    confidence: float


_QUANTILES = (0.0, 0.01, 0.05, 0.5, 0.95, 1.0)


def find_memorised(
    generated: NDArray[Any],
    training: NDArray[Any],
    *,
    threshold_ratio: float = 0.5,
    num_neighbors: int = 50,
    space: str = "pixels",
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Memorisation:
    """Search the training images for copies in the generated ones.

    The same search on held-out images in place of generated ones is the control.

    Args:
        generated: (N, C, H, W) uint8, or (N, d) features.
        training: (M, C, H, W) uint8 or (M, d) features, of the same kind.
        threshold_ratio: a > 0; num_neighbors: n in [2, M].
        space: what the values are, for the summary.
        confidence: of the interval of the flagged share.
        progress: called with (images done, N).

    Raises:
        ValueError: for arrays that do not fit together or a parameter out of bounds.
    """
    ratios, found = search_copies(
        generated,
        training,
        threshold_ratio=threshold_ratio,
        n=num_neighbors,
        progress=progress,
    )
    is_pixels = generated.dtype == np.uint8
    scale = math.sqrt(math.prod(generated.shape[1:])) * (255.0 if is_pixels else 1.0)
    distances = found.distances[:, 0] / scale
    flagged = ratios <= 1.0
    num_flagged = int(flagged.sum())
    low, high = binomial_interval(num_flagged, len(flagged), confidence=confidence)
    summary = MemorisationSummary(
        space=space,
        num_generated=len(ratios),
        num_training=len(training),
        num_neighbors=num_neighbors,
        threshold_ratio=threshold_ratio,
        num_flagged=num_flagged,
        flagged_fraction=num_flagged / len(flagged),
        flagged_low=low,
        flagged_high=high,
        confidence=confidence,
        smallest_ratio=float(ratios.min()),
        distance_unit=f"root mean square, {'pixels in [0, 1]' if is_pixels else 'features'}",
        distance_quantiles=tuple(float(q) for q in np.quantile(distances, _QUANTILES)),
    )
    return Memorisation(
        summary=summary,
        ratios=ratios,
        distances=distances,
        nearest=found.indices[:, 0],
        flagged=flagged,
    )


def judge_by_control(
    generated: Memorisation,
    control: Memorisation,
    *,
    control_share: float = 0.01,
    confidence: float = 0.95,
) -> ControlJudgement:
    """How many generated images are nearer to a training image than held-out images are.

    Args:
        generated, control: the search on generated, and on held-out images, against the same
            training images in the same space.
        control_share: share of the held-out images that the threshold lets through, in (0, 1).

    Raises:
        ValueError: for searches that cannot be compared, a share outside (0, 1), or too few
            held-out images for it.
    """
    ours, theirs = generated.summary, control.summary
    for name in ("space", "num_training", "distance_unit"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"control.{name} must be that of generated, {getattr(ours, name)!r}, "
                f"got {getattr(theirs, name)!r}"
            )
    if not 0.0 < control_share < 1.0:
        raise ValueError(f"control_share must be in (0, 1), got {control_share}")
    allowed = math.floor(control_share * theirs.num_generated + 1e-9)
    if allowed < 1:
        raise ValueError(
            f"control must hold at least {math.ceil(1.0 / control_share)} images for "
            f"control_share {control_share:g}, got {theirs.num_generated}"
        )
    threshold = float(np.sort(control.distances)[allowed])  # `allowed` of them lie below it
    num_near = int((generated.distances < threshold).sum())
    control_low, control_high = binomial_interval(
        theirs.num_flagged, theirs.num_generated, confidence=confidence
    )
    low, high = binomial_interval(num_near, ours.num_generated, confidence=confidence)
    return ControlJudgement(
        control_share=control_share,
        num_control=theirs.num_generated,
        threshold=threshold,
        num_near=num_near,
        near_fraction=num_near / ours.num_generated,
        near_low=low,
        near_high=high,
        control_flagged_fraction=theirs.flagged_fraction,
        control_flagged_low=control_low,
        control_flagged_high=control_high,
        confidence=confidence,
    )


def binomial_interval(successes: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a rate (Clopper and Pearson 1934)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)
