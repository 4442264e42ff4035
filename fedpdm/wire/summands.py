"""Coarse updates as summands: what clients add up without showing it, and what the sum says.

`fedpdm.wire.totals` does the same with class statistics.

SecAgg+ (Bell et al. 2020), as Flower implements it, sums vectors of integers modulo 2^32. Client k
with n_k images brings its update u_k = w_k - w_received, tensor by tensor in the order of their
names, and then a vector of known numbers. Flower multiplies by r_k = n_k / `max_examples`, rounds
to `levels` steps between -`secure_range` and that, masks, adds, and divides by the sum of the r_k:
what comes out is the weighted mean of the updates. The known numbers come out as another known
number: if masks do not cancel (a reply of another round, a client that made one up), they do not.
That shows a broken sum, not a client whose update is a lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpdm.config import AggregationConfig
from fedpdm.wire.types import CoarseUpdate

__all__ = [
    "MODULUS",
    "SumError",
    "SumTerms",
    "largest_error",
    "levels",
    "mean_update",
    "summand_shapes",
    "summands",
    "threshold",
    "update_terms",
]

MODULUS = 2**32
NUM_CHECKS = 8


class SumError(ValueError):
    """An update that cannot be part of a sum, or a sum that is none; one line."""


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """What Flower's protocol is told: numbers within `clipping_range` become whole ones of
    `target_range` steps; a client weighs its images over `max_weight`."""

    clipping_range: float
    target_range: int
    max_weight: float


def update_terms(section: AggregationConfig, num_clients: int) -> SumTerms:
    """Of sums of coarse updates."""
    return SumTerms(
        clipping_range=section.secure_range,
        target_range=levels(num_clients),
        max_weight=float(section.max_examples or 0),
    )


def levels(num_clients: int) -> int:
    """Steps of the rounding: as many as the sum of so many clients leaves room for, a power of 2.

    At most 2^30, for Flower rounds to int32.
    """
    return int(2 ** min(30, 32 - math.ceil(math.log2(num_clients + 1))))


def threshold(section: AggregationConfig, num_clients: int) -> int:
    """How many of a round's clients must stay to its end (Flower's rounding of the share)."""
    return max(2, round(section.secure_threshold * num_clients))


def summands(
    update: CoarseUpdate, received: Mapping[str, torch.Tensor], section: AggregationConfig
) -> list[np.ndarray]:
    """An update's float64 arrays, before Flower weighs, rounds and masks them.

    Raises `SumError` for a change of a weight beyond `secure_range`, which Flower would cut off
    silently, or for more images than `max_examples`.
    """
    who, most = f"client {update.client_id}", section.max_examples or 0
    if not 1 <= update.num_examples <= most:
        raise SumError(
            f"secure sum: {update.num_examples} images must be in [1, aggregation.max_examples "
            f"= {most}] ({who})"
        )
    arrays = []
    for name in sorted(received):
        change = update.weights[name].double() - received[name].double()
        largest = float(change.abs().max()) if change.numel() else 0.0
        if not largest <= section.secure_range:
            raise SumError(
                f"secure sum: {name} changed by {largest:g} in round {update.round}, "
                f"aggregation.secure_range is {section.secure_range:g} ({who})"
            )
        arrays.append(change.numpy())
    known = 0.5 * section.secure_range * most / update.num_examples
    return [*arrays, np.full(NUM_CHECKS, known)]


def summand_shapes(like: Mapping[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what a client sends: Flower's weight, the tensors, the known numbers."""
    return [(1,), *(tuple(like[name].shape) for name in sorted(like)), (NUM_CHECKS,)]


def largest_error(section: AggregationConfig, counts: Sequence[int]) -> float:
    """Bound on the rounding error of a weight of the mean update, for clients with these counts.

    Each of K summands is at most one step of 2 range / levels off, which the division by the sum
    of the r_k enlarges; each weight r_k is at most half of 1 / levels off, which moves a mean of
    numbers in [-range, range] by at most twice that, times range, over the sum of the r_k.
    """
    most, num = section.max_examples or 1, len(counts)
    step = 2.0 * section.secure_range / levels(num)
    return 2.0 * num * step / (sum(counts) / most)


def mean_update(
    arrays: Sequence[np.ndarray],
    like: Mapping[str, torch.Tensor],
    section: AggregationConfig,
    counts: Sequence[int],
) -> dict[str, torch.Tensor]:
    """The weighted mean of updates, float64, from what Flower's workflow hands over.

    `counts` are the images that the clients in the sum have said they have. Raises `SumError` if
    the sum cannot be of such clients.
    """
    shapes = summand_shapes(like)[1:]
    got = [tuple(array.shape) for array in arrays]
    if got != shapes:
        raise SumError(f"secure sum: expected {len(shapes)} arrays of the model's shapes")
    most = section.max_examples or 1
    wanted = 0.5 * section.secure_range * len(counts) / (sum(counts) / most)
    wrong = np.abs(np.asarray(arrays[-1], dtype=np.float64) - wanted).max()
    if not wrong <= 0.01 * wanted + largest_error(section, counts):  # else anything in their range
        raise SumError(
            "secure sum: the masks of the clients' updates do not cancel, so one of them sent "
            "something else; nothing of it is used"
        )
    return {
        name: torch.from_numpy(np.array(array, dtype=np.float64))
        for name, array in zip(sorted(like), arrays, strict=False)
    }
