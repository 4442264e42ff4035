"""The law of the noise: the rounded Gaussian's probabilities, its privacy loss, and its tables."""

from __future__ import annotations

from collections.abc import Iterator

import mpmath
import pytest

from fedpdm.privacy import noise
from fedpdm.privacy.noise import GRID, SAMPLER_DISTANCE, rounded_gaussian_weights

ALL = 1 << 128
OFFSET = 1 << 16  # position of k = 0


@pytest.fixture(scope="module")
def weights() -> list[int]:
    return rounded_gaussian_weights()


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with mpmath.workprec(220):
        yield


def upper_tail(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2


def exact_weight(k: int) -> mpmath.mpf:
    """2^128 P[K = k], by the complementary error function."""
    half = mpmath.mpf(1) / 2
    return ALL * (upper_tail((abs(k) - half) / GRID) - upper_tail((abs(k) + half) / GRID))


# --- Probabilities --------------------------------------------------------------------------


def test_weights_are_the_rounded_gaussian(weights: list[int]) -> None:
    assert len(weights) == 2 * OFFSET
    assert sum(weights) == ALL
    assert min(weights) == 0
    assert weights[OFFSET + 1 :] == weights[OFFSET - 1 : 0 : -1]  # symmetric
    places = [1, 2, 3, 100, 4095, 4096, 20_000, 37_000, 50_000, 53_000, 54_000, 54_885, 54_886]
    for k in (*places, *range(5, 60_000, 487)):
        assert abs(weights[OFFSET + k] - exact_weight(k)) < 1, k
    assert abs(weights[OFFSET] - exact_weight(0)) < 1e5  # it takes up the rounding of all others


def every_weight(last: int) -> Iterator[int]:
    """2^200 P[K = k] for k = 0 .. last, each to 2^32: the distribution function as Taylor series

        Phi(c + t) - Phi(c) = phi(c) sum_j (-1)^j He_j(c) t^(j+1) / (j + 1)!

    around every 64th step, in fixed point; `exact_weight` is too slow for all of them.
    """
    bits = 200
    for middle in range(0, last + 33, 64):
        c = mpmath.mpf(middle) / GRID
        before, current = mpmath.mpf(0), mpmath.exp(-(c**2) / 2) / mpmath.sqrt(2 * mpmath.pi)
        terms = []
        for j in range(44):  # current is phi(c) (-1)^j He_j(c) / j!
            terms.append(int(current / (j + 1) * 2**bits))
            before, current = current, -(c * current + before) / (j + 1)

        def moved(i: int, terms: list[int] = terms) -> int:
            """2^bits (Phi(c + t) - Phi(c)) at t = (i + 1/2) h."""
            total = 0
            for term in reversed(terms):
                total = (total * (2 * i + 1) >> 13) + term
            return total * (2 * i + 1) >> 13

        bounds = [moved(i) for i in range(-33, 33)]
        for k in range(max(middle - 32, 0), min(middle + 31, last) + 1):
            at = k - middle + 33
            yield bounds[at] - bounds[at - 1]


@pytest.mark.slow
def test_weights_are_within_the_stated_distance(weights: list[int]) -> None:
    """Every one, and what they all are off by together."""
    last = OFFSET - 1
    exact = list(every_weight(last))
    assert len(exact) == last + 1
    for k in (0, 1, 31, 32, 33, 4096, 9999, 33_000, 51_000, 60_000):  # the oracle by another one
        assert abs(exact[k] - exact_weight(k) * 2**72) < 2**32, k

    def distance(half: list[int]) -> float:
        """Total variation from the exact law, of weights for k = 0, 1, ...; a bound."""
        errors = [abs((weight << 72) - e) for weight, e in zip(half, exact, strict=True)]
        beyond = upper_tail((last + mpmath.mpf(1) / 2) / GRID)
        return (errors[0] + 2 * sum(errors[1:])) / 2 / 2.0**200 + float(beyond)

    half = weights[OFFSET:]
    assert max(abs((half[k] << 72) - exact[k]) for k in range(1, last + 1)) < 0.51 * 2**72
    assert distance(half) < SAMPLER_DISTANCE / 4
    # A planted fault: a variance that is 2^-105 too large.
    wider = [w + (((k * k - GRID**2) * w // GRID**2) >> 106) for k, w in enumerate(half)]
    assert distance(wider) > SAMPLER_DISTANCE


def summed_delta(weights: list[int], shift: int, epsilon: float) -> mpmath.mpf:
    """sum_k max(0, P[k] - e^eps P[k + shift]), from whole numbers; e^eps is rounded down."""
    factor = int(mpmath.floor(mpmath.exp(epsilon) * 2**128))
    beside = weights[shift:] + [0] * shift
    total = sum(max(0, (p << 128) - factor * q) for p, q in zip(weights, beside, strict=True))
    return mpmath.mpf(total) / mpmath.mpf(2) ** 256


def analytic_delta(mu: mpmath.mpf, epsilon: float) -> mpmath.mpf:
    """Balle and Wang 2018, Theorem 8."""

    def phi(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.erfc(-x / mpmath.sqrt(2)) / 2

    return phi(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.slow
def test_privacy_loss_on_the_grid_is_at_most_the_real_gaussians(weights: list[int]) -> None:
    """Two images 2C apart on one pixel: rounding is post-processing, and costs nothing."""
    light = [w if abs(k - len(weights) // 2) < 5 * GRID else 0 for k, w in enumerate(weights)]
    with mpmath.workprec(300):
        for shift in (13, 512, 4096, 8192, 40_960):  # 2C in steps; C = sigma is 8192
            for epsilon in (0.0, 0.5, 3.0, 10.0):
                analytic = analytic_delta(mpmath.mpf(shift) / GRID, epsilon)
                allowed = analytic + (1 + mpmath.exp(epsilon)) * SAMPLER_DISTANCE
                found = summed_delta(weights, shift, epsilon)
                assert found <= allowed, (shift, epsilon)
                assert found >= analytic * (1 - 1e-6) - SAMPLER_DISTANCE, (shift, epsilon)
        # Planted faults: images one step too far apart, and a tail that ends too soon.
        for shift, epsilon in ((512, 0.5), (4096, 3.0), (8192, 10.0)):
            allowed = analytic_delta(mpmath.mpf(shift) / GRID, epsilon) * (1 + 1e-9)
            assert summed_delta(weights, shift, epsilon) <= allowed
            assert summed_delta(weights, shift + 1, epsilon) > allowed
            assert summed_delta(light, shift, epsilon) > allowed


# --- Tables ---------------------------------------------------------------------------------


def test_tables_have_exactly_these_probabilities(weights: list[int]) -> None:
    """Reconstructed word by word and column by column, in units of 2^-144."""
    tables = noise._tables()
    law = [0] * len(weights)
    for value in tables.direct[: tables.num_direct].astype(int).tolist():
        law[value + OFFSET] += 1 << 128
    leftover = (1 << 16) - tables.num_direct  # first words: 2^-16, a column's share: 2^-17
    values = tables.values.astype(int).tolist()
    for column, threshold in enumerate(tables.thresholds.tolist()):
        assert threshold >> 15 == column
        below = ((threshold & 0x7FFF) << 96) | tables.more[column]
        law[values[2 * column] + OFFSET] += leftover * below
        law[values[2 * column + 1] + OFFSET] += leftover * ((1 << 111) - below)
    assert sum(law) == 1 << 144
    difference = [p - (weight << 16) for p, weight in zip(law, weights, strict=True)]
    assert sum(map(abs, difference)) / 2 / 2.0**144 < SAMPLER_DISTANCE / 16
    assert 0.75 < tables.num_direct / (1 << 16) < 0.9
