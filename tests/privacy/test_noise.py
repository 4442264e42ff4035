"""The exact sampler: which bits give which number, and the statistics of its draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats

from fedpdm.privacy import noise
from fedpdm.privacy.noise import (
    GRID,
    SeededNoise,
    SystemNoise,
    rounded_gaussian_weights,
)
from tests.support.oracles import binomial_bounds, normal_fault, zero_mean_fault

ALL = 1 << 128
OFFSET = 1 << 16  # position of k = 0


@pytest.fixture(scope="module")
def weights() -> list[int]:
    return rounded_gaussian_weights()


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed))


# --- Bits --------------------------------------------------------------------------------------


class Scripted:
    """A key stream that gives prepared words."""

    def __init__(self, words: ArrayLike = (), integers: Sequence[int] = ()) -> None:
        self.left, self.integers = np.asarray(words, dtype=np.int64), list(integers)

    def words(self, count: int, dtype: str) -> np.ndarray:
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count
        return taken.astype(dtype)

    def integer(self, bits: int) -> int:
        assert bits == 96
        return self.integers.pop(0)


def scripted(direct: ArrayLike, leftover: ArrayLike, more: Sequence[int]) -> SeededNoise:
    """A source whose bits are these."""
    source = seeded()
    streams = Scripted(direct), Scripted(leftover), Scripted(integers=more)
    source._direct, source._leftover, source._more = streams  # type: ignore[assignment]
    return source


def test_every_short_word_answers_in_proportion(weights: list[int]) -> None:
    """All 2^16 first words: each number has as many as fit into its probability."""
    tables = noise._tables()
    columns = np.arange(1 << 16) % (1 << 17)
    source = scripted(np.arange(1 << 16), columns << 15 | 1, [0] * 50)
    drawn = source.draw((1 << 16,))[: tables.num_direct].astype(int)
    counts = np.bincount(drawn + OFFSET, minlength=2 * OFFSET)
    assert counts.tolist() == [weight >> 112 for weight in weights]
    left = source._leftover.left  # type: ignore[attr-defined]
    assert len(left) == tables.num_direct  # the other words, and only they, draw again


def test_every_word_of_a_column_answers_in_proportion() -> None:
    tables = noise._tables()
    for column in (30_000, 61_440, 65_000, 65_536, 65_537, 70_000, 78_901, 100_000):
        own, alias = tables.values[2 * column : 2 * column + 2]
        assert own == column - OFFSET
        first = int(tables.thresholds[column]) & 0x7FFF
        for further, below in ((0, 1), (tables.more[column] - 1, 1), (tables.more[column], 0)):
            words = (column << 15) + np.arange(1 << 15)
            drawn = scripted([65_535] * len(words), words, [further]).draw((len(words),))
            if own != alias:
                assert (drawn == own).sum() == first + below
            assert set(drawn.tolist()) <= {own, alias}


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
        source = scripted([tables.num_direct] * len(words), words, integers)
        assert source.draw((len(words),)).tolist() == expected
        assert source._more.integers == []  # type: ignore[attr-defined]


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


def chi_square_fault(counts: ArrayLike, expected: ArrayLike) -> str | None:
    """How counts deviate from those expected: too far from them, or too close; or None."""
    found, wanted = np.asarray(counts).ravel(), np.asarray(expected).ravel()
    assert wanted.min() > 50
    value = float(((found - wanted) ** 2 / wanted).sum())
    low, high = (float(stats.chi2.ppf(p, len(found) - 1)) for p in (5e-7, 1 - 5e-7))
    return (
        None if low <= value <= high else f"chi-square {value:.1f}, allowed {low:.1f}, {high:.1f}"
    )


def test_draws_fill_the_cells_of_their_law(weights: list[int]) -> None:
    drawn = seeded(8).draw((4_000_000,)).astype(np.int64)
    law = np.array([weight / ALL for weight in weights])
    cells = np.minimum((np.cumsum(law) * 1500).astype(int), 1499)  # of about equal probability
    expected = np.bincount(cells, law) * len(drawn)

    def fault(numbers: np.ndarray) -> str | None:
        return chi_square_fault(np.bincount(cells[numbers + OFFSET], minlength=1500), expected)

    assert fault(drawn) is None
    assert fault(np.rint(drawn * 1.005).astype(np.int64)) is not None
    assert fault(drawn + 60) is not None
    assert fault(np.tile(drawn[:400_000], 10)) is not None
    # Which of neighbouring steps it is: a bit that is lost shows nowhere else.
    for modulus in (2, 3, 64):
        even = np.full(modulus, len(drawn) / modulus)
        assert chi_square_fault(np.bincount(drawn % modulus, minlength=modulus), even) is None
    assert chi_square_fault(np.bincount(2 * (drawn // 2) % 64, minlength=64) + 1, even) is not None


def test_neighbouring_draws_are_independent() -> None:
    drawn = seeded(9).draw((1_000_000,)).astype(np.float64) / GRID
    edges = stats.norm.ppf(np.arange(1, 12) / 12)

    def fault(z: np.ndarray, lag: int) -> str | None:
        cells = np.searchsorted(edges, z)
        pairs = np.bincount(12 * cells[: len(z) - lag] + cells[lag:], minlength=144)
        return chi_square_fault(pairs, np.full(144, pairs.sum() / 144))

    for lag in (1, 2, 3, 16, 32, 65_536):  # a block of the cipher is 16 or 32 words
        assert fault(drawn, lag) is None, lag
    assert fault(np.repeat(drawn[::2], 2), 1) is not None
    signs = np.where(np.arange(len(drawn)) % 2, 1, np.sign(drawn))
    assert fault(np.abs(drawn) * signs * np.roll(signs, 1), 1) is not None


def test_what_can_be_filled() -> None:
    out = np.full((3, 5), 0.5, dtype=np.float32)
    seeded().fill(out)
    assert np.array_equal(out, seeded().draw((3, 5)))
    shapes = [(), (1,), (0,), (0, 4), (3, 0, 2), (2, 3, 7)]
    assert [seeded().draw(shape).shape for shape in shapes] == shapes
    single = np.full((4, 6), 0.5, dtype=np.float32)
    for bad in (
        single[:, ::2],
        single[:, :3],
        single.T,
        single[0, ::2],
        single[0, ::-1],
        single.astype(np.float64),
        single.astype(np.float16),
        single.astype(np.int32),
        single.astype(">f4"),
    ):
        before = bad.copy()
        with pytest.raises(ValueError, match="out must be contiguous float32"):
            seeded().fill(bad)
        assert np.array_equal(bad, before)
