"""Named tensors as bytes: safetensors, the same bytes for the same content.

safetensors writes a header's free entries in no fixed order, so all of ours go into one entry as
sorted JSON. Messages and files can then be compared by digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

__all__ = ["TensorFileError", "pack", "unpack"]

ENTRY = "fedpdm"


class TensorFileError(ValueError):
    """Bytes that are not a tensor file of ours; one line."""


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors of any device, shape and dtype, and a flat mapping, as safetensors bytes."""
    data = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    entry = json.dumps(dict(metadata), sort_keys=True)
    return bytes(safetensors.torch.save(data, metadata={ENTRY: entry}))


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
