"""Samples of all methods side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpdm.config import Suite
from fedpdm.reporting.pictures import draw_image_grid

__all__ = ["draw_method_samples"]

SHOWN = 20


def draw_method_samples(suite: Suite, profile: str, folder: Path, out: Path) -> int | None:
    """Draw the samples of the profile's first seed of every method that has some.

    Rows are the client's own images where results have them, of every method its majority and its
    minority classes, and real images of other clients at the end. Returns the seed, None where
    there are no samples.
    """
    seed = suite.profile(profile).first_seed
    images: list[np.ndarray] = []
    names: list[str] = []
    groups: list[str] = []
    real: dict[str, np.ndarray] = {}
    owned: dict[str, np.ndarray] = {}
    for method in suite.methods_of(profile):
        path = folder / f"{method}-seed{seed}.npz"
        if not path.exists():
            continue
        with np.load(path) as arrays:
            for group in ("majority", "minority"):
                if f"own_{group}" in arrays:
                    owned[group] = arrays[f"own_{group}"][:SHOWN]
                if group in arrays:
                    images.append(arrays[group][:SHOWN])
                    names.append(group)
                    groups.append(suite.method(method).title)
                    real[group] = arrays[f"real_{group}"][:SHOWN]
    if not images:
        return None
    for group in reversed(owned):
        images.insert(0, owned[group])
        names.insert(0, group)
        groups.insert(0, "its own images")
    for group, rows in real.items():
        images.append(rows)
        names.append(group)
        groups.append("real images")
    width = max(len(row) for row in images)
    images = [_padded(row, width) for row in images]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_image_grid(out, images, row_labels=names, row_groups=groups)
    return seed


def _padded(row: np.ndarray, width: int) -> np.ndarray:
    """Black images up to `width`."""
    missing = np.zeros((width - len(row), *row.shape[1:]), dtype=row.dtype)
    return np.concatenate([row, missing])
