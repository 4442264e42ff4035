"""Decoders under random input: a `WireError` that names the client, or a well-formed message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedpdm.privacy.types import ReleasedDataset
from fedpdm.wire import WireError
from fedpdm.wire.types import CoarseUpdate
from tests.wire.test_wire import LIKE, MESSAGES


@pytest.mark.parametrize("kind", MESSAGES)
def test_no_bytes_break_the_decoders(kind: str) -> None:
    """Noise, every truncation, and flipped bits: a `WireError` or a well-formed message."""
    message, decode = MESSAGES[kind]
    payload = message[0].tobytes()
    rng = np.random.default_rng(0)
    attempts = [rng.bytes(int(n)) for n in rng.integers(0, 200, size=300)]
    attempts += [payload[:size] for size in range(len(payload))]
    attempts += [
        payload + b"\0",
        payload * 2,
        payload[8:],
        (9000).to_bytes(8, "little") + b"[" * 9000,
    ]
    header = 8 + int.from_bytes(payload[:8], "little")
    assert len(payload) > header
    must_fail = len(attempts)
    for position in range(len(payload)):
        flipped = bytearray(payload)
        flipped[position] ^= 1 << int(rng.integers(8))
        attempts.append(bytes(flipped))
    complaints: list[str] = []
    for number, attempt in enumerate(attempts):
        try:
            got = decode([np.frombuffer(attempt, dtype=np.uint8)])
        except WireError as error:
            complaints.append(str(error))
            continue
        assert number >= must_fail
        assert isinstance(got, (CoarseUpdate, ReleasedDataset, dict))
        if isinstance(got, CoarseUpdate):
            assert got.weights.keys() == LIKE.keys()
    assert len(complaints) > must_fail + header / 3
    assert all("client 3" in line and "\n" not in line for line in complaints)


STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**30, "", "x", "F32", "F16", "I64", "F4", "BOOL",
    [], [0], [2], [-1], [2**62, 4], [0, 2**63], [None], [[1]], {}, {"a": 1}, "\ud800", "NaN", "0",
]  # fmt: skip


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """The JSON value with one part of it, at any depth, exchanged, doubled or left out."""
    choice = rng.random()
    if isinstance(value, dict) and value and choice < 0.9:
        key = list(value)[int(rng.integers(len(value)))]
        if choice < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if choice < 0.2:
            return {**value, str(STRANGE[int(rng.integers(len(STRANGE)))]): value[key]}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and choice < 0.8:
        index = int(rng.integers(len(value)))
        return [mutated(v, rng) if i == index else v for i, v in enumerate(value)]
    return STRANGE[int(rng.integers(len(STRANGE)))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESSAGES)
def test_no_header_breaks_the_decoders(kind: str) -> None:
    """Well-formed JSON with strange content, in the tensor table and in our own entry."""
    message, decode = MESSAGES[kind]
    payload = message[0].tobytes()
    length = int.from_bytes(payload[:8], "little")
    header, data = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    rng = np.random.default_rng(1)
    complaints: list[str] = []
    for number in range(3000):
        changed = json.loads(json.dumps(header))
        if number % 2:
            entry = mutated(json.loads(header["__metadata__"]["fedpdm"]), rng)
            changed["__metadata__"]["fedpdm"] = json.dumps(entry)
        else:
            changed = mutated(changed, rng)
        text = json.dumps(changed).encode()
        attempt = len(text).to_bytes(8, "little") + text + data
        try:
            decode([np.frombuffer(attempt, dtype=np.uint8)])
        except WireError as error:
            complaints.append(str(error))
    assert len(complaints) > 1000
    assert all("client 3" in line and "\n" not in line for line in complaints)
