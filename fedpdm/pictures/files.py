"""Where a picture goes, and what the pictures share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "INK", "MUTED", "png_path", "save_figure"]

DPI: Final = 100  # pixels per inch
INK: Final = "#222222"
MUTED: Final = "#666666"


def png_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; `ValueError` unless it ends in .png."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {target}")
    return target


def save_figure(figure: Figure, target: Path) -> None:
    """Write the PNG in one step: a reader sees the old file, or the whole new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=DPI, metadata={"Software": None})
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
