"""Samples of all methods side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpdm.config import Suite
from fedpdm.reporting.pictures import draw_image_grid

__all__ = ["draw_method_samples"]

SHOWN = 20


def draw_method_samples(suite: Suite, folder: Path, out: Path) -> bool:
    """Draw the samples of seed 0 of every method that has some; returns whether there were any.

    A row of majority and one of minority classes per method, and real images at the end.
    """
    images: list[np.ndarray] = []
    names: list[str] = []
    groups: list[str] = []
    real: dict[str, np.ndarray] = {}
    for method in suite.table:
        path = folder / f"{method}-seed0.npz"
        if not path.exists():
            continue
        with np.load(path) as arrays:
            for group in ("majority", "minority"):
                if group in arrays:
                    images.append(arrays[group][:SHOWN])
                    names.append(group)
                    groups.append(suite.method(method).title)
                    real[group] = arrays[f"real_{group}"][:SHOWN]
    if not images:
        return False
    for group, rows in real.items():
        images.append(rows)
        names.append(group)
        groups.append("real images")
    width = max(len(row) for row in images)
    images = [_padded(row, width) for row in images]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_image_grid(out, images, row_labels=names, row_groups=groups)
    return True


def _padded(row: np.ndarray, width: int) -> np.ndarray:
    """Black images up to `width`."""
    missing = np.zeros((width - len(row), *row.shape[1:]), dtype=row.dtype)
    return np.concatenate([row, missing])
