"""Measured points with intervals and theory curves, in up to four panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.reporting.pictures.files import DPI, INK, MUTED, save_png_and_pdf

__all__ = ["Panel", "Series", "draw_panels"]

Array = NDArray[np.float64]

# Blue, vermilion, green and purple of Okabe and Ito (2008), told apart in any colour vision, and
# by marker and line style without colour.
_STYLES: Final = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One colour: measured (N,) with low and high, and a theory curve (P,); either may be empty."""

    name: str
    x: Array
    y: Array
    low: Array
    high: Array
    curve_x: Array
    curve_y: Array


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel: titles, axes (`log_x`, `log_y`), and up to four series."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = True
    log_y: bool = False
    level: float | None = None
    """A horizontal line, named by `level_name`."""
    level_name: str = ""
    ticks: Sequence[float] = ()
    """Places of the x axis's ticks; default: matplotlib's."""


def draw_panels(stem: Path, panels: Sequence[Panel], *, title: str, note: str) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.pdf. Points are measured, lines are theory.

    Args:
        stem: path without suffix.
        panels: one to four, side by side or two by two.
        title: what is to be seen.
        note: one or two lines below: what the axes mean, for how many replicates.

    Raises:
        ValueError: no panel, or a panel with more than four series.
    """
    from matplotlib.figure import Figure

    if not 1 <= len(panels) <= 4:
        raise ValueError(f"panels must be 1 to 4, got {len(panels)}")
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(max(7.2, 5.0 * columns), 4.0 * rows + 0.9),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    for index, panel in enumerate(panels):
        if len(panel.series) > len(_STYLES):
            raise ValueError(f"a panel takes {len(_STYLES)} series, got {len(panel.series)}")
        axes = figure.add_subplot(rows, columns, index + 1)
        if panel.level is not None:
            axes.axhline(panel.level, color=MUTED, linewidth=1.0)
            axes.annotate(
                panel.level_name, (0.02, panel.level), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", color=MUTED, fontsize=8,
            )  # fmt: skip
        for each, (color, marker, line) in zip(panel.series, _STYLES, strict=False):
            if len(each.curve_x):
                axes.plot(each.curve_x, each.curve_y, color=color, linestyle=line, linewidth=1.5)
            if len(each.x):
                axes.errorbar(
                    each.x, each.y, yerr=np.stack([each.y - each.low, each.high - each.y]),
                    color=color, marker=marker, markersize=6, linestyle="", capsize=3,
                )  # fmt: skip
            axes.plot(
                [], [], color=color, label=each.name, linewidth=1.5,
                marker=marker if len(each.x) else "",
                linestyle=line if len(each.curve_x) else "",
            )  # fmt: skip
        axes.set_title(panel.title, color=INK, fontsize=10, loc="left")
        axes.set_xlabel(panel.x_label, color=INK)
        axes.set_ylabel(panel.y_label, color=INK)
        if panel.log_x:
            axes.set_xscale("log")
        if panel.ticks:
            axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axes.minorticks_off()
        if panel.log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
            if panel.level is not None:  # room for its name
                axes.set_ylim(top=max(1.08 * panel.level, axes.get_ylim()[1]))
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.series:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(note, color=MUTED, fontsize=8, x=0.01, ha="left")
    return save_png_and_pdf(figure, stem)
