"""Pictures of attacks: the worst memorised pairs, and reconstructions under their originals."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpdm.reporting.pictures.image_grid import draw_image_grid

__all__ = ["draw_memorised_pairs", "draw_reconstructions"]

Pixels = NDArray[np.uint8]


def draw_memorised_pairs(
    path: str | os.PathLike[str],
    generated: Pixels,
    nearest: Pixels,
    ratios: NDArray[np.float64],
    *,
    per_row: int = 10,
    title: str = "Generated images nearest to a training image",
    note: str | None = "above each pair its ratio; *: at most 1, flagged as memorised",
) -> None:
    """Generated images above their nearest training images, in the order given, as a PNG file.

    Above each pair stands its ratio, with a star where it is at most 1.

    Args:
        path: a name that ends in .png.
        generated, nearest: (n, C, H, W) uint8, the worst pair first.
        ratios: (n,), see `fedpdm.attacks.memorisation`.
        per_row: pairs side by side, at least 1.

    Raises:
        ValueError: for numbers of images and ratios that differ, and as `draw_image_grid`.
    """
    if not len(generated) == len(nearest) == len(ratios) or per_row < 1:
        raise ValueError(
            f"generated, nearest and ratios must be of one number and per_row at least 1, "
            f"got {len(generated)}, {len(nearest)}, {len(ratios)} and {per_row}"
        )
    rows, labels, groups = [], [], []
    for start in range(0, len(ratios), per_row):
        part = slice(start, start + per_row)
        rows += [generated[part], nearest[part]]
        labels += ["generated", "training"]
        last = min(start + per_row, len(ratios))
        groups += [f"{start + 1}-{last}" if last > start + 1 else f"{last}"] * 2
    captions = [f"{ratio:.2f}{'*' if ratio <= 1.0 else ''}" for ratio in ratios]
    draw_image_grid(
        path,
        rows,
        row_labels=labels,
        row_groups=groups,
        image_labels=[
            captions[row // 2 * per_row :][: len(images)] if row % 2 == 0 else []
            for row, images in enumerate(rows)
        ],
        title=title,
        note=note,
    )


def draw_reconstructions(
    path: str | os.PathLike[str],
    rows: Mapping[str, Pixels],
    *,
    title: str = "Reconstructions from uploads",
    note: str | None = None,
) -> None:
    """One row per entry (original, upload, a model's answer), one column per image, as PNG.

    Args:
        path: a name that ends in .png.
        rows: label -> (n, C, H, W) uint8, equally many in each, the same image in one column.

    Raises:
        ValueError: for rows of different lengths, and as `draw_image_grid`.
    """
    lengths = {label: len(images) for label, images in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"rows must hold equally many images, got {lengths}")
    draw_image_grid(path, list(rows.values()), row_labels=list(rows), title=title, note=note)
