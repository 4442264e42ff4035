"""ROC curves on logarithmic axes, where the few certain guesses can be seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.reporting.pictures.files import DPI, INK, MUTED, png_path, save_figure

__all__ = ["draw_roc"]

# Blue, orange and green of ColorBrewer's Dark2 and Blues, then others of Dark2: told apart in any
# colour vision, and by their line styles without colour.
_STYLES: Final = (
    {"color": "#2171b5", "linestyle": "-", "linewidth": 2.2},
    {"color": "#d95f02", "linestyle": "--", "linewidth": 1.8},
    {"color": "#1b9e77", "linestyle": "-.", "linewidth": 1.8},
    {"color": "#7570b3", "linestyle": ":", "linewidth": 1.8},
    {"color": "#e7298a", "linestyle": (0, (5, 1)), "linewidth": 1.6},
    {"color": "#66a61e", "linestyle": (0, (3, 1, 1, 1)), "linewidth": 1.6},
    {"color": "#a6761d", "linestyle": (0, (1, 1)), "linewidth": 1.6},
    {"color": "#444444", "linestyle": "-", "linewidth": 1.2},
)

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def draw_roc(
    path: str | os.PathLike[str], curves: Mapping[str, Curve], *, title: str, smallest: float
) -> None:
    """Up to eight curves of true- against false-positive rate, as a PNG file.

    Args:
        path: a name that ends in .png.
        curves: name -> (fpr, tpr), each ascending; chance is drawn beside them.
        title: above the picture.
        smallest: rate at which both axes begin, in (0, 1).

    Raises:
        ValueError: another suffix, no curve or more than eight, `smallest` out of range.
    """
    from matplotlib.figure import Figure

    target = png_path(path)
    if not 1 <= len(curves) <= len(_STYLES):
        raise ValueError(f"curves must be 1 to {len(_STYLES)}, got {len(curves)}")
    if not 0.0 < smallest < 1.0:
        raise ValueError(f"smallest must be in (0, 1), got {smallest}")
    figure = Figure(figsize=(6.4, 6.0), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.plot([smallest, 1.0], [smallest, 1.0], color=MUTED, linewidth=1.0, linestyle=":")
    axes.annotate(
        "chance", (smallest * 3.0, smallest * 2.2), color=MUTED, fontsize=9, rotation=45,
        rotation_mode="anchor",
    )  # fmt: skip
    for (name, (fpr, tpr)), style in zip(curves.items(), _STYLES, strict=False):
        shown = (fpr > 0) & (tpr > 0)
        axes.plot(fpr[shown], tpr[shown], label=name, **style)  # type: ignore[arg-type]
    axes.set(xscale="log", yscale="log", xlim=(smallest, 1.0), ylim=(smallest, 1.15))
    axes.set_xlabel("false-positive rate", color=INK)
    axes.set_ylabel("true-positive rate", color=INK)
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, target)
