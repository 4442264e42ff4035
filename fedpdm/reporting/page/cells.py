"""Cells of the page's tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "is_number", "number"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under columns; the first cell of a row is its heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: Any, digits: int = 4) -> str:
    """A number as text; `-` for None, other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if not math.isfinite(value) else f"{value:.{digits}g}"


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
