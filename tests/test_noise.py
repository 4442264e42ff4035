"""The exact sampler: its probabilities, its tables, its key streams, and its draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from fedpdm import noise
from fedpdm.noise import (
    GRID,
    SAMPLER_DISTANCE,
    SeededNoise,
    SystemNoise,
    rounded_gaussian_weights,
)
from tests.oracles import binomial_bounds, hockey_stick, normal_fault, zero_mean_fault

ALL = 1 << 128
OFFSET = 1 << 16  # position of k = 0


@pytest.fixture(scope="module")
def weights() -> list[int]:
    return rounded_gaussian_weights()


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with mpmath.workprec(220):
        yield


def seeded(seed: int = 0, **key: int) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed, spawn_key=tuple(key.values())))


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


def test_weights_are_within_the_stated_distance(weights: list[int]) -> None:
    """All of them through the distribution function: errors cannot hide between places."""
    total, error = 0, mpmath.mpf(0)
    for k in range(60_000, 0, -1):
        total += weights[OFFSET + k]
        if k % 250 == 1:
            exact = ALL * upper_tail((k - mpmath.mpf(1) / 2) / GRID)
            error = max(error, abs(total - exact))
    assert error < 60_000  # half a unit each
    assert (60_000 + 1e5) / 2 / ALL < SAMPLER_DISTANCE / 2


def test_privacy_of_the_grid_is_the_real_gaussians(weights: list[int]) -> None:
    """The privacy loss of whole-number noise, summed over all outputs, never exceeds the analytic
    delta(epsilon), and comes close to it: rounding is post-processing and costs nothing."""
    law = np.array([float(Fraction(weight, ALL)) for weight in weights])
    for shift in (512, 4096, 3 * 4096):  # 2 C in steps: mu = 1/8, 1, 3
        p, q = law[shift:], law[:-shift]
        for epsilon in (0.1, 1.0, 3.0):
            delta = float(np.maximum(q - math.exp(epsilon) * p, 0.0).sum())
            analytic = hockey_stick(shift / GRID, epsilon)
            assert delta <= analytic * (1 + 1e-9) + 1e-15
            assert delta >= analytic * (1 - 1e-4) - 1e-15


# --- Tables ---------------------------------------------------------------------------------


def test_tables_have_exactly_these_probabilities(weights: list[int]) -> None:
    tables = noise._tables()
    law = [Fraction(0)] * len(weights)
    for value in tables.direct[: tables.num_direct].astype(int).tolist():
        law[value + OFFSET] += Fraction(1, 1 << 16)
    rest = Fraction((1 << 16) - tables.num_direct, 1 << 16) / (1 << 17)  # of one column
    values = tables.values.astype(int).tolist()
    for column, threshold in enumerate(tables.thresholds.tolist()):
        assert threshold >> 15 == column
        below = Fraction(((threshold & 0x7FFF) << 96) | tables.more[column], 1 << 111)
        law[values[2 * column] + OFFSET] += rest * below
        law[values[2 * column + 1] + OFFSET] += rest * (1 - below)
    assert sum(law) == 1
    distance = sum(abs(p - Fraction(w, ALL)) for p, w in zip(law, weights, strict=True)) / 2
    assert float(distance) < SAMPLER_DISTANCE / 16
    assert 0.75 < tables.num_direct / (1 << 16) < 0.9


class Scripted:
    """A key stream that gives prepared words."""

    def __init__(self, words: list[int], integers: list[int]) -> None:
        self._words, self._integers = words, integers

    def words(self, count: int, dtype: str) -> np.ndarray:
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count
        return np.array(taken, dtype=dtype)

    def integer(self, bits: int) -> int:
        assert bits == 96
        return self._integers.pop(0)


def test_open_comparisons_are_decided_by_further_bits() -> None:
    tables = noise._tables()
    columns = [
        column
        for column in range(30_000, 100_000, 701)
        if 0 < tables.thresholds[column] & 0x7FFF < 0x7FFF
        and tables.more[column] > 0
        and tables.values[2 * column] != tables.values[2 * column + 1]
    ]
    assert len(columns) > 50
    thresholds = [int(tables.thresholds[c]) for c in columns]
    own = [float(tables.values[2 * c]) for c in columns]
    alias = [float(tables.values[2 * c + 1]) for c in columns]
    more = [tables.more[c] for c in columns]
    for words, integers, expected in (
        ([t - 1 for t in thresholds], [], own),
        (thresholds, [m - 1 for m in more], own),
        (thresholds, more, alias),
        ([t + 1 for t in thresholds], [], alias),
    ):
        source = seeded()
        source._direct = Scripted([tables.num_direct] * len(words), [])  # type: ignore[assignment]
        source._leftover = Scripted(words, [])  # type: ignore[assignment]
        source._more = Scripted([], list(integers))  # type: ignore[assignment]
        assert source.draw((len(words),)).tolist() == expected


def test_draws_follow_the_bits_one_by_one() -> None:
    """Against a slow sampler in exact integers on the same key streams, ties included."""
    count = 150_000
    source, slow = seeded(7), seeded(7)
    tables = noise._tables()
    direct = [slow._direct.integer(16) for _ in range(count)]
    expected, ties = [], 0
    for word in direct:
        if word < tables.num_direct:
            expected.append(float(tables.direct[word]))
            continue
        drawn = slow._leftover.integer(32)
        column, low = drawn >> 15, drawn & 0x7FFF
        first = int(tables.thresholds[column]) & 0x7FFF
        below = low < first
        if low == first:
            ties += 1
            below = slow._more.integer(96) < tables.more[column]
        expected.append(float(tables.values[2 * column + (not below)]))
    assert np.array_equal(source.draw((count,)), np.array(expected, dtype=np.float32))
    low_end, high_end = binomial_bounds(int(count * 0.163), 2.0**-15)
    assert low_end <= ties <= high_end


# --- Key streams ----------------------------------------------------------------------------


def test_the_key_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vectors 1 and 2: zero key and nonce, blocks 0 and 1."""
    stream = noise._KeyStream(bytes(32), 0)
    block = np.concatenate([stream.words(16, "<u4").copy(), stream.words(16, "<u4").copy()])
    first = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    second = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    assert block.tobytes()[:32].hex() == first
    assert block.tobytes()[64:96].hex() == second


def test_streams_of_a_key_differ() -> None:
    outputs = {noise._KeyStream(b"k" * 32, n).words(8, "<u4").tobytes() for n in range(3)}
    assert len(outputs) == 3


def test_draws_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seeded(1).draw((200_000,))
    source = seeded(1)
    cut = np.concatenate([source.draw((n,)) for n in (1, 70_000, 0, 65_537, 64_462)])
    assert np.array_equal(whole, cut)
    monkeypatch.setattr(noise, "CHUNK", 1000)
    assert np.array_equal(whole[:5555], seeded(1).draw((5555,)))


def test_seeds_and_their_components_change_the_draw() -> None:
    draws = [
        seeded(seed, purpose=2, client=client, round=0, chunk=chunk).draw((64,)).tobytes()
        for seed, client, chunk in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))
    ]
    assert len(set(draws)) == 4
    assert seeded(3).draw((64,)).tobytes() == seeded(3).draw((64,)).tobytes()


def test_system_noise_never_repeats() -> None:
    first, second = SystemNoise(), SystemNoise()
    draws = [source.draw((1000,)) for source in (first, second, first)]
    for position, one in enumerate(draws):
        for other in draws[:position]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_sources_say_what_they_are() -> None:
    assert SeededNoise.seeded
    assert not SystemNoise.seeded
    assert "simulation only" in SeededNoise.description
    assert "operating-system" in SystemNoise.description


# --- Draws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SystemNoise(), seeded(3)], ids=["system", "seeded"])
def test_noise_is_standard_normal(source: SystemNoise) -> None:
    drawn = source.draw((200_001,))
    assert drawn.dtype == np.float32
    assert np.array_equal(drawn, np.rint(drawn))
    z = drawn.astype(np.float64) / GRID
    assert normal_fault(z) is None
    for lag in (1, 2, 65_536):
        assert zero_mean_fault(z[:-lag, None] * z[lag:, None]) is None
    # Planted faults: half the noise, 2% too much, a light tail, a draw that comes twice.
    assert normal_fault(0.5 * z) is not None
    assert normal_fault(1.02 * z) is not None
    assert normal_fault(np.clip(z, -2.2, 2.2)) is not None
    assert zero_mean_fault(z[:, None] * z[:, None]) is not None


def test_noise_reaches_the_tails() -> None:
    z = seeded(5).draw((2_000_000,)) / GRID
    for bound in (2.5, 3.5, 4.0, 4.5):
        low, high = binomial_bounds(len(z), float(2 * stats.norm.sf(bound - 0.5 / GRID)))
        assert low <= int((np.abs(z) >= bound).sum()) <= high


def test_single_steps_have_their_probability(weights: list[int]) -> None:
    drawn = seeded(6).draw((4_000_000,)).astype(np.int64)
    for k in (0, 1, -1, 4096, -8000, 12_000):
        low, high = binomial_bounds(len(drawn), weights[OFFSET + k] / ALL)
        assert low <= int((drawn == k).sum()) <= high, k


def test_what_can_be_filled() -> None:
    out = np.full((3, 5), 0.5, dtype=np.float32)
    seeded().fill(out)
    assert np.array_equal(out, seeded().draw((3, 5)))
    assert seeded().draw(()).shape == ()
    assert seeded().draw((0, 4)).shape == (0, 4)
    for bad in (np.empty((4, 4)), np.empty((4, 4), dtype=np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="out must be contiguous float32"):
            seeded().fill(bad)
