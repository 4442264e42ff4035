"""Clipping and release: closed forms, what is refused, and the randomness of what leaves."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.events import release_event, release_parameters
from fedpdm.privacy.mechanism import (
    SeededNoise,
    SystemNoise,
    clip_l2,
    clip_to_grid,
    noised_chunks,
    release,
    select,
)
from fedpdm.privacy.types import ReleasedDataset
from tests.support.cases import every
from tests.support.oracles import moments_fault

ROOT = Path(__file__).resolve().parents[2]
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


# --- Input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shift", "line"),
    [
        (255.0, 0.0, "image 3: values must be in [-1, 1] (pixels in [-1, 1] minus the shift), got"),
        (-1.5, 0.0, "got -1.5; give uint8 pixels or scaled images"),
        (-0.5, -1.0, "image 3: values must be in [0, 2]"),
        (
            0.5,
            1.0,
            "image 3: values must be in [-2, 0] (pixels in [-1, 1] minus the shift), got 0.5",
        ),
        (1.3, 0.25, "image 3: values must be in [-1.25, 0.75]"),
        (1.002, 0.0, "image 3: values must be in [-1, 1]"),
        (math.nan, 0.0, "image 3 has values that are not finite"),
        (-math.inf, 0.0, "image 3 has values that are not finite"),
    ],
)
def test_wrongly_scaled_images_are_refused(value: float, shift: float, line: str) -> None:
    x = torch.zeros(5, 1, 2, 2)
    x[3, 0, 1, 0] = value
    with pytest.raises(ValueError, match=re.escape(line)):
        released(x, shift=shift, largest=None)


def test_the_refused_image_is_the_first_bad_one_of_all_chunks() -> None:
    x = torch.zeros(100, 3, 32, 32)  # five chunks
    x[70, 0, 0, 0], x[71], x[90, 1, 2, 3] = 3.0, 200.0, math.nan
    with pytest.raises(ValueError, match=r"^image 70: values must be in \[0, 2\] .* got 3;"):
        released(x, largest=None)
    x[69, 2, 31, 31] = math.nan  # said first, whatever else is wrong
    with pytest.raises(ValueError, match=r"^image 69 has values that are not finite$"):
        released(x, largest=None)
    with pytest.raises(ValueError, match=r"^image 1: values must be in .* got 9; give uint8"):
        released(torch.tensor([0, 9]).view(2, 1, 1, 1), largest=None)  # pixels, but not uint8


def test_data_that_are_not_images_have_a_bound_of_their_own() -> None:
    x = torch.full((2, 1, 1, 1), -7.0)
    assert len(released(x, largest=7.0)) == 2
    with pytest.raises(ValueError, match=r"^image 0: values must be in \[-6, 6\] .* got -7;"):
        released(x, largest=6.0)


@pytest.mark.parametrize("shift", [-1.0, -0.3, 0.0, 1.0])
def test_pixels_are_always_in_range_and_scaled_images_give_the_same(shift: float) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    scaled = pixels.float() / 127.5 - 1.0 - shift
    step = math.sqrt(1 - LINEAR.alpha_bar(600)) / 4096
    first, *others = (
        released(x, shift=shift, largest=None).x_tilde for x in (pixels, scaled, scaled.double())
    )
    for other in others:
        assert torch.allclose(first, other, atol=1.01 * step)
    assert torch.equal(released(pixels, shift=shift, largest=0.0).x_tilde, first)
    away = released(pixels, shift=shift - 0.01 if shift > 0 else shift + 0.01).x_tilde
    assert not torch.allclose(first, away, atol=1.01 * step)


@pytest.mark.parametrize("shift", [1.5, -1.0001, math.inf, math.nan])
def test_shifts_out_of_range_are_refused(shift: float) -> None:
    with pytest.raises(ValueError, match=rf"^shift must be in \[-1, 1\], got {shift}$"):
        released(torch.zeros(1, 1, 2, 2), shift=shift)


@pytest.mark.parametrize("t0", [1, 600])
def test_clip_norms_with_next_to_no_noise_are_refused(t0: int) -> None:
    x = torch.full((1, 1, 1, 1), 3e4)
    largest = 2048 * LINEAR.noise_to_signal(t0)
    message = f"clip_norm must be at most 2048 sigma = {largest:.4g} at t0 = {t0}, got"
    with pytest.raises(ValueError, match=re.escape(message) + ".*: next to no noise$"):
        released(x, t0=t0, clip_norm=largest * 1.0001)
    made = released(x, t0=t0, clip_norm=largest * 0.9999, largest=3e4)
    scale = math.sqrt(LINEAR.alpha_bar(t0))
    assert float(made.x_tilde) == pytest.approx(scale * min(largest, 3e4), rel=5e-3)


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
    for shape in ((2, 4), (2, 4, 4), (2, 1, 1, 4, 4)):
        with pytest.raises(ValueError, match=re.escape(f"labels (N,), got {shape} and (2,)")):
            released(torch.zeros(shape))
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


@pytest.mark.slow
def test_only_the_mechanism_makes_releases() -> None:
    assert constructions("types.ReleasedDataset(x_tilde=x)") == 1  # the scanner sees a fault
    makers = set()
    for folder in ("fedpdm", "clients", "strategies", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if constructions(path.read_text(encoding="utf-8")):
                makers.add(path.relative_to(ROOT).as_posix())
    makers.discard("tests/support/attack_paths.py")  # a mechanism of its own, to plant faults in
    assert makers == {
        "fedpdm/privacy/mechanism/gaussian.py",
        "fedpdm/privacy/mechanism/images.py",
    }


# --- Numbers that are none ------------------------------------------------------------------

NOT_FINITE = [
    ({"largest": math.inf}, "largest must be at least 0 and finite, got inf"),
    ({"largest": math.nan}, "largest must be at least 0 and finite, got nan"),
    ({"largest": -1.0}, "largest must be at least 0 and finite, got -1.0"),
    ({"clip_norm": math.inf}, "clip_norm must be positive and finite, got inf"),
    ({"clip_norm": math.nan}, "clip_norm must be positive and finite, got nan"),
    ({"shift": math.inf}, r"shift must be in \[-1, 1\], got inf"),
    ({"shift": math.nan}, r"shift must be in \[-1, 1\], got nan"),
]


@every("options, words", NOT_FINITE)
def test_parameters_that_are_not_finite_are_refused_by_name(
    options: dict[str, float], words: str
) -> None:
    """With `largest` infinite, an infinite value was clipped to NaN and released."""
    images = torch.full((2, 1, 4, 4), math.inf)
    with pytest.raises(ValueError, match=words):
        released(images, **options)


RECORDED = release_parameters(LINEAR, t0=600, clip_norm=5.0, shift=-1.0)


@every("name, value", itertools.product(("alpha_bar", "clip_norm", "shift"), (math.inf, math.nan)))
def test_recorded_parameters_that_are_not_finite_release_nothing(name: str, value: float) -> None:
    parameters = dataclasses.replace(RECORDED, **{name: value})
    pixels = np.zeros((2, 1, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match=rf"{name}\b.* got .*{value}"):
        list(noised_chunks(pixels, parameters=parameters, noise=seeded()))


@every("bound, steps", [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf), (0.0, 1.0), (1.0, -1.0)])
def test_a_grid_that_is_none(bound: float, steps: float) -> None:
    name, value = ("steps", steps) if bound == 1.0 else ("bound", bound)
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        clip_to_grid(np.ones((1, 4), dtype=np.float32), bound=bound, steps=steps)


def test_what_is_prepared_fits_float32() -> None:
    """1e300 is finite, and infinite in float32."""
    pixels = np.zeros((2, 1, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="prepare must return finite values of shape"):
        list(
            noised_chunks(
                pixels, parameters=RECORDED, noise=seeded(), prepare=lambda x: x + np.float64(1e300)
            )
        )
