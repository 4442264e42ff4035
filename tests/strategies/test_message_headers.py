"""Array headers of strangers: whatever they hold, the answer is an array or a `WireError`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.common import Parameters

from fedpdm import wire
from strategies.answers import decode_arrays, encode_arrays

CASES = 20_000


def message(tensor: bytes) -> Parameters:
    return Parameters(tensors=[tensor], tensor_type="numpy.ndarray")


def framed(header: bytes, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "bool", "int64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 1, 5)])
def test_what_is_encoded_is_decoded_and_numpy_reads_it_too(
    dtype: str, shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    encoded = encode_arrays([array])
    (decoded,) = decode_arrays(encoded)
    assert decoded.dtype == array.dtype
    assert np.array_equal(decoded, array)
    assert np.array_equal(np.load(io.BytesIO(encoded.tensors[0])), array)


HOSTILE = {
    "unclosed": b"(\n",
    "indented": b"  x\n y\n",
    "deep": b"(" * 60_000,
    "huge integer": b"{'descr': '|u1', 'fortran_order': False, 'shape': ("
    + b"9" * 5000
    + b",), }\n",
    "object": b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
    "call": b"{'descr': __import__('os').sep, 'fortran_order': False, 'shape': (1,), }\n",
    "fortran": b"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1), }\n",
    "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }\n",
    "no newline": b"{'descr': '|u1', 'fortran_order': False, 'shape': (0,), }",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(wire.WireError, match="message is not an array") as caught:
        decode_arrays(message(framed(HOSTILE[name], bytes(4))))
    assert "\n" not in str(caught.value)


def test_more_values_than_the_header_says_are_refused_and_nothing_is_allocated() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999999999,), }\n"
    with pytest.raises(wire.WireError, match="8 bytes of values, its header says 7999"):
        decode_arrays(message(framed(header, bytes(8))))


@pytest.mark.slow
def test_fuzzed_headers_end_as_an_array_that_numpy_reads_alike_or_as_a_wire_error() -> None:
    """Random bytes of a sound message are changed, cut or inserted; any other error fails here."""
    rng = np.random.default_rng(5)
    sound = encode_arrays([np.arange(12, dtype=np.float32).reshape(3, 4)]).tensors[0]
    accepted = 0
    for _ in range(CASES):
        damaged = bytearray(sound)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(0, 80))
            match int(rng.integers(0, 3)):
                case 0:
                    damaged[at] = int(rng.integers(0, 256))
                case 1:
                    del damaged[at]
                case 2:
                    damaged.insert(at, rng.choice(list(b"()[]{}',: \n0123456789uf|<O")))
        try:
            (decoded,) = decode_arrays(message(bytes(damaged)))
        except wire.WireError:
            continue
        accepted += 1
        assert np.array_equal(np.load(io.BytesIO(damaged)), decoded, equal_nan=True)
    assert 0 < accepted < CASES / 2
