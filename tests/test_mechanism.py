"""Clipping and release: closed forms, the grid, and the randomness of what leaves."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedpdm.mechanism import (
    SeededNoise,
    SystemNoise,
    clip_l2,
    clip_to_grid,
    release,
    release_event,
    select,
)
from fedpdm.schedule import make_schedule
from fedpdm.types import ReleasedDataset
from tests.oracles import moments_fault

ROOT = Path(__file__).resolve().parent.parent
LINEAR = make_schedule("linear")


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed))


class ScaledNoise:
    """A planted fault: noise of another size, and anew for each chunk."""

    description, seeded = "planted fault", True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def fill(self, out: np.ndarray) -> None:
        np.rint(self.factor * seeded(1).draw(out.shape), out=out)


def released(x_0: torch.Tensor, noise: object = None, **options: object) -> ReleasedDataset:
    given = {"schedule": LINEAR, "t0": 600, "clip_norm": 5.0, "shift": -1.0, "largest": 50.0}
    given |= options
    labels = torch.arange(len(x_0)) % 10
    return release(x_0, labels, noise=noise or seeded(), **given)  # type: ignore[arg-type]


# --- Clipping -------------------------------------------------------------------------------


def test_clipping_bounds_the_norm_keeps_the_direction_and_spares_the_small() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(rng.integers(1, 7, size=rng.integers(1, 4)))
        size = math.prod(shape)
        bound = float(10.0 ** rng.uniform(-3, 3))
        scale = 10.0 ** rng.uniform(-4, 4, size=(8, 1))
        flat = (rng.standard_normal((8, size)) * scale).astype(np.float32).astype(np.float64)
        x = torch.from_numpy(flat.astype(np.float32)).view(8, *shape)
        clipped = clip_l2(x, clip_norm=bound).double().numpy().reshape(8, size)
        for before, after in zip(flat, clipped, strict=True):
            norm = math.sqrt(math.fsum(before**2))
            if norm <= bound:
                assert np.array_equal(before, after)
                continue
            assert math.sqrt(math.fsum(after**2)) == pytest.approx(bound, rel=1e-6)
            assert np.allclose(after, before * (bound / norm), rtol=1e-6, atol=1e-30)


def test_clipping_is_idempotent_and_per_example() -> None:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    once = clip_l2(x, clip_norm=2.0)
    assert torch.allclose(clip_l2(once, clip_norm=2.0), once, rtol=1e-6)
    assert torch.equal(clip_l2(x[2:3], clip_norm=2.0)[0], once[2])
    assert once.dtype == torch.float32
    assert clip_l2(x.double(), clip_norm=2.0).dtype == torch.float64
    zero = torch.zeros(1, 1, 2, 2)
    assert torch.equal(clip_l2(zero, clip_norm=1.0), zero)


def test_clipping_holds_at_the_ends_of_float32() -> None:
    huge = torch.full((1, 3, 32, 32), 3e38)
    assert float(clip_l2(huge, clip_norm=1e-6).double().norm()) == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, float("nan")])
def test_bad_clip_norms_are_refused(bound: float) -> None:
    message = f"^clip_norm must be positive and finite, got {bound}$"
    with pytest.raises(ValueError, match=message):
        clip_l2(torch.zeros(1, 2), clip_norm=bound)
    with pytest.raises(ValueError, match=message):
        released(torch.zeros(1, 1, 2, 2), clip_norm=bound)


# --- The grid -------------------------------------------------------------------------------


def grid_norm(image: np.ndarray) -> int:
    """Sum of squares of whole numbers, in Python's integers."""
    return sum(int(value) ** 2 for value in image)


def hard_images(size: int, bound: float, rng: np.random.Generator) -> np.ndarray:
    """Random images and bad ones, in units in which the clip norm is 1: float32 (N, size)."""
    unit = np.ones(size) / math.sqrt(size)
    one = np.zeros(size)
    one[0] = 1.0
    rows = [factor * unit for factor in (0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 40.0)]
    rows += [factor * one for factor in (-0.5, -1.0, 1 + 1e-6, 1e5)]
    half_steps = (np.floor(bound * unit) + 0.5) / bound  # every pixel is rounded
    rows += [half_steps, -half_steps, half_steps * 1.001]
    rows += list(rng.standard_normal((60, size)) * 10.0 ** rng.uniform(-4, 2, (60, 1)))
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("size", [1, 3, 64, 3072, 49152])
@pytest.mark.parametrize("bound", [0.3, 3.0, 137.0, 4096.0, 2.0**20, 2.0**23])
def test_no_image_is_longer_than_the_clip_norm(size: int, bound: float) -> None:
    x = hard_images(size, bound, np.random.default_rng(size))
    grid = clip_to_grid(x, bound=bound, steps=bound)
    assert grid.dtype == np.float32
    assert np.array_equal(grid, np.rint(grid))
    assert all(grid_norm(row) <= bound**2 for row in grid)


def test_rounding_without_the_check_would_be_longer() -> None:
    """The planted fault that the test above is for."""
    x = hard_images(3072, 4096.0, np.random.default_rng(0))
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    careless = np.rint(4096.0 * x / np.maximum(norms, 1.0))
    assert any(grid_norm(row) > 4096.0**2 for row in careless)


def test_the_grid_is_close_to_the_clipped_image() -> None:
    rng = np.random.default_rng(1)
    x = (rng.uniform(-1, 1, (200, 3072)) * rng.uniform(0.01, 1, (200, 1))).astype(np.float32)
    steps = 4096.0 / 10.0  # C = sigma = 10
    grid = clip_to_grid(x, bound=4096.0, steps=steps) / steps
    exact = clip_l2(torch.from_numpy(x).double(), clip_norm=10.0).numpy()
    norms = np.linalg.norm(exact, axis=1)
    assert (
        np.linalg.norm(grid - exact, axis=1) <= 1e-3 * norms + 0.6 * math.sqrt(3072) / steps
    ).all()
    cosine = (grid * exact).sum(axis=1) / np.linalg.norm(grid, axis=1) / norms
    clipped = norms > 9.999
    assert clipped.any()
    assert cosine[clipped].min() > 0.9999
    assert np.linalg.norm(grid[clipped], axis=1).min() > 10.0 * (1 - 5e-4)


@pytest.mark.parametrize("t0", [1, 300, 675, 1000])
def test_releases_are_whole_steps(t0: int) -> None:
    rng = np.random.default_rng(2)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    clip_norm = min(10.0, 1000 * LINEAR.noise_to_signal(t0))
    made = released(images, t0=t0, clip_norm=clip_norm, shift=0.0)
    step = math.sqrt(1 - LINEAR.alpha_bar(t0)) / 4096
    whole = made.x_tilde.double().numpy() / step
    assert np.abs(whole - np.rint(whole)).max() < 1e-6 * max(1.0, np.abs(whole).max())


def test_floating_point_does_not_betray_the_image() -> None:
    """Mironov 2012: which numbers occur as outputs depends on the image, in floating point only.

    The attacker asks of each output y whether y - a is a value that the noise generator can give
    when scaled, by the low bits of the sum: for the naive mechanism a right guess is much likelier
    than its noise allows; for ours both candidates explain every output equally well.
    """
    rng = np.random.default_rng(3)
    a, b, sigma, count = 0.1, 8.0, 1000.0, 20_000  # next to the noise the two are the same

    def on_grid_of(candidate: float, y: np.ndarray) -> np.ndarray:
        """Share of outputs that lie on the float64 grid of noise around the candidate."""
        noise = y - candidate
        return noise + candidate == y

    coarse = 2.0**-10  # a generator with few bits, as all have: noise on a grid of its own
    noise = np.rint(rng.standard_normal(count) * sigma / coarse) * coarse
    naive = a + noise
    fits_a = np.rint((naive - a) / coarse) * coarse + a == naive
    fits_b = np.rint((naive - b) / coarse) * coarse + b == naive
    assert fits_a.mean() - fits_b.mean() > 0.9  # the naive mechanism is broken outright
    assert on_grid_of(a, naive).mean() > 0.5

    step = sigma / 4096
    ours = []
    for value in (a, b):
        x = np.full((count, 1), value, dtype=np.float32)
        m = clip_to_grid(x, bound=8.0 / step, steps=1 / step)
        ours.append((m + seeded(4).draw((count, 1))) * np.float32(step))
    for outputs in ours:
        multiples = np.rint(outputs.astype(np.float64) / np.float32(step))
        again = multiples.astype(np.float32) * np.float32(step)
        assert np.array_equal(again, outputs)  # every output is possible for every image


# --- Input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shift", "line"),
    [
        (255.0, 0.0, "image 2: values must be in [-1, 1] (pixels in [-1, 1] minus the shift), got"),
        (-1.5, 0.0, "got -1.5; give uint8 pixels or scaled images"),
        (-0.5, -1.0, "image 2: values must be in [0, 2]"),
        (math.nan, 0.0, "image 2 has values that are not finite"),
        (-math.inf, 0.0, "image 2 has values that are not finite"),
    ],
)
def test_wrongly_scaled_images_are_refused(value: float, shift: float, line: str) -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 0] = value
    with pytest.raises(ValueError, match=re.escape(line)):
        released(x, shift=shift, largest=None)


def test_settings_out_of_range_are_refused() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^shift must be in \[-1, 1\], got 1.5$"):
        released(x, shift=1.5)
    with pytest.raises(
        ValueError, match=r"^clip_norm must be at most 2048 sigma = 20.48 at t0 = 1"
    ):
        released(x, t0=1, clip_norm=21.0)
    assert len(released(x, t0=1, clip_norm=20.0)) == 1


def test_pixels_and_scaled_images_give_the_same() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    scaled = pixels.float() / 127.5 - 1.0 + 1.0
    first, second = (released(x, largest=None).x_tilde for x in (pixels, scaled))
    step = math.sqrt(1 - LINEAR.alpha_bar(600)) / 4096
    assert torch.allclose(first, second, atol=1.01 * step)


# --- Release --------------------------------------------------------------------------------


def test_release_has_the_mean_and_variance_of_the_mechanism() -> None:
    x = torch.zeros(3000, 1, 1, 3)
    x[:, 0, 0] = torch.tensor([30.0, -40.0, 0.0])  # norm 50: clipped tenfold
    abar = math.prod(1 - b for b in np.linspace(1e-4, 0.02, 1000)[:600])
    mean, cov = abar**0.5 * np.array([3.0, -4.0, 0.0]), (1 - abar) * np.eye(3)
    exact = torch.from_numpy(mean + (1 - abar) ** 0.5 * seeded().draw((3000, 3)) / 4096)
    assert torch.allclose(released(x).x_tilde.flatten(1).double(), exact, atol=2e-3)
    for source in (seeded(), SystemNoise()):
        assert moments_fault(released(x, source).x_tilde.flatten(1), mean, cov) is None
    for factor in (0.5, 0.0, 1.1):
        fault = released(x, ScaledNoise(factor)).x_tilde.flatten(1)
        assert moments_fault(fault, mean, cov) is not None
    unclipped = released(x, clip_norm=50.0).x_tilde.flatten(1)
    assert moments_fault(unclipped, mean, cov) is not None


def test_noise_is_independent_across_images_and_pixels() -> None:
    # 600 images are more than one chunk, so that noise reused per chunk would show.
    def correlations(source: object, rows: slice) -> np.ndarray:
        z = released(torch.zeros(600, 3, 32, 32), source).x_tilde.flatten(1).numpy()
        matrix = np.corrcoef(z if rows == slice(None) else z[:, rows].T)
        return np.abs(matrix[np.triu_indices(len(matrix), 1)])

    for rows, size in ((slice(None), 3072), (slice(300), 600)):  # images, then pixels
        found = correlations(seeded(), rows)
        assert found.max() < 1.1 * float(stats.norm.isf(5e-7 / len(found))) / math.sqrt(size)
    assert correlations(ScaledNoise(1.0), slice(None)).max() > 0.99  # starts anew in each chunk


def test_release_records_what_it_was_made_with() -> None:
    x = torch.full((4, 1, 2, 2), 9.0)
    labels = torch.tensor([3, 1, 2, 0], dtype=torch.int32)
    made = release(
        x, labels, schedule=LINEAR, t0=690, clip_norm=10, shift=-1, noise=seeded(), largest=9.0
    )
    assert made.x_tilde.dtype == torch.float32
    assert made.labels.dtype == torch.int64
    assert made.labels.tolist() == [3, 1, 2, 0]
    assert len(made) == 4
    assert made.event == release_event(LINEAR, t0=690, clip_norm=10)
    assert made.event.noise_multiplier == pytest.approx(LINEAR.noise_to_signal(690) / 20)
    assert dataclasses.asdict(made.parameters) == {
        "t0": 690,
        "clip_norm": 10.0,
        "shift": -1.0,
        "schedule": "linear",
        "num_steps": 1000,
        "alpha_bar": LINEAR.alpha_bar(690),
        "grid": 4096,
    }
    assert made.noise_source == SeededNoise.description
    assert made.seeded
    assert not released(x, SystemNoise()).seeded
    part = select(made, torch.tensor([2, 0]))
    assert torch.equal(part.x_tilde, made.x_tilde[[2, 0]])
    assert part.labels.tolist() == [2, 3]
    assert (part.parameters, part.event) == (made.parameters, made.event)
    assert len(released(torch.zeros(0, 1, 2, 2))) == 0


@pytest.mark.parametrize("t0", [0, -1, 1001])
def test_a_release_needs_noise(t0: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"t0 must be in [1, 1000], got {t0}")):
        released(torch.zeros(1, 1, 2, 2), t0=t0)


def test_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("labels (N,), got (2, 4) and (2,)")):
        released(torch.zeros(2, 4))
    x = torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match=re.escape("got (3, 1, 2, 2) and (2,)")):
        release(x, torch.zeros(2), schedule=LINEAR, t0=9, clip_norm=1.0, shift=0.0, noise=seeded())
    for value in (math.inf, float("nan")):
        x[1, 0, 1, 1] = value
        with pytest.raises(ValueError, match=r"^image 1 has values that are not finite$"):
            released(x)


def constructions(source: str) -> int:
    """How often a module calls ReleasedDataset."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = [getattr(function, "id", getattr(function, "attr", "")) for function in calls]
    return names.count("ReleasedDataset")


def test_only_the_mechanism_makes_releases() -> None:
    assert constructions("types.ReleasedDataset(x_tilde=x)") == 1  # the scanner sees a fault
    makers = set()
    for folder in ("fedpdm", "clients", "strategies", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if constructions(path.read_text(encoding="utf-8")):
                makers.add(path.relative_to(ROOT).as_posix())
    makers.discard("tests/attack_paths.py")  # a mechanism of its own, to plant faults in
    assert makers == {"fedpdm/mechanism/gaussian.py", "fedpdm/mechanism/records.py"}
