"""Line charts by matplotlib, as inline SVG in the page's own colours, each with its numbers.

A line is told apart by colour, dashes and mark, so that colour alone is never needed.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

from markupsafe import Markup

from fedpdm.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Chart", "Series", "line_chart"]

_SIZE: Final = 440, 260  # of a chart, in pixels
_SAMPLE: Final = 36, 14  # of a line in a legend
_MARGINS: Final = {"left": 62, "right": 12, "top": 12, "bottom": 44}
_TICKS: Final = 6  # intervals, at most
_DECIMALS: Final = 7  # at most, of a tick
_NAME, _DIGIT = 30, 9  # pixels: for the name of the y axis, and of a digit beside a tick
_MOST_MARKS: Final = 40
# The page's colours for light and dark, under stand-ins that matplotlib draws with.
_GRID, _SOFT = "#100001", "#100002"
_LINES: Final = tuple(f"#20000{index}" for index in range(8))
_COLOURS: Final = {_GRID: "grid", _SOFT: "soft"} | {c: f"s{k}" for k, c in enumerate(_LINES)}
_DASHES: Final = ("-", (0, (3.5, 2)), (0, (1, 1.5)), (0, (4.5, 1.5, 1, 1.5)))  # in line widths
_MARKS: Final = ("o", "s", "^", "D")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: (x, y) points, finite, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart; `legend` is (name, drawn sample of the line), `rows` the numbers by x.

    `note` is a line under the title, or empty.
    """

    title: str
    note: str
    svg: Markup
    legend: Sequence[tuple[str, Markup]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, note: str = ""
) -> Chart | None:
    """A chart of what is there; None if no series has a finite point."""
    kept = []
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
        if points:
            kept.append(Series(name=one.name, points=points))
    if not kept:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = _SIZE
    left, bottom = _MARGINS["left"], _MARGINS["bottom"]
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            1 - (left + _MARGINS["right"]) / width,
            1 - (bottom + _MARGINS["top"]) / height,
        )
    )
    for index, one in enumerate(kept):
        _draw_line(axes, one.points, index)
    axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(_TICKS, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: _told_apart(y, axes.get_ylim()))
    axes.grid(axis="y", color=_GRID, linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(left=False, bottom=False, labelsize=13)
    axes.set_xlabel(x_label, fontsize=13)
    axes.set_ylabel(y_label, fontsize=13)
    _make_room(axes, width)
    axes.yaxis.set_label_coords(13 / width, (bottom + height - 12) / 2 / height, figure.transFigure)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    names = ", ".join(one.name for one in kept)
    words = f"{title}: {y_label} by {x_label}. Lines: {names}. The numbers are in the table below."
    head = Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">')
    return Chart(
        title=title,
        note=note,
        svg=head.format(width, height, visible(words)) + _drawn(figure) + Markup("</svg>"),
        legend=[(one.name, _sample(index)) for index, one in enumerate(kept)],
        columns=[x_label, *[one.name for one in kept]],
        rows=_rows(kept),
    )


def _make_room(axes: Axes, width: int) -> None:
    """Move the left side so that ticks' labels do not reach the name of the axis.

    The page's own font draws them: a digit is taken to be `_DIGIT` wide.
    """
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    longest = max((len(axes.yaxis.get_major_formatter()(tick)) for tick in ticks), default=0)
    left = max(_MARGINS["left"], _NAME + longest * _DIGIT)
    box = axes.get_position()
    axes.set_position((left / width, box.y0, 1 - (left + _MARGINS["right"]) / width, box.height))


def _told_apart(y: float, limits: tuple[float, float]) -> str:
    """A tick with as many decimals as tell it from the next one."""
    step = abs(limits[1] - limits[0]) / _TICKS
    decimals = max(0, 1 - math.floor(math.log10(step))) if step > 0 else 0
    text = f"{y:,.{decimals}f}" if decimals <= _DECIMALS else f"{y:.4g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _rows(series: Sequence[Series]) -> list[list[str]]:
    by_name: list[Mapping[float, float]] = [dict(one.points) for one in series]
    xs = sorted({x for one in series for x, _ in one.points})
    return [[f"{x:g}", *[f"{one[x]:.5g}" if x in one else "-" for one in by_name]] for x in xs]


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], index: int) -> None:
    """One line in the style of its number; marks on the last point alone if there are many."""
    colour = _LINES[index % len(_LINES)]
    (line,) = axes.plot(
        *zip(*points, strict=True),
        color=colour,
        linewidth=2,
        linestyle=_DASHES[index // 2 % len(_DASHES)],
        marker=_MARKS[index % len(_MARKS)],
        markersize=6,
        markeredgewidth=1,
        markevery=1 if len(points) <= _MOST_MARKS else [len(points) - 1],
        clip_on=False,
    )
    line.set_gid(f"line s{index % len(_LINES)}")


@functools.cache
def _sample(index: int) -> Markup:
    """A legend's picture of a line."""
    from matplotlib.figure import Figure

    width, height = _SAMPLE
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    _draw_line(axes, [(5.0, 7.0), (31.0, 7.0)], index)
    head = Markup(
        '<svg class="sample" viewBox="0 0 {0} {1}" width="{0}" height="{1}" aria-hidden="true">'
    )
    return head.format(width, height) + _drawn(figure) + Markup("</svg>")


def _drawn(figure: Figure) -> Markup:
    """What is in matplotlib's <svg>, fit for a page: in its colours and font, without ids.

    Equal ids of two charts would be one, so marks stand where they are used. A group that was
    given a name has it as its class.
    """
    import matplotlib

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.BytesIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fedpdm", "path.simplify": False}
    ):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    marks = {path.get("id"): path for path in root.iterfind(".//defs/path")}
    parts = [part for child in root if (part := _cleaned(child, marks)) is not None]
    text = "".join(ElementTree.tostring(part, encoding="unicode") for part in parts)
    for stand_in, name in _COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return Markup(text)  # of numbers and this module's words alone


def _cleaned(
    element: ElementTree.Element, marks: Mapping[str | None, ElementTree.Element]
) -> ElementTree.Element | None:
    """An element for the page with what is in it; None for what is not drawn."""
    if element.tag in ("metadata", "defs"):
        return None
    kept = ElementTree.Element(element.tag)
    style = element.get("style", "")
    if element.tag == "use":
        mark = marks[element.get("{http://www.w3.org/1999/xlink}href", "")[1:]]
        kept.tag, style = "path", f"{style}; {mark.get('style', '')}"
        kept.set("class", "mark")
        kept.set("d", " ".join(mark.get("d", "").split()))
        kept.set("transform", f"translate({element.get('x')} {element.get('y')})")
    for name in ("x", "y", "d", "transform"):
        if (value := element.get(name)) is not None and element.tag != "use":
            kept.set(name, " ".join(value.split()))
    if " " in (given := element.get("id", "")):
        kept.set("class", given)
    if element.tag == "text":  # size, family and colour are the style sheet's
        style = "; ".join(re.findall(r"text-anchor: \w+", style))
        kept.text = element.text
    if style:
        kept.set("style", style)
    inside = [part for child in element if (part := _cleaned(child, marks)) is not None]
    kept.extend(inside)
    return kept if inside or element.tag != "g" else None
