"""Messages: round trips, what is refused on the way out, and anything malformed on the way in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.mechanism import SeededNoise, release
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.wire import WireError
from fedpdm.wire.types import CoarseUpdate
from tests.support.cases import every

LINEAR = make_schedule("linear")
LIKE = {"conv.weight": torch.zeros(2, 3), "conv.bias": torch.zeros(2), "scale": torch.zeros(())}


def update(**options: Any) -> CoarseUpdate:
    weights = {
        "scale": torch.tensor(0.5),
        "conv.bias": torch.tensor([1.0, -2.0]),
        "conv.weight": torch.arange(6.0).view(2, 3),
    }
    given = {"weights": weights, "num_examples": 12, "client_id": 3, "round": 7}
    given |= {"seeded": False, **options}
    return CoarseUpdate(**given)


def released(n: int = 3) -> ReleasedDataset:
    return release(
        torch.ones(n, 1, 2, 2),
        torch.arange(n),
        schedule=LINEAR,
        t0=600,
        clip_norm=5.0,
        shift=-1.0,
        noise=SeededNoise(np.random.SeedSequence(0)),
    )


def decode_update(message: wire.Message) -> CoarseUpdate:
    return wire.decode_update(message, like=LIKE, round=7, who="client 3")


def decode_release(message: wire.Message) -> ReleasedDataset:
    return wire.decode_release(message, who="client 3")


def decode_model(message: wire.Message) -> dict[str, torch.Tensor]:
    return wire.decode_model(message, who="client 3")


MESSAGES: dict[str, tuple[wire.Message, Callable[[wire.Message], Any]]] = {
    "update": (wire.encode_update(update()), decode_update),
    "release": (wire.encode_release(released(), client_id=3), decode_release),
    "model": (wire.encode_model(LIKE), decode_model),
}


def craft(
    tensors: dict[str, tuple[str, list[int], int]],
    metadata: dict[str, object] | None,
    header: dict[str, object] | None = None,
) -> wire.Message:
    """A safetensors message by hand: name -> (dtype, shape, bytes of zeros)."""
    table: dict[str, object] = {}
    if metadata is not None:
        table["__metadata__"] = {"fedpdm": json.dumps({"version": "1", **metadata})}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({**table, **(header or {})}).encode()
    return [np.frombuffer(len(text).to_bytes(8, "little") + text + bytes(end), dtype=np.uint8)]


# --- Round trips ----------------------------------------------------------------------------


def test_updates_travel_by_name() -> None:
    sent = update()
    got = decode_update(wire.encode_update(sent))
    assert (got.num_examples, got.client_id, got.round, got.seeded) == (12, 3, 7, False)
    assert decode_update(wire.encode_update(update(seeded=True))).seeded is True
    assert got.weights.keys() == sent.weights.keys()
    assert all(torch.equal(got.weights[name], sent.weights[name]) for name in sent.weights)


def test_releases_travel_with_their_event() -> None:
    sent = released()
    got = decode_release(wire.encode_release(sent, client_id=3))
    for field in ("parameters", "event", "noise_source", "seeded"):
        assert getattr(got, field) == getattr(sent, field)
    assert torch.equal(got.x_tilde, sent.x_tilde)
    assert torch.equal(got.labels, sent.labels)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor([9e5, -9e5, 1e-45, -0.0]),
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor([2**60]),
    ],
)
def test_models_travel_in_any_shape_and_layout(tensor: torch.Tensor) -> None:
    got = decode_model(wire.encode_model({"a": tensor, "b.c": tensor + 1}))
    assert got["a"].dtype == tensor.dtype
    assert torch.equal(got["a"].nan_to_num(), tensor.nan_to_num())
    assert got["a"].shape == tensor.shape


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.000001e6, -3e38])
def test_models_must_be_finite_and_of_a_networks_size(value: float) -> None:
    message = wire.encode_model({"a": torch.zeros(2), "b": torch.tensor([[0.0, value]])})
    with pytest.raises(WireError, match="coarse model from client 3: b has values "):
        decode_model(message)


def test_messages_are_one_array_of_bytes_and_have_a_digest() -> None:
    for message, _ in MESSAGES.values():
        assert [(array.dtype, array.ndim) for array in message] == [(np.uint8, 1)]
        assert wire.message_bytes(message) == len(message[0].tobytes())
    again = wire.encode_update(update())
    assert wire.fingerprint(again) == wire.fingerprint(MESSAGES["update"][0])
    other = wire.encode_update(update(num_examples=13))
    assert wire.fingerprint(other) != wire.fingerprint(again)
    assert re.fullmatch("[0-9a-f]{64}", wire.fingerprint(again))
    assert wire.encode_nothing() == []
    assert wire.message_bytes([]) == 0


# --- What may not leave ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing",
    [
        torch.zeros(3, 1, 2, 2),
        np.zeros((3, 1, 2, 2)),
        {"model.conv.weight": torch.zeros(1), "ema.conv.weight": torch.zeros(1)},
        [torch.zeros(2)],
        None,
        dataclasses.make_dataclass("Lookalike", ["x_tilde", "labels", "weights"])(0, 0, {}),
    ],
    ids=["tensor", "array", "fine state", "list", "nothing", "lookalike"],
)
def test_only_the_two_types_may_leave(thing: Any) -> None:
    name = type(thing).__name__
    with pytest.raises(WireError, match=f"^only a CoarseUpdate may leave here, got {name}$"):
        wire.encode_update(thing)
    with pytest.raises(WireError, match=f"^only a Release may leave here, got {name}$"):
        wire.encode_release(thing, client_id=3)


def test_one_type_does_not_pass_as_the_other() -> None:
    with pytest.raises(WireError, match="only a CoarseUpdate may leave here, got ReleasedDataset"):
        wire.encode_update(released())  # type: ignore[arg-type]
    with pytest.raises(WireError, match="only a Release may leave here, got CoarseUpdate"):
        wire.encode_release(update(), client_id=3)  # type: ignore[arg-type]


# --- What is not accepted -------------------------------------------------------------------

ZEROS = {"conv.weight": ("F32", [2, 3], 24), "conv.bias": ("F32", [2], 8), "scale": ("F32", [], 4)}
HEADER: dict[str, object] = {
    "kind": "coarse-update",
    "num_examples": "12",
    "client_id": "3",
    "round": "7",
    "seeded": "false",
    "basis": "released",
}


def test_the_crafted_message_is_fine_as_it_is() -> None:
    weights = decode_update(craft(ZEROS, HEADER)).weights
    assert all(torch.equal(weights[name], LIKE[name]) for name in LIKE)


@every(
    "message, reason",
    [
        ([], "expected one uint8 array from client 3, got 0 arrays"),
        (MESSAGES["update"][0] * 2, "expected one uint8 array from client 3, got 2 arrays"),
        ([np.zeros((2, 2), np.uint8)], "expected one uint8 array from client 3"),
        ([np.zeros(9, np.float32)], "expected one uint8 array from client 3"),
        ([np.zeros(0, np.uint8)], "malformed message from client 3"),
        ([np.full(64, 255, np.uint8)], "malformed message from client 3"),
        (MESSAGES["release"][0], "expected a coarse-update message (version 1) from client 3"),
        (MESSAGES["model"][0], "expected a coarse-update message (version 1) from client 3"),
        (craft(ZEROS, None), "malformed message from client 3"),
        (craft(ZEROS, {**HEADER, "version": "2"}), "got 'coarse-update' (version '2')"),
        (craft(ZEROS, {"kind": "coarse-update"}), "update of client 3: malformed header"),
        (craft(ZEROS, {**HEADER, "round": "six"}), "update of client 3: malformed header"),
        (craft(ZEROS, {**HEADER, "seeded": "no"}), "update of client 3: malformed header: 'no'"),
        (
            craft(ZEROS, {k: v for k, v in HEADER.items() if k != "seeded"}),
            "update of client 3: malformed header: 'seeded'",
        ),
        (craft(ZEROS, {**HEADER, "num_examples": 1.5}), "update of client 3: malformed header"),
        (craft(ZEROS, {**HEADER, "num_examples": "9" * 5000}), "client 3: malformed header"),
        (craft(ZEROS, {**HEADER, "num_examples": "0"}), "num_examples must be at least 1"),
        (craft(ZEROS, {**HEADER, "num_examples": "-4"}), "num_examples must be at least 1"),
        (craft(ZEROS, {**HEADER, "round": "8"}), "client 3: made for round 8, expected 7"),
        (
            craft({k: v for k, v in ZEROS.items() if k != "scale"}, HEADER),
            "update of client 3: missing scale",
        ),
        (
            craft({**ZEROS, "raw": ("F32", [1], 4)}, HEADER),
            "update of client 3: unexpected raw",
        ),
        (
            craft({**ZEROS, "conv.bias": ("F32", [1, 2], 8)}, HEADER),
            "client 3: conv.bias must be torch.float32 (2,), got torch.float32 (1, 2)",
        ),
        (
            craft({**ZEROS, "conv.bias": ("F64", [2], 16)}, HEADER),
            "client 3: conv.bias must be torch.float32 (2,), got torch.float64 (2,)",
        ),
        (craft({"a": ("F32", [0, 2**62, 2**62], 0)}, HEADER), "malformed message from client 3"),
        (craft({"a": ("F32", [0, 2**64 - 1], 0)}, HEADER), "malformed message from client 3"),
        (craft({"a": ("F8_E8M0", [4], 4)}, HEADER), "malformed message from client 3"),
        (craft({"a": ("F32", [3], 8)}, HEADER), "malformed message from client 3"),
        (craft({}, None, {"__metadata__": {"fedpdm": "[1]"}}), "malformed message from client 3"),
        (craft({}, None, {"__metadata__": {"fedpdm": "{"}}), "malformed message from client 3"),
        (craft({}, None, {"__metadata__": "x"}), "malformed message from client 3"),
    ],
)
def test_malformed_updates_name_the_client(message: wire.Message, reason: str) -> None:
    with pytest.raises(WireError, match=re.escape(reason)) as caught:
        decode_update(message)
    assert "client 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_updates_must_be_finite(value: float) -> None:
    weights = {**update().weights, "conv.bias": torch.tensor([0.0, value])}
    with pytest.raises(WireError, match=r"^update of client 3: conv\.bias has values that are"):
        decode_update(wire.encode_update(update(weights=weights)))


def test_malformed_releases_name_the_client() -> None:
    fine = wire.encode_release(released(), client_id=3)
    message = "release of client 3: header says client 3"
    with pytest.raises(WireError, match=f"^{message}$".replace("of client 3", "of client 4")):
        wire.decode_release(fine, who="client 4", client_id=4)
    assert len(wire.decode_release(fine, who="client 3", client_id=3)) == 3
    raw = {"x_tilde": ("F32", [1, 1, 2, 2], 16), "labels": ("I64", [1], 8)}
    record = {
        "kind": "release", "t0": "600", "clip_norm": "5.0", "shift": "-1.0", "schedule": "linear",
        "num_steps": "1000", "alpha_bar": "0.5", "noise_multiplier": "0.1", "noise_source": "x",
        "grid": "4096", "seeded": "false",
    }  # fmt: skip
    assert len(decode_release(craft(raw, record))) == 1
    for tensors, metadata, reason in (
        ({"x_tilde": raw["x_tilde"]}, record, "expected x_tilde and labels, got ['x_tilde']"),
        ({**raw, "x_0": raw["x_tilde"]}, record, "expected x_tilde and labels, got ['labels', 'x_"),
        (raw, {**record, "noise_multiplier": "9.0"}, "noise multiplier 9.0 does not follow"),
        (raw, {**record, "seeded": "true"}, "seeded is True, but the noise is 'x'"),
        (raw, {**record, "noise_source": SeededNoise.description}, "seeded is False, but the noi"),
        (raw, {k: v for k, v in record.items() if k != "seeded"}, "malformed: 'seeded'"),
        (raw, {k: v for k, v in record.items() if k != "grid"}, "malformed: 'grid'"),
        (raw, {"kind": "release"}, "release record is incomplete or malformed: 't0'"),
        ({**raw, "labels": ("F32", [1], 4)}, record, "expected float32 (N, C, H, W) and int64"),
        ({**raw, "labels": ("I64", [1, 1], 8)}, record, "expected float32 (N, C, H, W)"),
        ({**raw, "x_tilde": ("F64", [1, 1, 1, 2], 16)}, record, "expected float32 (N, C, H, W)"),
    ):
        with pytest.raises(WireError, match=re.escape(reason)) as caught:
            decode_release(craft(tensors, metadata))
        assert str(caught.value).startswith("release of client 3: ")
