"""Scatter plots of 2-D samples over the ellipses of the true component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.reporting.pictures.files import DPI, INK, MUTED, save_png_and_pdf

__all__ = ["draw_scatter"]

Array = NDArray[np.float64]
POINTS: Final = "#0072b2"
TRUTH: Final = "#000000"
OWN: Final = "#d55e00"


def draw_scatter(
    stem: Path,
    rows: Mapping[str, Mapping[str, Array]],
    *,
    mean: Array,
    deviations: Array,
    own: Sequence[tuple[int, int]],
    own_points: Array,
    title: str,
    note: str,
) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.pdf: a grid of panels on common axes.

    Args:
        rows: row title -> panel title -> samples (N, 2); equally many panels in each row.
        mean, deviations: of the true component, (2,); its 1- and 2-sigma ellipses are drawn.
        own: (row, column) of panels that show the client's `own_points` (n, 2) too.
        title, note: above and below.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    columns = max(len(panels) for panels in rows.values())
    figure = Figure(
        figsize=(2.9 * columns, 3.1 * len(rows) + 0.9),
        dpi=DPI, facecolor="white", layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    reach = 4.2 * deviations
    for i, (row, panels) in enumerate(rows.items()):
        for j, (name, points) in enumerate(panels.items()):
            axes = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            axes.scatter(
                points[:, 0], points[:, 1], s=5, alpha=0.35, color=POINTS, linewidths=0,
                rasterized=True,
            )  # fmt: skip
            if (i, j) in own:
                axes.scatter(
                    own_points[:, 0], own_points[:, 1], s=34, marker="x", color=OWN, linewidths=1.6
                )
            for scale in (1.0, 2.0):
                axes.add_patch(
                    Ellipse(
                        (float(mean[0]), float(mean[1])),
                        2 * scale * float(deviations[0]), 2 * scale * float(deviations[1]),
                        fill=False, edgecolor=TRUTH, linewidth=1.1, linestyle="--",
                    )
                )  # fmt: skip
            centre = points.mean(axis=0)
            axes.plot(*mean, marker="+", color=TRUTH, markersize=11, markeredgewidth=1.4)
            axes.plot(*centre, marker="o", color="white", markeredgecolor=TRUTH, markersize=6)
            axes.set(
                xlim=(mean[0] - reach.max(), mean[0] + reach.max()),
                ylim=(mean[1] - reach.max(), mean[1] + reach.max()),
                aspect="equal", xticks=[], yticks=[],
            )  # fmt: skip
            axes.set_title(name, color=INK, fontsize=9)
            if j == 0:
                axes.set_ylabel(row, color=INK, fontsize=9)
    figure.supxlabel(note, color=MUTED, fontsize=8, x=0.01, ha="left")
    return save_png_and_pdf(figure, stem)
