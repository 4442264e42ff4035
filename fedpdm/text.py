"""Text and numbers that came from outside, made fit for terminals, logs, Markdown and JSON.

A name in a config, the text of an error or a line of a log may be somebody else's. Everything of it
that is printed or logged goes through `line` or `visible`, what stands in Markdown through
`markdown`, and every JSON file through `json_text`. Any package may import this module.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LONGEST", "finite", "json_text", "line", "markdown", "table_lines", "visible"]

LONGEST = 500  # characters of a line from outside

# Printable by Python's rule, and nothing to see: the rest of Unicode's
# Default_Ignorable_Code_Point, and the empty braille pattern.
_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, range(0xFE00, 0xFE10)))
    + "".join(map(chr, range(0xE0100, 0xE01F0)))
)
_BLANKS = re.compile(r"(?:[ \t\n]|\r\n)+")
_MARKED = re.compile(r"[\\`*_\[\]#|~$]")


def _shown(character: str) -> str:
    if character in "\n\t" or (character.isprintable() and character not in _UNSEEN):
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str) -> str:
    """`text` with escapes such as `\\x1b` for all that is not seen or moves what is seen.

    These are control characters, bidirectional and zero-width ones, blanks other than the common
    one, and line separators. Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def line(text: object, *, limit: int = LONGEST) -> str:
    """`str(text)` as one visible line of at most `limit` characters, and `...` if it had more."""
    whole = str(text)
    first = whole[: 4 * limit]
    shown = visible(_BLANKS.sub(" ", first).strip(" "))
    cut = len(first) < len(whole) or len(shown) > limit
    return f"{shown[:limit]}..." if cut else shown


def markdown(text: object, *, limit: int = LONGEST) -> str:
    """A `line` that Markdown and HTML show as it is: no emphasis, link, heading, cell or tag."""
    shown = line(text, limit=limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKED.sub(r"\\\g<0>", shown).replace("://", "&#58;//")


def table_lines(
    head: Sequence[str], body: Sequence[Sequence[str]], *, width: int | None = None
) -> list[str]:
    """A table in plain text, its columns two blanks apart.

    One that is wider than `width` is shown in parts below each other, a blank line between them;
    each begins with the first column. A column that does not fit beside it stands alone with it.
    """
    rows = [head, *body]
    widths = [max(_columns(row[k]) for row in rows) for k in range(len(head))]
    parts: list[list[int]] = [[]]
    for k in range(1, len(head)):
        taken = widths[0] + sum(2 + widths[j] for j in parts[-1])
        if parts[-1] and width is not None and taken + 2 + widths[k] > width:
            parts.append([])
        parts[-1].append(k)
    lines: list[str] = []
    for part in parts:
        lines += [""] if lines else []
        for row in rows:
            cells = [row[k] + " " * (widths[k] - _columns(row[k])) for k in (0, *part)]
            lines.append("  ".join(cells).rstrip())
    return lines


def _columns(text: str) -> int:
    """Places that a terminal shows it in: East Asian letters take two."""
    return sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def finite(value: Any) -> Any:
    """Plain data with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, *, indent: int | None = 1) -> str:
    """`value` as JSON, which has neither NaN nor infinity: such numbers become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)
