"""What runs came to, over the values of the key in which they differ."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedpdm.reporting.pictures.files import DPI, INK, MUTED, png_path, save_figure

__all__ = ["Panel", "draw_sweep"]

# Dark2 of ColorBrewer, told apart in any colour vision, and by marks without colour.
_COLOURS: Final = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#444444")
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
_SPREAD: Final = 8.0  # of the largest value to the smallest, from which the axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: by name a value for each run, None where it was not measured."""

    title: str
    label: str
    lines: Mapping[str, Sequence[float | None]]


def draw_sweep(
    path: str | os.PathLike[str], values: Sequence[str], panels: Sequence[Panel], *, key: str
) -> None:
    """Panels over each other as a PNG file.

    `values` are the key's, as text: where all are numbers they are the axis, else they stand
    beside each other in their order. `ValueError` for another suffix.
    """
    from matplotlib.figure import Figure

    target = png_path(path)
    numbers = _numbers(values)
    places = numbers or [float(at) for at in range(len(values))]
    height = 3.2 * max(1, len(panels)) + 0.3
    figure = Figure(figsize=(6.4, height), dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.subplots(max(1, len(panels)), 1, squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=False):
        for index, (name, line) in enumerate(panel.lines.items()):
            points = sorted(
                (x, y)
                for x, y in zip(places, line, strict=True)
                if y is not None and math.isfinite(y)
            )
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=name, linewidth=1.6,
                color=_COLOURS[index % len(_COLOURS)], marker=_MARKS[index % len(_MARKS)],
            )  # fmt: skip
        axes.set_title(panel.title, color=INK, fontsize=11, loc="left")
        axes.set_ylabel(panel.label, color=INK)
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[:, 0]:
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= _SPREAD:
            axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(places, values)
        axes.set_xlabel(key, color=INK)
        axes.tick_params(colors=MUTED)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, target)


def _numbers(values: Sequence[str]) -> list[float]:
    """The values as numbers; empty if one is none."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []
