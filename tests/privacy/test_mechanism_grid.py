"""The grid of a release: the clip norm in whole numbers, outputs that say nothing by their bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.events import release_parameters
from fedpdm.privacy.mechanism import SeededNoise, clip_l2, clip_to_grid, noised_chunks, release
from fedpdm.privacy.noise import GRID, rounded_gaussian_weights
from tests.support.cases import every
from tests.support.oracles import binomial_bounds

LINEAR = make_schedule("linear")


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed))


# --- Clipping in whole steps ----------------------------------------------------------------


def square_norms(grid: np.ndarray) -> list[int]:
    """Sums of squares of rows of whole numbers, in Python's integers."""
    return [sum(value * value for value in row) for row in grid.astype(np.int64).tolist()]


def largest_square(bound: float) -> int:
    """The bound squared, up to the rounding of a float64."""
    return math.floor(Fraction(bound) ** 2 * (1 + Fraction(1, 2**52)))


def hard_images(size: int, bound: float, rng: np.random.Generator) -> np.ndarray:
    """Random images and bad ones, in units in which the clip norm is 1: float32 (N, size)."""
    unit = np.ones(size) / math.sqrt(size)
    one = np.zeros(size)
    one[0] = 1.0
    rows = [factor * unit for factor in (0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 40.0)]
    rows += [factor * one for factor in (-0.5, -1.0, 1 + 1e-6, 1e5)]
    rows += [1e-30 * unit, 1e-3 / bound * one]  # tiny
    half_steps = (np.floor(bound * unit) + 0.5) / bound  # every pixel is rounded
    rows += [half_steps, -half_steps, half_steps * 1.001]
    count = 60 if size < 10_000 else 10
    rows += list(rng.standard_normal((count, size)) * 10.0 ** rng.uniform(-4, 2, (count, 1)))
    return np.array(rows, dtype=np.float32)


@pytest.mark.slow
@every("size", [1, 3, 64, 3072, 3 * 64 * 64 * 4])
@every("bound", [0.3, 3.0, 137.0, 4096.0, 2.0**20, 2.0**23])
def test_no_image_is_longer_than_the_clip_norm(size: int, bound: float) -> None:
    x = hard_images(size, bound, np.random.default_rng(size))
    grid = clip_to_grid(x, bound=bound, steps=bound)
    assert grid.dtype == np.float32
    assert np.array_equal(grid, np.rint(grid))
    assert max(square_norms(grid)) <= largest_square(bound)


def random_images(rng: np.random.Generator) -> np.ndarray:
    """A few images of a random size and kind: all pixels equal, one pixel, signs, noise, sparse."""
    size = int(rng.choice([1, 2, 3, 7, 48, 192, 784]))
    shape = (12, size)
    level = rng.uniform(0.1, 2.0, (12, 1))
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: np.repeat(level, size, axis=1),
        lambda: np.eye(1, size, rng.integers(size)) * level,
        lambda: np.where(rng.random(shape) < 0.5, -level, level),
        lambda: rng.standard_normal(shape),
        lambda: rng.uniform(0.5, 2.0, shape) * (rng.random(shape) < 0.1),
    ]
    return kinds[rng.integers(len(kinds))]().astype(np.float32)


def test_thousands_of_images_stay_close_to_the_real_clip_and_inside() -> None:
    rng = np.random.default_rng(4)
    for _ in range(400):
        x = random_images(rng)
        wide, size = x.astype(np.float64), x.shape[1]
        lengths = np.linalg.norm(wide, axis=1)
        bound = float(2.0 ** rng.uniform(1.6, 23))
        at_bound = bound / max(float(np.median(lengths)), 0.1)
        steps = at_bound * float(rng.choice([0.3, 1 - 1e-6, 1.0, 1 + 1e-6, 1.5, 100.0]))
        out = np.full_like(x, np.nan)
        grid = clip_to_grid(x, bound=bound, steps=steps, out=out)
        assert grid is out
        assert max(square_norms(grid)) <= largest_square(bound)
        factor = np.minimum(1.0, bound / np.maximum(lengths * steps, 1e-300))
        real = wide * (steps * factor)[:, None]
        margin = (size / 12 + 2.4 * bound + 0.3 * math.sqrt(size)) / bound**2
        shrunk = min(0.5, margin / 1.5)  # by the soft margin: 1 - sqrt(1 - x) <= x / 1.5
        assert (np.abs(grid - real) <= 1.0 + (shrunk + 4e-7) * np.abs(real)).all()
        assert (grid * real >= 0).all()
        short = lengths * steps <= 0.5 * bound  # rounded, not scaled
        assert (np.abs(grid - real)[short] <= 0.5 + 2e-7 * np.abs(real[short])).all()


def test_rounding_errors_at_the_largest_bound_are_mended() -> None:
    """There float32 is too coarse for the margin: many rows are clipped once more in float64."""
    rng, bound = np.random.default_rng(2), 2.0**23
    for size in (2, 3, 5, 16):
        for equal in (True, False):
            x = rng.uniform(0.1, 2.0, (80_000, 1 if equal else size))
            x = np.broadcast_to(x, (len(x), size)).astype(np.float32)
            grid = clip_to_grid(x, bound=bound, steps=bound / 0.05).astype(np.int64)
            square = (grid**2).sum(axis=1)  # exact: below 2^63
            assert square.max() <= 1 << 46
            assert square.min() >= (1 << 46) * (1 - 1e-5)


def test_rounding_without_the_check_would_be_longer() -> None:
    """The planted fault that the tests above are for."""
    x = hard_images(3072, 4096.0, np.random.default_rng(0))
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    careless = np.rint(4096.0 * x / np.maximum(norms, 1.0))
    assert max(square_norms(careless)) > largest_square(4096.0)


def test_little_is_lost_at_usual_settings() -> None:
    """C = sigma and 3072 pixels: less than 0.1% of the length, and the direction is kept."""
    rng = np.random.default_rng(1)
    x = (rng.uniform(-1, 1, (300, 3072)) * rng.uniform(0.01, 1, (300, 1))).astype(np.float32)
    steps = GRID / 10.0  # C = sigma = 10
    grid = clip_to_grid(x, bound=float(GRID), steps=steps) / steps
    exact = clip_l2(torch.from_numpy(x).double(), clip_norm=10.0).numpy()
    norms, found = np.linalg.norm(exact, axis=1), np.linalg.norm(grid, axis=1)
    rounding = math.sqrt(3072 / 12) / steps  # root mean square
    assert np.linalg.norm(grid - exact, axis=1).max() < 1.1 * rounding
    clipped = norms > 9.999
    assert 100 < clipped.sum() < 300
    assert np.abs(found[clipped] / 10.0 - 1.0).max() < 1e-3
    cosine = (grid * exact).sum(axis=1) / (found * norms)
    assert cosine[clipped].min() > 1.0 - 1.1 * (rounding / 10.0) ** 2 / 2


# --- Outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("t0", [1, 300, 675, 1000])
def test_releases_are_whole_steps(t0: int) -> None:
    rng = np.random.default_rng(2)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    clip_norm = min(10.0, 1000 * LINEAR.noise_to_signal(t0))
    made = release(
        images, torch.zeros(40), schedule=LINEAR, t0=t0, clip_norm=clip_norm, shift=0.0,
        noise=seeded(),
    ).x_tilde.numpy()  # fmt: skip
    step = np.float32(math.sqrt(1 - LINEAR.alpha_bar(t0)) / GRID)

    def whole(values: np.ndarray) -> np.ndarray:
        return np.rint(values.astype(np.float64) / float(step))

    assert np.array_equal(whole(made).astype(np.float32) * step, made)
    # The planted fault: an image that was not rounded.
    image = images.numpy().astype(np.float32) * np.float32(0.37)
    fault = (image + seeded().draw(image.shape)) * step
    assert (whole(fault).astype(np.float32) * step != fault).mean() > 0.3


class EveryStep:
    """Noise that takes each value of a range once."""

    description, seeded = "every step", False

    def fill(self, out: np.ndarray) -> None:
        out.reshape(-1)[:] = np.arange(out.size) - out.size // 2


def test_the_outputs_that_can_occur_are_the_same_for_every_image() -> None:
    parameters = release_parameters(LINEAR, t0=600, clip_norm=60.0, shift=0.0)
    side, reach = 331, 51_600  # 331^2 pixels: one for each step of noise, and some more
    occurring = []
    for level in (0, 77, 128, 255):
        image = np.full((1, 1, side, side), level, dtype=np.uint8)
        (chunk,) = noised_chunks(image, parameters=parameters, noise=EveryStep())
        occurring.append(np.unique(chunk))
        assert len(occurring[-1]) == side * side
    step = np.float32(math.sqrt(1 - parameters.alpha_bar) / GRID)
    common = np.arange(-reach, reach + 1).astype(np.float32) * step
    moved = [float(values.mean()) / float(step) for values in occurring]
    assert max(moved) - min(moved) > 20  # the images are different
    for values in occurring:
        assert np.isin(common, values, assume_unique=True).all()
    weights = rounded_gaussian_weights()
    middle = len(weights) // 2
    assert min(weights[middle - reach : middle + reach + 1]) > 0  # and each does occur


def lowest_bits(y: np.ndarray) -> np.ndarray:
    """Exponent of the lowest bit that is set in each float64."""
    fraction, exponent = np.frexp(y)
    whole = (np.abs(fraction) * 2.0**53).astype(np.int64)
    lowest = (whole & -whole).astype(np.float64)
    return np.log2(np.maximum(lowest, 1.0)).astype(int) + exponent - 53


def guesses(first: np.ndarray, second: np.ndarray, window: float) -> tuple[int, int]:
    """(right, all) guesses which image an output close to 0 is of, by its lowest bit alone.

    The threshold and its direction are learnt on half of the outputs; the other half is guessed.
    """
    bits = [lowest_bits(y[np.abs(y) < window]) for y in (first, second)]
    half = min(map(len, bits)) // 2
    assert half > 1000
    known, unknown = [b[:half] for b in bits], [b[half : 2 * half] for b in bits]

    def right(sets: list[np.ndarray], threshold: int) -> int:
        return int((sets[0] < threshold).sum() + (sets[1] >= threshold).sum())

    candidates = np.unique(np.concatenate(known))
    scores = [right(known, c) - half for c in candidates]
    best = int(np.argmax(np.abs(scores)))
    found = right(unknown, candidates[best])
    return (found if scores[best] >= 0 else 2 * half - found), 2 * half


def test_low_bits_do_not_betray_the_image() -> None:
    """Mironov 2012: which floating-point numbers can occur depends on what the noise is added to.

    Two images of one pixel, 0 and C = sigma: the outputs close to 0 are told apart almost always
    in a careless float64 implementation, where the noise allows next to nothing.
    """
    count, t0 = 100_000, 250
    a, s = math.sqrt(LINEAR.alpha_bar(t0)), math.sqrt(1 - LINEAR.alpha_bar(t0))
    clip_norm = s / a
    window = s / 16
    rng = np.random.default_rng(3)
    naive = [a * x + s * rng.standard_normal(count) for x in (0.0, clip_norm)]
    right, total = guesses(naive[0], naive[1], window)
    assert right > 0.9 * total

    ours = []
    for number, value in enumerate((0.0, clip_norm)):
        images = torch.full((count, 1, 1, 1), value)
        made = release(
            images, torch.zeros(count), schedule=LINEAR, t0=t0, clip_norm=clip_norm, shift=0.0,
            noise=seeded(number), largest=clip_norm,
        )  # fmt: skip
        ours.append(made.x_tilde.double().numpy().ravel())
    assert ours[1].mean() - ours[0].mean() == pytest.approx(s, rel=0.05)
    right, total = guesses(ours[0], ours[1], window)
    low, high = binomial_bounds(total, 0.5)
    assert low <= right <= high


def test_noise_of_another_grid_is_refused() -> None:
    """4096 steps of noise on a grid of 8192 would be half the noise that the record claims."""
    parameters = release_parameters(LINEAR, t0=600, clip_norm=5.0, shift=0.0)
    images = np.zeros((1, 1, 2, 2), dtype=np.uint8)
    for grid in (2048, 8192):
        with pytest.raises(ValueError, match=f"^grid must be 4096, .* got {grid}$"):
            next(noised_chunks(images, parameters=replace(parameters, grid=grid), noise=seeded()))
    with pytest.raises(ValueError, match=r"^images must be \(N, C, H, W\), got \(1, 2, 2\)$"):
        next(noised_chunks(images[0], parameters=parameters, noise=seeded()))
