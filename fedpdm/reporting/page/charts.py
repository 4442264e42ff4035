"""Line charts as inline SVG in the page's own colours, each with its numbers as a table.

A line is told apart by colour, dashes and mark, so that colour alone is never needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["STYLES", "Chart", "Series", "line_chart"]

STYLES = 8  # colours in the style sheet
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 44
_TICKS = 5
_MOST_MARKS = 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: (x, y) points, finite, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart; `legend` is (name, drawn sample of the line), `rows` the numbers by x."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, Markup]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Chart | None:
    """A chart of what is there; None if no series has a finite point."""
    kept = []
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
        if points:
            kept.append(Series(name=one.name, points=points))
    if not kept:
        return None
    xs = [x for one in kept for x, _ in one.points]
    ys = [y for one in kept for _, y in one.points]
    x_ticks = _ticks(min(xs), max(xs), whole=True)
    y_ticks = _ticks(min(ys), max(ys))
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    y_range = (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    parts = [_axes(x_ticks, y_ticks, x_range, y_range, x_label, y_label)]
    legend = []
    for index, one in enumerate(kept):
        places = [(_x(x, x_range), _y(y, y_range)) for x, y in one.points]
        parts.append(_line(places, index))
        legend.append((one.name, _sample(index)))
    names = ", ".join(one.name for one in kept)
    svg = Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>'
    ).format(
        _WIDTH,
        _HEIGHT,
        f"{title}: {y_label} by {x_label}. Lines: {names}. The numbers are in the table below.",
        Markup("").join(parts),
    )
    return Chart(
        title=title,
        svg=svg,
        legend=legend,
        columns=[x_label, *[one.name for one in kept]],
        rows=_rows(kept),
    )


def _rows(series: Sequence[Series]) -> list[list[str]]:
    by_name: list[Mapping[float, float]] = [dict(one.points) for one in series]
    xs = sorted({x for one in series for x, _ in one.points})
    return [[f"{x:g}", *[f"{one[x]:.5g}" if x in one else "-" for one in by_name]] for x in xs]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round values from at most `low` to at least `high`; whole numbers inside for rounds."""
    if whole:
        every = max(1, math.ceil((high - low) / _TICKS))
        return [float(x) for x in range(math.ceil(low), math.floor(high) + 1, every)] or [low]
    if low == high == 0.0:
        high = 1.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - max(0.5 * abs(low), 1e-3), high + max(0.5 * abs(high), 1e-3)
    rough = (high - low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1.0, 2.0, 5.0, 10.0) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, last + 1)]


def _x(x: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return _LEFT + 8 + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT - 16)


def _y(y: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
) -> Markup:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for y in y_ticks:
        at = _y(y, y_range)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, right, at, at, _LEFT - 6, at + 4, f"{y:.4g}")
        )
    for x in x_ticks:
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                _x(x, x_range), bottom + 17, f"{x:g}"
            )
        )
    parts.append(
        Markup(
            '<path class="axis" d="M{} {}V{}H{}"/>'
            '<text x="{}" y="{}" text-anchor="middle">{}</text>'
            '<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format(
            _LEFT, _TOP, bottom, right,
            (_LEFT + right) / 2, _HEIGHT - 8, x_label, (_TOP + bottom) / 2, y_label,
        )
    )  # fmt: skip
    return Markup("").join(parts)


def _line(places: Sequence[tuple[float, float]], index: int) -> Markup:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    marks = places if len(places) <= _MOST_MARKS else places[-1:]
    return Markup('<path class="line s{}" d="{}" stroke-dasharray="{}"/>{}').format(
        index % STYLES,
        path,
        _DASHES[index // 2 % len(_DASHES)],
        Markup("").join(_mark(x, y, index) for x, y in marks),
    )


def _mark(x: float, y: float, index: int) -> Markup:
    shapes = (
        f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
    )
    return Markup('<path class="mark s{}" d="{}"/>').format(
        index % STYLES, shapes[index % len(shapes)]
    )


def _sample(index: int) -> Markup:
    line = _line([(2.0, 7.0), (34.0, 7.0)], index)
    return Markup(
        '<svg class="sample" viewBox="0 0 36 14" width="36" height="14" aria-hidden="true">{}</svg>'
    ).format(line)
