"""Clipping and release: closed forms, randomness of the noise, and records that cannot lie."""

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
    release,
    release_event,
    release_metadata,
    restore_release,
    select,
)
from fedpdm.schedule import make_schedule
from fedpdm.types import ReleasedDataset
from tests.oracles import moments_fault, normal_fault, zero_mean_fault

ROOT = Path(__file__).resolve().parent.parent
LINEAR = make_schedule("linear")


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed))


class ScaledNoise:
    """A planted fault: noise of another size."""

    description = "planted fault"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.factor * seeded(1).standard_normal(shape)


def released(x_0: torch.Tensor, noise: object = None, **options: object) -> ReleasedDataset:
    given = {"schedule": LINEAR, "t0": 600, "clip_norm": 5.0, "shift": -1.0, **options}
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


# --- Noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SystemNoise(), seeded(3)], ids=["system", "seeded"])
def test_noise_is_standard_normal(source: SystemNoise) -> None:
    z = source.standard_normal((100_001,))
    assert z.dtype == np.float64
    assert normal_fault(z) is None
    half = len(z) // 2  # Box-Muller makes the halves from the same uniforms
    assert zero_mean_fault(z[:half, None] * z[-half:, None]) is None
    assert zero_mean_fault(z[:-1, None] * z[1:, None]) is None
    # Planted faults: half the noise, 2% too much, a light tail, a draw that comes twice.
    assert normal_fault(0.5 * z) is not None
    assert normal_fault(1.02 * z) is not None
    assert normal_fault(np.clip(z, -2.2, 2.2)) is not None
    assert zero_mean_fault(z[:, None] * z[:, None]) is not None


def test_system_noise_reaches_the_tails() -> None:
    z = SystemNoise().standard_normal((400_000,))
    beyond = int((np.abs(z) > 4).sum())
    expected = stats.binom(len(z), 2 * stats.norm.sf(4))
    assert expected.ppf(5e-7) <= beyond <= expected.isf(5e-7)


def test_system_noise_never_repeats() -> None:
    first, second = SystemNoise(), SystemNoise()
    draws = np.concatenate([n.standard_normal((2, 500)).ravel() for n in (first, second, first)])
    assert len(np.unique(draws)) == len(draws)
    shapes = [(), (1,), (3, 5), (0, 4), (2, 3, 7)]
    assert [first.standard_normal(shape).shape for shape in shapes] == shapes


def test_seeded_noise_repeats_and_says_so() -> None:
    assert np.array_equal(seeded(4).standard_normal((9,)), seeded(4).standard_normal((9,)))
    assert not np.array_equal(seeded(4).standard_normal((9,)), seeded(5).standard_normal((9,)))
    assert "simulation only" in SeededNoise.description
    assert "operating-system" in SystemNoise.description


# --- Release --------------------------------------------------------------------------------


def test_release_has_the_mean_and_variance_of_the_mechanism() -> None:
    x = torch.zeros(3000, 1, 1, 3)
    x[:, 0, 0] = torch.tensor([30.0, -40.0, 0.0])  # norm 50: clipped tenfold
    abar = math.prod(1 - b for b in np.linspace(1e-4, 0.02, 1000)[:600])
    mean, cov = abar**0.5 * np.array([3.0, -4.0, 0.0]), (1 - abar) * np.eye(3)
    exact = torch.from_numpy(mean + (1 - abar) ** 0.5 * seeded().standard_normal((3000, 3)))
    assert torch.allclose(released(x).x_tilde.flatten(1).double(), exact, atol=1e-6)
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
    made = release(x, labels, schedule=LINEAR, t0=690, clip_norm=10, shift=-1, noise=seeded())
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
    }
    assert made.noise_source == SeededNoise.description
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


# --- Records --------------------------------------------------------------------------------


def record() -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    made = released(torch.ones(3, 1, 2, 2))
    return made.x_tilde, made.labels, release_metadata(made)


def test_records_restore_to_the_bit() -> None:
    made = released(torch.ones(3, 1, 2, 2), clip_norm=0.1 + 0.2, shift=1 / 3, t0=577)
    again = restore_release(made.x_tilde, made.labels, release_metadata(made))
    assert again.parameters == made.parameters
    assert again.event == made.event
    assert again.noise_source == made.noise_source
    assert torch.equal(again.x_tilde, made.x_tilde)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        # Each of these would claim less loss, or the same loss for another release.
        ("noise_multiplier", "50.0", "noise multiplier 50.0 does not follow"),
        ("noise_multiplier", "nan", "noise multiplier nan does not follow"),
        ("noise_multiplier", "inf", "noise multiplier inf does not follow"),
        ("clip_norm", "0.5", "does not follow from its parameters"),
        ("clip_norm", "inf", "clip_norm positive, got"),
        ("clip_norm", "-5.0", "clip_norm positive, got"),
        ("clip_norm", "nan", "clip_norm positive, got"),
        ("alpha_bar", "0.0001", "does not follow from its parameters"),
        ("alpha_bar", "1.0", "alpha_bar must be in (0, 1)"),
        ("alpha_bar", "0.0", "alpha_bar must be in (0, 1)"),
        ("alpha_bar", "nan", "alpha_bar must be in (0, 1)"),
        ("t0", "0", "t0 must be in [1, 1000]"),
        ("t0", "1001", "t0 must be in [1, 1000]"),
        ("shift", "inf", "shift finite"),
        ("t0", "six", "incomplete or malformed"),
        ("num_steps", "1e3", "incomplete or malformed"),
        ("clip_norm", "", "incomplete or malformed"),
    ],
)
def test_records_that_contradict_themselves_are_refused(
    field: str, value: str, message: str
) -> None:
    x_tilde, labels, metadata = record()
    with pytest.raises(ValueError, match=re.escape(message)):
        restore_release(x_tilde, labels, {**metadata, field: value})


def test_incomplete_records_are_refused() -> None:
    x_tilde, labels, metadata = record()
    for field in metadata:
        rest = {key: value for key, value in metadata.items() if key != field}
        with pytest.raises(ValueError, match=f"release record is incomplete .*{field}"):
            restore_release(x_tilde, labels, rest)
    for images, classes in (
        (x_tilde.double(), labels),
        (x_tilde[0], labels),
        (x_tilde, labels[:2]),
        (x_tilde, labels.float()),
        (x_tilde, labels.to(torch.int32)),
    ):
        with pytest.raises(ValueError, match=re.escape("expected float32 (N, C, H, W)")):
            restore_release(images, classes, metadata)
    with pytest.raises(ValueError, match="values that are not finite"):
        restore_release(x_tilde * math.inf, labels, metadata)


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
    assert makers == {"fedpdm/mechanism.py"}
