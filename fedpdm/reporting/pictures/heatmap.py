"""Heat map of a partition: one blue ramp from light to dark, so that it reads without hue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.partition import ClientPartition
from fedpdm.reporting.pictures.files import DPI, INK, MUTED, png_path, save_figure
from fedpdm.reporting.pictures.lettering import text_width, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_partition"]

_OUTLINE: Final = "#d95f02"  # orange: stands out from light and dark blue in any colour vision
_FAINT: Final = "#a8a8a8"  # zeros


def draw_partition(
    path: str | os.PathLike[str],
    partitions: Sequence[ClientPartition],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
) -> None:
    """Heat map of clients (rows) x classes (columns) with numbers of images, as a PNG file.

    Majority cells are outlined, unless every class of every client is one. Totals stand at the
    right and below. The counts are raw-data statistics, not covered by the privacy guarantee.

    Args:
        path: a name that ends in .png; missing folders are made, an old file is replaced.
        partitions: of `labels`, at least 1.
        labels: (N,) integers in [0, K).
        class_names: K names.

    Raises:
        ValueError: if `path` is not a .png name, there is no partition or a label has no name.
    """
    target = png_path(path)
    num_classes = len(class_names)
    if not partitions:
        raise ValueError("partitions must hold at least 1 client, got 0")
    if labels.max(initial=0) >= num_classes or labels.min(initial=0) < 0:
        raise ValueError(
            f"labels must be in [0, {num_classes}), one name per class, "
            f"got {labels.min()} to {labels.max()}"
        )
    counts = np.array(
        [np.bincount(labels[part.indices], minlength=num_classes) for part in partitions]
    )
    is_majority = np.array(
        [[k in part.majority for k in range(num_classes)] for part in partitions]
    )
    names = [written(name) for name in class_names]
    save_figure(_partition_figure(partitions, counts, is_majority, names), target)


def _partition_figure(
    partitions: Sequence[ClientPartition],
    counts: NDArray[np.int64],
    is_majority: NDArray[np.bool_],
    class_names: list[str],
) -> Figure:
    """The heat map; `counts` and `is_majority` are (M, K)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    num_clients, num_classes = counts.shape
    font = 9.0 if num_clients <= 40 else 6.5
    digits = max(3, len(str(counts.sum(axis=0).max())))
    has_numbers = num_classes <= 40
    cell_width = max(0.5, 0.011 * font * (digits + 2)) if has_numbers else 0.16  # inches
    cell_height = font / 30
    widest = text_width(class_names, size=font, dpi=DPI) / DPI
    is_turned = widest > 0.9 * cell_width
    heading = 0.2 + (widest if is_turned else 0.1)
    left, right, bottom = 0.95, 0.85, 0.75
    width = max(left + cell_width * num_classes + right, 5.2)
    height = heading + cell_height * num_clients + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            cell_width * num_classes / width,
            cell_height * num_clients / height,
        )
    )
    highest = max(1, int(counts.max()))
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=highest * 1.15, aspect="auto")
    axes.set_xticks(
        range(num_classes), class_names, rotation=90 if is_turned else 0, parse_math=False
    )
    axes.set_yticks(range(num_clients), [f"client {part.client_id}" for part in partitions])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=font, labelcolor=INK)
    axes.set_xticks(np.arange(num_classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(num_clients - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)

    outlined = not is_majority.all()
    for m, k in np.ndindex(counts.shape):
        if has_numbers:
            ink = "white" if counts[m, k] > 0.6 * highest else INK if counts[m, k] else _FAINT
            axes.text(
                k, m, str(counts[m, k]), ha="center", va="center_baseline", color=ink, fontsize=font
            )
        if outlined and is_majority[m, k]:
            inset_x, inset_y = 0.025 / cell_width, 0.025 / cell_height
            axes.add_patch(
                Rectangle(
                    (k - 0.5 + inset_x, m - 0.5 + inset_y),
                    1 - 2 * inset_x,
                    1 - 2 * inset_y,
                    fill=False,
                    edgecolor=_OUTLINE,
                    linewidth=1.8 if has_numbers else 1.0,
                )
            )
    muted: dict[str, Any] = {"color": MUTED, "fontsize": font, "clip_on": False}
    edge = num_classes - 0.5 + 0.12 / cell_width
    for m, total in enumerate(counts.sum(axis=1)):
        axes.text(edge, m, f"= {total}", ha="left", va="center_baseline", **muted)
    below = num_clients - 0.5 + 0.16 / cell_height
    if has_numbers:
        for k, total in enumerate(counts.sum(axis=0)):
            axes.text(k, below, str(total), ha="center", va="center_baseline", **muted)
        axes.text(-0.5 - 0.06 / cell_width, below, "all", ha="right", va="center_baseline", **muted)
        axes.text(edge, below, f"= {counts.sum()}", ha="left", va="center_baseline", **muted)
    note = "images per client and class" + ("; outlined: majority class" if outlined else "")
    figure.text(0.1 / width, 0.14 / height, note, color=MUTED, fontsize=8.5, ha="left")
    return figure
