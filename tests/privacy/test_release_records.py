"""Releases as records: exact to the bit, and unable to claim less than they cost."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.events import implied_event, release_event, same_release
from fedpdm.privacy.mechanism import (
    SeededNoise,
    SystemNoise,
    release,
    release_metadata,
    restore_release,
)
from fedpdm.privacy.types import ReleasedDataset

LINEAR = make_schedule("linear")


def released(noise: object = None, **options: object) -> ReleasedDataset:
    given = {"schedule": LINEAR, "t0": 600, "clip_norm": 5.0, "shift": -1.0, **options}
    source = noise or SeededNoise(np.random.SeedSequence(0))
    images = torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)
    return release(images, torch.arange(3), noise=source, **given)  # type: ignore[arg-type]


def restored(x_tilde: Any, labels: Any, metadata: dict[str, str], **options: Any) -> Any:
    return restore_release({"x_tilde": x_tilde, "labels": labels}, metadata, **options)


def metadata_of(made: ReleasedDataset) -> dict[str, str]:
    return release_metadata(
        made.parameters, made.event, noise_source=made.noise_source, seeded=made.seeded
    )


def record() -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    made = released()
    return made.x_tilde, made.labels, metadata_of(made)


def test_records_restore_to_the_bit() -> None:
    made = released(clip_norm=0.1 + 0.2, shift=1 / 3, t0=577)
    again = restored(made.x_tilde, made.labels, metadata_of(made))
    assert again.parameters == made.parameters
    assert again.event == made.event
    assert (again.noise_source, again.seeded) == (made.noise_source, made.seeded)
    assert torch.equal(again.x_tilde, made.x_tilde)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        # Each of these would claim less loss, or the same loss for another release.
        ("noise_multiplier", "50.0", "noise multiplier 50.0 does not follow"),
        ("noise_multiplier", "nan", "noise multiplier nan does not follow"),
        ("noise_multiplier", "inf", "noise multiplier inf does not follow"),
        ("clip_norm", "0.5", "does not follow from its parameters"),
        ("clip_norm", "inf", "clip_norm positive and finite, got"),
        ("clip_norm", "-5.0", "clip_norm positive and finite, got"),
        ("clip_norm", "nan", "clip_norm positive and finite, got"),
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
        ("grid", "fine", "incomplete or malformed"),
        ("grid", "", "incomplete or malformed"),
        ("grid", "4096.0", "incomplete or malformed"),
        ("grid", "0", "grid must be at least 1, got 0"),
        ("grid", "-4096", "grid must be at least 1, got -4096"),
        ("seeded", "yes", "incomplete or malformed"),
        ("seeded", "True", "incomplete or malformed"),
        ("seeded", "", "incomplete or malformed"),
        ("seeded", "false", "seeded is False, but the noise is 'seeded"),
        ("noise_source", "operating-system entropy", "seeded is True, but the noise is 'operating"),
    ],
)
def test_records_that_contradict_themselves_are_refused(
    field: str, value: str, message: str
) -> None:
    x_tilde, labels, metadata = record()
    with pytest.raises(ValueError, match=re.escape(message)):
        restored(x_tilde, labels, {**metadata, field: value})


def test_incomplete_records_are_refused() -> None:
    x_tilde, labels, metadata = record()
    for field in metadata:
        rest = {key: value for key, value in metadata.items() if key != field}
        with pytest.raises(ValueError, match=f"release record is incomplete .*{field}"):
            restored(x_tilde, labels, rest)
    for images, classes in (
        (x_tilde.double(), labels),
        (x_tilde[0], labels),
        (x_tilde, labels[:2]),
        (x_tilde, labels.float()),
        (x_tilde, labels.to(torch.int32)),
    ):
        with pytest.raises(ValueError, match=re.escape("expected float32 (N, C, H, W)")):
            restored(images, classes, metadata)
    with pytest.raises(ValueError, match="values that are not finite"):
        restored(x_tilde * math.inf, labels, metadata)
    trusted = restored(x_tilde * math.inf, labels, metadata, check_values=False)
    assert len(trusted) == 3


def test_secure_releases_say_so() -> None:
    made = released(SystemNoise())
    again = restored(made.x_tilde, made.labels, metadata_of(made))
    assert not again.seeded
    assert "operating-system" in again.noise_source
    with pytest.raises(ValueError, match="seeded is True, but the noise is 'operating-system"):
        restored(made.x_tilde, made.labels, metadata_of(made) | {"seeded": "true"})


def test_the_event_follows_from_the_parameters() -> None:
    made = released(t0=690, clip_norm=10.0)
    assert implied_event(made.parameters).noise_multiplier == pytest.approx(
        release_event(LINEAR, t0=690, clip_norm=10.0).noise_multiplier, rel=1e-15
    )


def test_releases_are_the_same_up_to_rounding_of_alpha_bar() -> None:
    ours = released().parameters
    assert same_release(ours, replace(ours, alpha_bar=ours.alpha_bar * (1 + 1e-12)))
    changes = {
        "alpha_bar": ours.alpha_bar * (1 + 1e-6), "t0": 601, "clip_norm": 5.1, "shift": 0.0,
        "schedule": "cosine", "num_steps": 999, "grid": 2048,
    }  # fmt: skip
    for name, value in changes.items():
        assert not same_release(ours, replace(ours, **{name: value})), name
