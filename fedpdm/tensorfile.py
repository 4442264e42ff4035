"""Named tensors as bytes: safetensors, the same bytes for the same content.

safetensors writes a header's free entries in no fixed order, so all of ours go into one entry as
sorted JSON. Messages and files can then be compared by digest.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

__all__ = ["TensorFileError", "header", "pack", "read_file", "unpack", "write_file"]

ENTRY = "fedpdm"


class TensorFileError(ValueError):
    """Bytes that are not a tensor file of ours; one line."""


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors of any device, shape and dtype, and a flat mapping, as safetensors bytes."""
    data = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    entry = json.dumps(dict(metadata), sort_keys=True)
    return bytes(safetensors.torch.save(data, metadata={ENTRY: entry}))


def write_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """`pack` straight into a file, without a copy of the tensors in memory. `OSError`."""
    data = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(
            data, path, metadata={ENTRY: json.dumps(dict(metadata), sort_keys=True)}
        )
    except safetensors.SafetensorError as error:
        text = str(error)
        code = errno.ENOSPC if "os error 28" in text or "No space" in text else errno.EIO
        raise OSError(code, text) from None


def header(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the values, for a file whose values are written piece by piece.

    `layout` maps each name to its safetensors type (U8, F32) and shape; the values follow in that
    order, row by row, little-endian.
    """
    sizes = {"U8": 1, "F32": 4}
    table: dict[str, Any] = {
        "__metadata__": {ENTRY: json.dumps(dict(metadata), sort_keys=True)},
    }
    start = 0
    for name, (dtype, shape) in layout.items():
        end = start + sizes[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file of `write_file` or of `pack`ed bytes; tensors stay mapped to it until used.

    `TensorFileError` for anything else, `OSError` if it cannot be opened.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[ENTRY])
            if not isinstance(metadata, dict):
                raise TypeError("header entry is not a mapping")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TensorFileError(f"not a tensor file: {' '.join(str(error).split())[:200]}") from None
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def unpack(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Inverse of `pack`. `TensorFileError` for anything else."""
    try:
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        metadata = json.loads(header["__metadata__"][ENTRY])
        if not isinstance(metadata, dict):
            raise TypeError("header entry is not a mapping")
        tensors = safetensors.torch.load(payload)
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise TensorFileError(f"not a tensor file: {' '.join(str(error).split())[:200]}") from None
    return tensors, {str(key): str(value) for key, value in metadata.items()}
