"""Named weights: taken from a training state, and loaded with every name and shape checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["ema_weights", "load_named"]


def ema_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The EMA weights, by their own names, in a trainer's state or a server's checkpoint."""
    return {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}


def load_named(
    target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], *, what: str
) -> None:
    """Copy `source` into `target` by name, in place; names, shapes and dtypes must all agree.

    `ValueError` naming what is missing, unexpected, mis-shaped or of another dtype.
    """
    missing, unexpected = target.keys() - source.keys(), source.keys() - target.keys()
    if missing or unexpected:
        raise ValueError(
            f"{what}: names do not match; missing {sorted(missing)[:3]}, "
            f"unexpected {sorted(unexpected)[:3]}"
        )
    for name, tensor in target.items():
        value = source[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"{what}: {name} must be {tensor.dtype} {tuple(tensor.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    if target:
        with torch.no_grad():
            torch._foreach_copy_(list(target.values()), [source[name] for name in target])
