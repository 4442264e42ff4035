"""Fewer bits per number in a message: bfloat16, or int8 with one scale per row.

What is sent has been released already, so rounding it is post-processing and costs no privacy.
Stochastic rounding is unbiased: what many updates lose on average is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedpdm.config.names import ENCODINGS

__all__ = ["dequantize", "quantize"]

SCALE = "#scale"


def quantize(
    tensors: Mapping[str, torch.Tensor],
    *,
    encoding: str,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Float32 tensors (of any shape) in an encoding of `ENCODINGS`.

    int8: a tensor of two or more dimensions has one float32 scale per row of the first, any other
    a single one, under the name and "#scale": the largest magnitude over 127. Rounding is to
    nearest; with a `generator` it is stochastic. Values must be finite.
    """
    if encoding == "float32":
        return dict(tensors)
    if encoding == "bfloat16":
        return {name: _to_bfloat16(tensor.float(), generator) for name, tensor in tensors.items()}
    if encoding != "int8":
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    encoded = {}
    for name, tensor in tensors.items():
        rows = _rows(tensor.float())
        largest = (
            rows.abs().amax(dim=1, keepdim=True) if rows.numel() else rows.new_zeros(len(rows), 1)
        )
        scale = (largest / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = rows / scale
        if generator is not None:
            scaled = scaled.add_(torch.rand(scaled.shape, generator=generator)).floor_()
        encoded[name] = scaled.round().clamp_(-127, 127).to(torch.int8).view(tensor.shape)
        encoded[name + SCALE] = scale.flatten()
    return encoded


def dequantize(tensors: Mapping[str, torch.Tensor], *, encoding: str) -> dict[str, torch.Tensor]:
    """Inverse of `quantize` up to rounding: float32 tensors of the same shapes.

    `ValueError` naming a tensor that the encoding does not have.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if encoding == "float32":
        return dict(tensors)
    decoded = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) and encoding == "int8":
            if name.removesuffix(SCALE) not in tensors:
                raise ValueError(f"{name} is the scale of nothing")
            continue
        if tensor.dtype != getattr(torch, encoding):
            raise ValueError(f"{name} must be {encoding}, got {tensor.dtype}")
        if encoding == "bfloat16":
            decoded[name] = tensor.float()
            continue
        rows, scale = _rows(tensor.float()), tensors.get(name + SCALE)
        if scale is None or scale.dtype != torch.float32 or scale.shape != (len(rows),):
            raise ValueError(f"{name} must have {len(rows)} float32 scales")
        decoded[name] = (rows * scale.unsqueeze(1)).view(tensor.shape)
    return decoded


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _to_bfloat16(tensor: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Stochastic: add up to one unit in the last place kept, below it, and cut (the sign apart)."""
    if generator is None:
        return tensor.to(torch.bfloat16)
    bits = tensor.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, tensor.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
