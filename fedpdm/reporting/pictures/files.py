"""Where a picture goes, and what the pictures share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedpdm.reporting.pictures.lettering import letter
from fedpdm.storage.files import appearing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "INK", "MUTED", "png_path", "save_figure", "save_png_and_pdf"]

DPI: Final = 100  # pixels per inch
INK: Final = "#222222"
MUTED: Final = "#666666"


def png_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; `ValueError` unless it ends in .png."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {target}")
    return target


def save_png_and_pdf(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.pdf, each in one step; returns both paths."""
    paths = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    for path in paths:
        save_figure(figure, path)
    return paths


def save_figure(figure: Figure, target: Path) -> None:
    """Write a PNG or PDF in one step: a reader sees the old file, or the whole new one.

    Names in any script are drawn with a font that has them, or spelled (`lettering`).
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        letter(text)
    kind = target.suffix.lower().lstrip(".")
    unstated = {"png": "Software", "pdf": "CreationDate"}[kind]  # the same picture, same bytes
    with appearing(target) as unfinished:
        figure.savefig(unfinished, format=kind, dpi=DPI, metadata={unstated: None})
