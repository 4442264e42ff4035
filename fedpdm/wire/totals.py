"""Class statistics as summands: what clients add up without showing it, exactly.

Sums of class statistics are whole numbers, and what secure aggregation adds up are whole numbers:
nothing is rounded. A number v of at most `most` in magnitude becomes the digits of v + most to the
base `levels`, each of which has room in a sum of all clients modulo 2^32. Flower is told a range
under which its rounding changes nothing, and that every client weighs one.

A client sends, as float64 arrays: how many images of each class are in its sums, and how many
times each was noised; the digits; known numbers, which come out as others if masks do not cancel.
So the server learns no client's sums, and counts of all together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedpdm.config import AggregationConfig
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
    SeededNoise,
    StatisticsParameters,
    SystemNoise,
    mechanism_of,
)
from fedpdm.privacy.noise import LARGEST
from fedpdm.wire.summands import NUM_CHECKS, SumError, SumTerms, levels

__all__ = ["MOST_SUMS", "sum_terms", "total_from", "total_shapes", "total_summands"]

MOST_SUMS = 64  # that a client may have made in one round, as new images came


def sum_terms(num_clients: int) -> SumTerms:
    """Numbers in [0, levels) are moved to both sides of zero, and rounded in steps of one."""
    base = levels(num_clients)
    return SumTerms(clipping_range=base / 2.0, target_range=base, max_weight=1.0)


def _most(parameters: StatisticsParameters, section: AggregationConfig) -> int:
    """In whole steps: the most that a number of a client's sums can be, in magnitude."""
    return (section.max_examples or 0) * parameters.largest + MOST_SUMS * LARGEST


def total_shapes(
    parameters: StatisticsParameters,
    section: AggregationConfig,
    *,
    image_dimensions: int,
    num_clients: int,
) -> list[tuple[int, ...]]:
    """Shapes of what a client sends: Flower's weight, numbers of images and of sums, digits, known
    numbers."""
    rows = 1 if parameters.stage == "pooled" else parameters.num_classes
    bits = levels(num_clients).bit_length() - 1
    digits = -(-(2 * _most(parameters, section)).bit_length() // bits)
    size = rows * parameters.size(image_dimensions)
    return [(1,), (parameters.num_classes + rows,), (digits, size), (NUM_CHECKS,)]


def _known(num_clients: int) -> int:
    return levels(num_clients) // 3


def total_summands(
    total: ReleasedStatistics, section: AggregationConfig, *, num_clients: int, who: str
) -> list[np.ndarray]:
    """A client's total (R = 1) as float64 arrays, before Flower rounds and masks them.

    `SumError` for more images than `max_examples`, or more sums than `MOST_SUMS`.
    """
    parameters, base = total.parameters, levels(num_clients)
    images, noisy = int(total.counts.sum()), int(total.noisy.max())
    if not 1 <= images <= (section.max_examples or 0):
        raise SumError(
            f"secure sum: {images} images must be in [1, aggregation.max_examples = "
            f"{section.max_examples}] ({who})"
        )
    if noisy > MOST_SUMS:
        raise SumError(f"secure sum: {noisy} sums must be at most {MOST_SUMS} ({who})")
    _, head, (digits, size), _ = total_shapes(
        parameters,
        section,
        image_dimensions=total.directions.shape[2],
        num_clients=num_clients,
    )
    most = _most(parameters, section)
    left = total.sums.clamp(-most, most).numpy().reshape(size) + most  # turned ones may be beyond
    rows = np.empty((digits, size), dtype=np.int64)
    for row in rows:
        left, row[:] = np.divmod(left, base)
    first = torch.cat([total.counts[0], total.noisy[0]]).numpy().reshape(head)
    arrays = [first, rows, np.full(NUM_CHECKS, _known(num_clients))]
    return [array.astype(np.float64) - base / 2.0 for array in arrays]


def total_from(
    arrays: Sequence[np.ndarray],
    parameters: StatisticsParameters,
    directions: torch.Tensor,
    section: AggregationConfig,
    *,
    num_clients: int,
    num_sent: int,
    seeded: bool,
) -> ReleasedStatistics:
    """The total of `num_sent` clients, of `num_clients` that were asked, from what Flower's
    workflow hands over: their mean.

    `directions` float32 (q, p) are the W that they were asked with, filled up with zeros. Raises
    `SumError` if the arrays cannot be a total of such clients.
    """
    p = directions.shape[1]
    shapes = total_shapes(parameters, section, image_dimensions=p, num_clients=num_clients)[1:]
    if [tuple(array.shape) for array in arrays] != shapes:
        raise SumError(f"secure sum: expected arrays of shapes {shapes}")
    wide = [np.asarray(array, dtype=np.float64) for array in arrays]
    if not all(bool(np.isfinite(array).all()) for array in wide):
        raise SumError("secure sum: numbers that are not finite")
    base = levels(num_clients)
    first, digits, known = (
        np.rint((array + base / 2.0) * num_sent).astype(np.int64) for array in wide
    )
    if not (known == num_sent * _known(num_clients)).all():
        raise SumError(
            "secure sum: the masks of the clients' sums do not cancel, so one of them sent "
            "something else; nothing of it is used"
        )
    sums = np.full(digits.shape[1], -num_sent * _most(parameters, section))
    for place, row in enumerate(digits):
        sums += row * base**place
    counts, noisy = (
        torch.from_numpy(part.copy())[None] for part in np.split(first, [parameters.num_classes])
    )
    images, most = int(counts.sum()), num_sent * (section.max_examples or 0)
    if not 1 <= images <= most:
        raise SumError(f"secure sum: {images} images in all; must be in [1, {most}]")
    if not 0 <= int(noisy.min()) <= int(noisy.max()) <= num_sent * MOST_SUMS:
        raise SumError(f"secure sum: noise of {int(noisy.max())} sums of {num_sent} clients")
    mechanism = mechanism_of(parameters)
    try:
        total = mechanism.restore(
            {
                "counts": counts,
                "sums": torch.from_numpy(sums).view(1, noisy.shape[1], -1),
                "directions": directions[None],
                "totalled": noisy,
            },
            parameters=parameters,
            event=mechanism.event(parameters),
            noise_source=(SeededNoise if seeded else SystemNoise).description,
            seeded=seeded,
            check_values=True,
        )
    except ValueError as error:
        raise SumError(f"secure sum: {error}") from None
    assert isinstance(total, ReleasedStatistics)
    return total
