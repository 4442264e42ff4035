"""Text and numbers that came from outside, made fit for terminals, logs, Markdown and JSON.

A name in a config, the text of an error or a line of a log may be somebody else's. Everything of it
that is printed or logged goes through `line` or `visible`, what stands in Markdown through
`markdown`, and every JSON file through `json_text`. Any package may import this module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["LONGEST", "finite", "json_text", "line", "markdown", "visible"]

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
