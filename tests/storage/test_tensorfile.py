"""Tensor files: our writer and reader against the safetensors library's, and damaged headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fedpdm.storage.tensorfile import TensorFileError, pack, read_file, unpack, write_file
from tests.support.cases import every

TENSORS = {
    "z.bytes": torch.arange(7, dtype=torch.uint8),
    "step": torch.tensor(3),
    "weight": torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "turned": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
    "none": torch.zeros(0, 4),
    "wide": torch.tensor([1e300, -0.0], dtype=torch.float64),
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    assert same(safetensors.torch.load(pack(TENSORS, {"a": "b"})), TENSORS)
    write_file(tmp_path / "file", TENSORS, {"a": "b"})
    assert (tmp_path / "file").read_bytes() == pack(TENSORS, {"a": "b"})
    assert same(safetensors.torch.load_file(tmp_path / "file"), TENSORS)


@pytest.mark.parametrize("note", ["", "x", "xx", "xxx", "xxxxxxx"])  # moves the values' start
def test_we_read_what_the_library_writes(tmp_path: Path, note: str) -> None:
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    data = safetensors.torch.save(plain, metadata={"fedpdm": json.dumps({"note": note})})
    (tmp_path / "file").write_bytes(data)
    for tensors, metadata in (unpack(data), read_file(tmp_path / "file")):
        assert same(tensors, TENSORS)
        assert metadata == {"note": note}


def test_a_message_and_a_file_are_read_without_changing_them(tmp_path: Path) -> None:
    data = pack(TENSORS, {})
    write_file(tmp_path / "file", TENSORS, {})
    for tensors in (unpack(data)[0], read_file(tmp_path / "file")[0]):
        tensors["weight"].zero_()
    assert data == (tmp_path / "file").read_bytes() == pack(TENSORS, {})


def test_values_without_a_place_in_the_format_are_refused() -> None:
    with pytest.raises(TensorFileError, match=r"odd: a tensor of .*complex64 cannot"):
        pack({"odd": torch.zeros(2, dtype=torch.complex64)}, {})


def _edited(edit: Callable[[dict[str, Any]], Any], extra: bytes = b"") -> bytes:
    """Two tensors of 8 and 12 bytes with an edited header."""
    data = pack({"a": torch.zeros(2), "b": torch.ones(3)}, {})
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    edit(table)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data[start:] + extra


@every(
    "damaged",
    [
        _edited(lambda table: table["b"].update(data_offsets=[4, 16])),  # overlaps a
        _edited(lambda table: table["b"].update(data_offsets=[12, 24]), bytes(4)),  # leaves a hole
        _edited(lambda table: table["b"].update(shape=[4])),
        _edited(lambda table: table["b"].update(shape=[-3])),
        _edited(lambda table: table["b"].update(shape=[2, 2], data_offsets=[8, 24])),  # too long
        _edited(lambda table: table["b"].update(shape="3")),
        _edited(lambda table: table["b"].update(dtype="F8")),
        _edited(lambda table: table.pop("b")),
        _edited(lambda table: table.pop("__metadata__")),
        _edited(lambda table: None, bytes(1)),
        _edited(lambda table: None)[:-1],
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"",
        b"\0" * 8,
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "file").write_bytes(damaged)
    with pytest.raises(TensorFileError, match="not a tensor file"):
        unpack(damaged)
    with pytest.raises(TensorFileError, match="not a tensor file"):
        read_file(tmp_path / "file")


def test_the_edit_of_nothing_is_read() -> None:
    assert np.array_equal(unpack(_edited(lambda table: None))[0]["b"], np.ones(3))
