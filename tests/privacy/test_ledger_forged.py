"""A ledger whose numbers contradict each other is refused, although every checksum is right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpdm.privacy.ledger import read_ledger
from tests.privacy.test_ledger import Fields, bodies_of, forge, make_ledger, refused
from tests.support.release_toys import epsilon_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def data(path: Path) -> bytes:
    """A ledger of three records, which lies at `path`."""
    make_ledger(path)
    return path.read_bytes()


def test_a_forgery_without_a_contradiction_is_read(path: Path, data: bytes) -> None:
    """So those below are refused for what they say."""
    bodies = bodies_of(data)
    bodies[1]["images"] += 1
    bodies[1]["sha256"] = "ab" * 32
    path.write_bytes(forge(bodies))
    assert read_ledger(path).releases()[0].images == 11


def put(*names: str, value: Any) -> Callable[[Fields], None]:
    def change(body: Fields) -> None:
        for name in names[:-1]:
            body = body[name]
        body[names[-1]] = value

    return change


def leave_out(*names: str) -> Callable[[Fields], None]:
    def change(body: Fields) -> None:
        for name in names[:-1]:
            body = body[name]
        del body[names[-1]]

    return change


def less_loss(body: Fields) -> None:
    """A larger multiplier, and the epsilon that follows from it: the parameters say otherwise."""
    body["noise_multiplier"] *= 2
    body["epsilon"] = epsilon_of([body["noise_multiplier"]])


FORGERIES: dict[str, Callable[[Fields], None]] = {
    "smaller epsilon": put("epsilon", value=0.5),
    "epsilon a little smaller": lambda body: body.update(epsilon=body["epsilon"] * 0.999),
    "negative epsilon": put("epsilon", value=-1.0),
    "larger multiplier": put("noise_multiplier", value=5.0),
    "multiplier with its epsilon": less_loss,
    "smaller clip norm": put("parameters", "clip_norm", value=1.0),
    "negative clip norm": put("parameters", "clip_norm", value=-3.0),
    "no clip norm": put("parameters", "clip_norm", value=0),
    "infinite clip norm": put("parameters", "clip_norm", value=math.inf),
    "clip norm in words": put("parameters", "clip_norm", value="3"),
    "t0 in words": put("parameters", "t0", value="675"),
    "t0 beyond the last": put("parameters", "t0", value=1001),
    "noisier schedule": put("parameters", "alpha_bar", value=1e-5),
    "no signal": put("parameters", "alpha_bar", value=0),
    "no noise": put("parameters", "alpha_bar", value=1),
    "more than signal": put("parameters", "alpha_bar", value=1.5),
    "huge alpha_bar": put("parameters", "alpha_bar", value=10**400),
    "larger delta": put("delta", value=1e-2),
    "impossible delta": put("delta", value=0),
    "NaN epsilon": put("epsilon", value=math.nan),
    "NaN delta": put("delta", value=math.nan),
    "NaN multiplier": put("noise_multiplier", value=math.nan),
    "NaN alpha_bar": put("parameters", "alpha_bar", value=math.nan),
    "no images": put("images", value=0),
    "fewer than no images": put("images", value=-4),
    "images in words": put("images", value="ten"),
    "half an image": put("images", value=10.5),
    "no count": put("images", value=None),
    "two sides": put("image_shape", value=[4, 4]),
    "four sides": put("image_shape", value=[1, 1, 4, 4]),
    "shape in words": put("image_shape", value="abc"),
    "shape of words": put("image_shape", value=["1", "4", "4"]),
    "empty shape": put("image_shape", value=[1, 0, 4]),
    "no shape": put("image_shape", value=None),
    "seeded in words": put("seeded", value="false"),
    "another file": put("file", value="000002.safetensors"),
    "one more field": put("more", value=1),
    "release in words": put("release", value="one"),
    "digest is a number": put("sha256", value=7),
    "parameters are a list": put("parameters", value=[675, 3.0]),
    "unknown parameter": put("parameters", "more", value=1),
    "parameter missing": leave_out("parameters", "clip_norm"),
    **{
        f"{name} missing": leave_out(name)
        for name in (
            "release",
            "sha256",
            "images",
            "image_shape",
            "parameters",
            "noise_multiplier",
            "epsilon",
            "delta",
            "noise_source",
            "seeded",
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORGERIES)
def test_numbers_that_contradict_each_other_are_noticed(path: Path, data: bytes, kind: str) -> None:
    """Although the forger works out every checksum again."""
    bodies = bodies_of(data)
    FORGERIES[kind](bodies[1])
    line = refused(path, forge(bodies))
    assert re.search(r"record 2: |line 3: record cannot be read", line), line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.pop(0), "record was edited, moved or damaged"),
        (lambda b: b[0].update(kind="note"), "begins with a record of kind opened"),
        (lambda b: b[0].pop("client_id"), "record opened has no client_id"),
        (lambda b: b[0].update(client_id="3"), "record opened has no client_id"),
        (lambda b: b[0].update(client_id=True), "record opened has no client_id"),
        (lambda b: b[1].update(record=3), "record was edited, moved or damaged"),
        (lambda b: b[1].pop("at"), "record cannot be read"),
        (lambda b: b[1].pop("kind"), "record cannot be read"),
        (lambda b: b.insert(1, dict(b[0], record=2)), "record was edited, moved or damaged"),
    ],
)
def test_a_forged_order_is_noticed(
    path: Path, data: bytes, change: Callable[[list[Fields]], Any], words: str
) -> None:
    bodies = bodies_of(data)
    change(bodies)
    assert words in refused(path, forge(bodies))


def test_another_version_is_not_read(path: Path, data: bytes) -> None:
    title = data.decode().split("\n")[0].replace("version 1", "version 2")
    assert "line 1: is not the title" in refused(path, forge(bodies_of(data), title))
