"""Numbers of images per class with noise, for a client that publishes what depends on them.

Discrete Laplace noise (Ghosh, Roughgarden and Sundararajan 2009): P(k) is proportional to
exp(-|k| epsilon / 2) for whole k, since one image replaced by one of another class changes two
counts by one each. It is drawn exactly, from whole numbers (Canonne, Kamath and Steinke 2020,
algorithm 1), by the system's generator: no floating-point number takes part.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["COUNT_EPSILONS", "noised_counts"]

COUNT_EPSILONS = (0.01, 20.0)  # smallest and largest that can be asked for


def noised_counts(counts: Sequence[int], *, epsilon: float) -> list[int]:
    """The counts, each with independent noise and then at least 0.

    All together are epsilon-differentially private per image, replace-one. `ValueError` for an
    epsilon out of bounds.
    """
    low, high = COUNT_EPSILONS
    if not low <= epsilon <= high:
        raise ValueError(f"epsilon of class counts must be in [{low:g}, {high:g}], got {epsilon:g}")
    rate = Fraction(repr(float(epsilon))) / 2
    return [max(0, count + _geometric(rate) - _geometric(rate)) for count in counts]


def _geometric(rate: Fraction) -> int:
    """k with probability (1 - exp(-rate)) exp(-k rate)."""
    number = 0
    while _survives(rate):
        number += 1
    return number


def _survives(rate: Fraction) -> bool:
    """True with probability exp(-rate)."""
    whole, rest = divmod(rate, 1)
    return all(_survives_below_one(Fraction(1)) for _ in range(whole)) and _survives_below_one(rest)


def _survives_below_one(rate: Fraction) -> bool:
    """True with probability exp(-rate), for a rate of at most 1."""
    tries = 1
    while secrets.randbelow(rate.denominator * tries) < rate.numerator:
        tries += 1
    return tries % 2 == 1
