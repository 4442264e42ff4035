"""From the events of all that was done to an image to one event.

Gaussian mechanisms add up as mu^2 = sum mu_i^2, exactly; subsampled ones that are alike add up
their rounds. What is left is a `ComposedEvent`. These functions and no others read events.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import overload

from fedpdm.privacy.types import (
    ComposedEvent,
    GaussianEvent,
    PrivacyEvent,
    SubsampledGaussianEvent,
)

__all__ = ["compose", "grouped", "mu_of", "multiplier_of", "read_events", "repeated"]


def multiplier_of(event: PrivacyEvent) -> float:
    """Of a Gaussian event; `ValueError` for any other.

    A subclass is another: it may mean something else.
    """
    if type(event) is not GaussianEvent:
        raise _unreadable(event)
    return event.noise_multiplier


def _unreadable(event: PrivacyEvent) -> ValueError:
    return ValueError(f"the accountant cannot read events of type {type(event).__name__}")


def mu_of(event: PrivacyEvent) -> float:
    """1 / multiplier: the distance of two outputs in units of the noise; inf without noise."""
    multiplier = multiplier_of(event)
    if not multiplier > 0:  # NaN counts as no noise
        return math.inf
    return 1.0 / multiplier


def read_events(events: Iterable[PrivacyEvent]) -> ComposedEvent:
    """All `events` in one: the Gaussian ones together, subsampled ones that are alike together.

    What adds infinite noise is left out. `ValueError` for an event that cannot be read.
    """
    mus: list[float] = []
    rounds: dict[tuple[float, float], int] = {}
    for event in events:
        gaussian: PrivacyEvent = event
        subsampled: tuple[PrivacyEvent, ...] = ()
        if type(event) is ComposedEvent:
            gaussian, subsampled = event.gaussian, event.subsampled
        elif type(event) is SubsampledGaussianEvent:
            gaussian, subsampled = GaussianEvent(noise_multiplier=math.inf), (event,)
        mus.append(mu_of(gaussian))
        for part in subsampled:
            if type(part) is not SubsampledGaussianEvent:
                raise _unreadable(part)
            if not 0.0 < part.sample_rate <= 1.0 or part.rounds < 1:
                raise ValueError(
                    "sample_rate must be in (0, 1] and rounds at least 1, "
                    f"got {part.sample_rate} and {part.rounds}"
                )
            noise = part.noise_multiplier if part.noise_multiplier > 0 else 0.0
            like = (part.sample_rate, noise)
            if noise < math.inf:
                rounds[like] = rounds.get(like, 0) + part.rounds
    mu = math.hypot(*mus)
    return ComposedEvent(
        gaussian=GaussianEvent(noise_multiplier=1.0 / mu if mu > 0 else math.inf),
        subsampled=tuple(
            SubsampledGaussianEvent(noise_multiplier=noise, sample_rate=rate, rounds=count)
            for (rate, noise), count in sorted(rounds.items())
        ),
    )


def compose(events: Sequence[PrivacyEvent]) -> PrivacyEvent:
    """The single event that all `events` on one image amount to."""
    parts = read_events(events)
    if not parts.subsampled:
        return parts.gaussian
    alone = len(parts.subsampled) == 1 and parts.gaussian.noise_multiplier == math.inf
    return parts.subsampled[0] if alone else parts


@overload
def repeated(event: GaussianEvent, count: int) -> GaussianEvent: ...
@overload
def repeated(event: PrivacyEvent, count: int) -> PrivacyEvent: ...
def repeated(event: PrivacyEvent, count: int) -> PrivacyEvent:
    """`compose([event] * count)`: K releases of one image.

    It is also what k images cost that are noised one by one and replaced together; of images in the
    same sums see `grouped`.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if isinstance(event, ComposedEvent | SubsampledGaussianEvent):
        parts = read_events([event])
        more = tuple(
            dataclasses.replace(part, rounds=count * part.rounds) for part in parts.subsampled
        )
        return compose([repeated(parts.gaussian, count), *more])
    multiplier = multiplier_of(event)
    if not multiplier > 0:
        return GaussianEvent(noise_multiplier=0.0)
    return GaussianEvent(noise_multiplier=multiplier / math.sqrt(count))


def grouped(event: PrivacyEvent, count: int) -> PrivacyEvent:
    """An upper bound on what `count` images cost that are in the same sums and replaced together.

    k images move a sum by k times as much as one at most. In a round over a Poisson sample at least
    one of them is drawn with probability 1 - (1 - q)^k; given which are drawn, the proof for one
    image holds. (Images that are noised one by one cost less: `repeated`.)
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count == 1:
        return event
    parts = read_events([event])
    gaussian = GaussianEvent(noise_multiplier=parts.gaussian.noise_multiplier / count)
    return compose(
        [
            gaussian,
            *(
                SubsampledGaussianEvent(
                    noise_multiplier=part.noise_multiplier / count,
                    sample_rate=1.0 - (1.0 - part.sample_rate) ** count,
                    rounds=part.rounds,
                )
                for part in parts.subsampled
            ),
        ]
    )
