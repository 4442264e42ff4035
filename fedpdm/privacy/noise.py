"""Noise of a release: whole steps of a grid, sampled exactly from integers.

A release is made on a grid of `GRID` steps per standard deviation of its noise. Its noise is the
*rounded* Gaussian: with s = GRID,

    P[K = k] = Phi((k + 1/2) / s) - Phi((k - 1/2) / s),        K = round(s Z),  Z ~ N(0, 1).

For whole m, `m + K = round(m + s Z)`: what is released is a function of the real-valued Gaussian
mechanism's output, so the exact (analytic Gaussian) accounting holds without any loss, and no
floating-point number takes part. That closes the attacks on floating-point noise (Mironov 2012;
Haney et al. 2022; Holohan and Braghin 2021): whatever the image, the outputs that can occur are
the same whole numbers. A discrete Gaussian (Canonne et al. 2020) on the same grid would do so too,
but its trade-off curve in many dimensions is known only through a looser bound.

Sampling reads 16 bits. Most of their 2^16 values stand for one whole number each, as many as fit
into its probability; the rest, about one in six, for "draw from what is left over". That is done
by the alias method (Walker 1977) over 2^17 columns: a 32-bit word gives the column and 15 bits of
the comparison; where those leave it open (once in 2^15 draws), 96 more are drawn. Probabilities
have 128 bits, and the sampled law differs from the one above by less than `SAMPLER_DISTANCE` in
total variation per pixel. The time taken does not depend on the image.

Words come from ChaCha20 (RFC 8439): under a fresh key from the operating system, or, in
simulations only, under a key derived from the run's seed.
"""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

__all__ = [
    "GRID",
    "SAMPLER_DISTANCE",
    "NoiseSource",
    "SeededNoise",
    "SystemNoise",
    "rounded_gaussian_weights",
]

GRID = 4096  # steps per standard deviation
WEIGHT_BITS = 128  # weights are multiples of 2^-128
DIRECT_BITS = 16
COLUMN_BITS = 17
OPEN_BITS = 32 - COLUMN_BITS  # of a word, for the comparison with the column's threshold
MORE_BITS = 96
LARGEST = 1 << 16  # of a number that can be drawn, in magnitude: 16 standard deviations
SAMPLER_DISTANCE = 2.0**-110
CHUNK = 1 << 16  # draws at a time: their work arrays fit a processor's second-level cache


class NoiseSource(Protocol):
    """Where the noise of a release comes from; `description` goes into every artefact."""

    description: str
    seeded: bool

    def fill(self, out: np.ndarray) -> None:
        """Fill a contiguous float32 array with independent `round(GRID z)`, z ~ N(0, 1)."""
        ...


def rounded_gaussian_weights() -> list[int]:
    """`2^128 P[K = k]` for k = -2^16 .. 2^16 - 1 as whole numbers that sum to 2^128.

    Integers throughout, with 72 guard bits. The mass of a step is the integral of the density phi
    over a width h = 1 / GRID around c = k h, by its Taylor series (probabilists' Hermite He_j):

        phi(c) h sum_j He_2j(c) (h / 2)^2j / (2j + 1)!

    and phi follows from step to step, phi(c + h) = phi(c) exp(-h^2 / 2) exp(-c h).
    """
    guard = 72
    bits = WEIGHT_BITS + guard
    one = 1 << bits
    last = int(13.4 * GRID)  # beyond it a step's mass is below 2^-129
    # The density relative to its value at 0: the scale is fixed by the sum in the end.
    slowing = _exp_minus_one_over(GRID * GRID, bits)  # exp(-h^2)
    ratio = _exp_minus_one_over(2 * GRID * GRID, bits)  # exp(-h^2 / 2), from k = 0 to k = 1
    density, masses = one, []
    log_grid = GRID.bit_length() - 1
    for k in range(last + 1):
        # He_j(c) (h / 2)^j / j! =: a_j, by (j + 1) a_{j+1} = (h / 2) (c a_j - (h / 2) a_{j-1}).
        before, current, total = 0, one, one
        for j in range(10):
            c_term = (k * current) >> (2 * log_grid + 1)  # (h / 2) c = k / (2 GRID^2)
            h_term = before >> (2 * log_grid + 2)  # (h / 2)^2
            before, current = current, (c_term - h_term) // (j + 1)
            if j % 2:  # current is a_{j+1}, of even order
                total += current // (j + 2)
        masses.append((density * total) >> bits)
        density = (density * ratio) >> bits
        ratio = (ratio * slowing) >> bits
    whole = masses[0] + 2 * sum(masses[1:])
    half = [((mass << WEIGHT_BITS) + whole // 2) // whole for mass in masses]
    half[0] = (1 << WEIGHT_BITS) - 2 * sum(half[1:])
    tail = [0] * (LARGEST - last - 1)
    return [0, *tail, *reversed(half[1:]), *half, *tail]


def _exp_minus_one_over(n: int, bits: int) -> int:
    """`2^bits exp(-1 / n)`, rounded down, by its series."""
    term = total = 1 << bits
    j = 0
    while term:
        j += 1
        term = -(-term // (n * j)) if term < 0 else term // (n * j)
        total += term if j % 2 == 0 else -term
    return total


@dataclass(frozen=True, eq=False)
class _Tables:
    """A direct value for words below `num_direct`; for the others a draw from the alias columns:
    column c answers `values[2 c]` below its threshold and `values[2 c + 1]` from there on."""

    direct: np.ndarray  # float32 (2^16,), 0 from num_direct on
    num_direct: int
    thresholds: np.ndarray  # uint32 (2^17,): the column, then the threshold's first 15 bits
    more: tuple[int, ...]  # its other 96 bits
    values: np.ndarray  # float32 (2^18,)


@functools.lru_cache(maxsize=1)
def _tables() -> _Tables:
    """The rounded Gaussian as tables, in whole numbers; the alias columns by Vose's pairing."""
    share = 1 << (WEIGHT_BITS - DIRECT_BITS)  # the mass of one 16-bit word
    weights = rounded_gaussian_weights()
    words = np.array([weight // share for weight in weights])
    direct = np.zeros(1 << DIRECT_BITS, dtype=np.float32)
    num_direct = int(words.sum())
    direct[:num_direct] = np.repeat(np.arange(len(weights)) - LARGEST, words)

    left = [weight % share for weight in weights]
    columns = len(left)
    capacity, rest = divmod(sum(left), columns)
    assert rest == 0
    alias = list(range(columns))
    small = [c for c in range(columns) if left[c] < capacity]
    large = [c for c in range(columns) if left[c] > capacity]
    full = [capacity] * columns
    while small:
        poor, rich = small.pop(), large[-1]
        full[poor], alias[poor] = left[poor], rich
        left[rich] -= capacity - left[poor]
        if left[rich] <= capacity:
            large.pop()
            if left[rich] < capacity:
                small.append(rich)
    # A full column's threshold is all ones: what lies above it is its alias, and that is itself.
    most = (1 << (OPEN_BITS + MORE_BITS)) - 1
    cut = [min((value << (OPEN_BITS + MORE_BITS)) // capacity, most) for value in full]
    own = np.arange(columns)
    first = np.array([value >> MORE_BITS for value in cut], dtype=np.uint32)
    values = np.stack([own, np.array(alias)], axis=1) - LARGEST
    return _Tables(
        direct=direct,
        num_direct=num_direct,
        thresholds=(own.astype(np.uint32) << np.uint32(OPEN_BITS)) | first,
        more=tuple(value & ((1 << MORE_BITS) - 1) for value in cut),
        values=values.astype(np.float32).ravel(),
    )


class _KeyStream:
    """Random bytes: ChaCha20 under a key, stream by stream."""

    def __init__(self, key: bytes, stream: int) -> None:
        nonce = bytes(15) + bytes([stream])
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
        self._zeros = bytes(4 * CHUNK)
        self._buffer = bytearray(len(self._zeros) + 64)

    def words(self, count: int, dtype: str) -> np.ndarray:
        """The next words, (count,), count at most CHUNK; valid until the next call."""
        size = count * np.dtype(dtype).itemsize
        self._cipher.update_into(memoryview(self._zeros)[:size], self._buffer)
        return np.frombuffer(self._buffer, dtype=dtype, count=count)

    def integer(self, bits: int) -> int:
        """The next `bits` bits, a multiple of 8, as a whole number."""
        return int.from_bytes(self._cipher.update(bytes(bits // 8)), "little")


class _StreamNoise:
    """Rounded Gaussian noise from three key streams under one 256-bit key.

    Each stage of a draw has a stream of its own, so that the draws do not depend on how they are
    cut into calls.
    """

    description: str
    seeded: bool

    def __init__(self, key: bytes) -> None:
        self._tables = _tables()
        self._direct, self._leftover, self._more = (_KeyStream(key, stream) for stream in range(3))
        self._index = np.empty(CHUNK, dtype=np.int64)
        self._flags = np.empty(CHUNK, dtype=bool)

    def fill(self, out: np.ndarray) -> None:
        """See `NoiseSource`."""
        if out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous float32, got {out.dtype} {out.strides}")
        flat = out.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            self._fill(flat[start : start + CHUNK])

    def draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """A new array of this shape, filled."""
        out = np.empty(shape, dtype=np.float32)
        self.fill(out)
        return out

    def _fill(self, out: np.ndarray) -> None:
        """Draw into `out`, float32 (n,), n at most CHUNK; all work arrays stay in the cache."""
        tables, index, flags = self._tables, self._index[: len(out)], self._flags[: len(out)]
        words = self._direct.words(len(out), "<u2")
        np.copyto(index, words)
        tables.direct.take(index, mode="clip", out=out)
        np.greater_equal(words, tables.num_direct, out=flags)
        open_ones = np.flatnonzero(flags)
        out[open_ones] = self._draw_leftover(len(open_ones))

    def _draw_leftover(self, count: int) -> np.ndarray:
        """Draws from the alias columns, float32 (count,)."""
        tables = self._tables
        words = self._leftover.words(count, "<u4")
        index = (words >> np.uint32(OPEN_BITS)).astype(np.int64)
        thresholds = tables.thresholds.take(index, mode="clip")
        index <<= 1
        index += words >= thresholds
        for at in np.flatnonzero(words == thresholds):
            if self._more.integer(MORE_BITS) < tables.more[int(words[at]) >> OPEN_BITS]:
                index[at] -= 1
        return tables.values.take(index, mode="clip")


class SeededNoise(_StreamNoise):
    """Reproducible noise for simulations. Whoever knows the seed can remove the noise."""

    description = "seeded (simulation only: no privacy against whoever knows the seed)"
    seeded = True

    def __init__(self, sequence: np.random.SeedSequence) -> None:
        super().__init__(sequence.generate_state(8, np.uint32).astype("<u4").tobytes())


class SystemNoise(_StreamNoise):
    """Noise under a fresh key from the operating system, which nobody keeps."""

    description = "operating-system entropy, ChaCha20, 256-bit key"
    seeded = False

    def __init__(self) -> None:
        super().__init__(secrets.token_bytes(32))
