"""Grid of small images, enlarged without smoothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.reporting.pictures.files import DPI, INK, MUTED, png_path, save_figure
from fedpdm.reporting.pictures.lettering import text_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_image_grid"]

# Lengths in pixels.
_MIN_IMAGE: Final = 48
_MARGIN: Final = 12
_GAP: Final = 3
_GROUP_GAP: Final = 14
_LABEL_GAP: Final = 8
_CAPTION: Final = 15

_MISSING_LEVEL: Final = 238  # light grey where a row has no image


def draw_image_grid(
    path: str | os.PathLike[str],
    rows: Sequence[NDArray[np.uint8]],
    *,
    row_labels: Sequence[str],
    row_groups: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    image_labels: Sequence[Sequence[str]] | None = None,
    scale: int | None = None,
    title: str | None = None,
    note: str | None = None,
) -> None:
    """Rows of small images with labels at the left, as a PNG file; every pixel stays a square.

    Args:
        path: a name that ends in .png; missing folders are made, an old file is replaced.
        rows: arrays (n, C, H, W) uint8, C 1 or 3, of one H and W; shorter rows are filled up
            with light grey.
        row_labels: one per row.
        row_groups: one per row: a second level of labels further left. Neighbouring rows of
            one group share it, and groups stand apart.
        column_labels: one per column, above; turned where they are too wide.
        image_labels: per row, one per image or none: small, above the row's images.
        scale: pixels per image pixel, >= 1. Default: the least for at least 48 per image.
        title: one line at the top; note: a smaller line below it.

    Raises:
        ValueError: if numbers of labels, or types or sizes of images do not fit.
    """
    target = png_path(path)
    height, width, num_columns = _check_grid(rows, row_labels, row_groups, column_labels)
    captions = _check_captions(image_labels, rows)
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    factor = scale or -(-_MIN_IMAGE // min(height, width))
    save_figure(
        _grid_figure(
            rows,
            cell=(height * factor, width * factor),
            factor=factor,
            num_columns=num_columns,
            row_labels=row_labels,
            row_groups=row_groups,
            column_labels=column_labels or [],
            captions=captions,
            title=title,
            note=note,
        ),
        target,
    )


def _check_grid(
    rows: Sequence[NDArray[np.uint8]],
    row_labels: Sequence[str],
    row_groups: Sequence[str] | None,
    column_labels: Sequence[str] | None,
) -> tuple[int, int, int]:
    """Height and width of the images and number of columns."""
    if not rows or max(len(row) for row in rows) == 0:
        raise ValueError("rows must hold at least 1 image, got 0")
    for name, given in (("row_labels", row_labels), ("row_groups", row_groups)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{name} must be one per row, {len(rows)}, got {len(given)}")
    for at, row in enumerate(rows):
        if row.dtype != np.uint8 or row.ndim != 4 or row.shape[1] not in (1, 3):
            raise ValueError(
                f"rows[{at}] must be uint8 of shape (n, C, H, W) with C 1 or 3, "
                f"got {row.dtype} of shape {row.shape}"
            )
        if row.shape[2:] != rows[0].shape[2:]:
            raise ValueError(
                f"rows[{at}] must hold images of {rows[0].shape[2:]} pixels, got {row.shape[2:]}"
            )
    num_columns = max(len(row) for row in rows)
    if column_labels is not None and len(column_labels) != num_columns:
        raise ValueError(
            f"column_labels must be one per column, {num_columns}, got {len(column_labels)}"
        )
    return rows[0].shape[2], rows[0].shape[3], num_columns


def _check_captions(
    image_labels: Sequence[Sequence[str]] | None, rows: Sequence[NDArray[np.uint8]]
) -> Sequence[Sequence[str]]:
    """One list of labels per row, empty for rows without."""
    if image_labels is None:
        return [[] for _ in rows]
    numbers = [len(labels) for labels in image_labels]
    if len(numbers) != len(rows) or any(
        number not in (0, len(row)) for number, row in zip(numbers, rows, strict=True)
    ):
        raise ValueError(
            f"image_labels must be one per image or none for each row, "
            f"{[len(row) for row in rows]}, got {numbers}"
        )
    return image_labels


def _grid_figure(
    rows: Sequence[NDArray[np.uint8]],
    *,
    cell: tuple[int, int],
    factor: int,
    num_columns: int,
    row_labels: Sequence[str],
    row_groups: Sequence[str] | None,
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]],
    title: str | None,
    note: str | None,
) -> Figure:
    """The grid, laid out in whole pixels: images are pasted, never resampled."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    starts = _group_starts(row_groups, num_rows=len(rows))
    group_names = [row_groups[start] for start in starts] if row_groups else []
    group_width = text_width(group_names, size=9.5, dpi=DPI, bold=True)
    label_width = text_width(row_labels, size=9.0, dpi=DPI)
    left = _MARGIN + label_width + (_LABEL_GAP if label_width else 0)
    left += group_width + 2 * _LABEL_GAP if group_width else 0
    heading_width = text_width(column_labels, size=9.0, dpi=DPI)
    is_turned = heading_width > cell[1]
    top = _MARGIN + (26 if title else 0) + (20 if note else 0)
    top += (heading_width + 6 if is_turned else 18) if column_labels else 0
    tops = [
        top
        + row * (cell[0] + _GAP)
        + sum(row >= start for start in starts[1:]) * _GROUP_GAP
        + sum(bool(labels) for labels in captions[: row + 1]) * _CAPTION
        for row in range(len(rows))
    ]
    canvas_height = tops[-1] + cell[0] + _MARGIN
    canvas_width = left + num_columns * (cell[1] + _GAP) - _GAP + _MARGIN
    title_width = text_width([title or ""], size=11.0, dpi=DPI, bold=True)
    title_width = max(title_width, text_width([note or ""], size=9.0, dpi=DPI))
    canvas_width = max(canvas_width, title_width + 2 * _MARGIN)
    canvas = np.full((canvas_height, canvas_width, 3), 255, dtype=np.uint8)
    for row, y in zip(rows, tops, strict=True):
        for column in range(num_columns):
            x = left + column * (cell[1] + _GAP)
            canvas[y : y + cell[0], x : x + cell[1]] = (
                _enlarge(row[column], factor) if column < len(row) else _MISSING_LEVEL
            )

    figure = Figure(figsize=(canvas_width / DPI, canvas_height / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        style = {"color": INK, "fontsize": 9.0, "va": "center", "parse_math": False, **style}
        figure.text(x / canvas_width, 1 - y / canvas_height, text, **style)

    if title:
        write(_MARGIN, _MARGIN + 7, title, fontsize=11.0, fontweight="bold")
    if note:
        write(_MARGIN, _MARGIN + (26 if title else 0) + 4, note, color=MUTED)
    for column, label in enumerate(column_labels):
        middle = left + column * (cell[1] + _GAP) + cell[1] / 2
        write(middle, top - 5, label, ha="center", va="bottom", rotation=90 if is_turned else 0)
    for y, labels in zip(tops, captions, strict=True):
        for column, label in enumerate(labels):
            middle = left + column * (cell[1] + _GAP) + cell[1] / 2
            write(middle, y - _CAPTION / 2, label, ha="center", fontsize=8.0, color=MUTED)
    labels_end = left - _LABEL_GAP
    for y, label in zip(tops, row_labels, strict=True):
        write(labels_end, y + cell[0] / 2, label, ha="right")
    for start, end, name in zip(starts, [*starts[1:], len(rows)], group_names, strict=False):
        first, last = tops[start], tops[end - 1] + cell[0]
        write(_MARGIN, (first + last) / 2, name, fontsize=9.5, fontweight="bold")
        beside = (_MARGIN + group_width + _LABEL_GAP) / canvas_width
        bar = [1 - first / canvas_height, 1 - last / canvas_height]
        figure.add_artist(Line2D([beside, beside], bar, color=MUTED, linewidth=1.2))
    return figure


def _group_starts(row_groups: Sequence[str] | None, *, num_rows: int) -> list[int]:
    """Rows at which a group begins; [0] without groups."""
    if row_groups is None:
        return [0]
    return [row for row in range(num_rows) if row == 0 or row_groups[row] != row_groups[row - 1]]


def _enlarge(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(C, H, W) to (H * factor, W * factor, 3): nearest neighbour, grey to three channels."""
    enlarged = image.repeat(factor, axis=1).repeat(factor, axis=2).transpose(1, 2, 0)
    return np.broadcast_to(enlarged, (*enlarged.shape[:2], 3))
