"""Names in pictures: in a font that has their letters, and readable where none is installed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from anyascii import anyascii

from fedpdm.text import visible

if TYPE_CHECKING:
    from matplotlib.text import Text

__all__ = ["fallback_fonts", "letter", "text_width", "written"]

# Fonts that have many scripts, the best looking first; others are tried after them.
_PREFERRED: Final = re.compile(
    r"Noto Sans (Mono )?CJK|Source Han Sans|PingFang|Hiragino|Microsoft YaHei|Yu Gothic|Malgun|"
    r"WenQuanYi|Droid Sans Fallback|Arial Unicode|Noto Sans|Liberation Sans|Unifont"
)


def written(text: str) -> str:
    """`text` as a picture can show it: letters that no installed font has are spelled by their
    sound (FeiYan), where `anyascii` knows one, or are escapes such as `\\u732b`."""
    if text.isascii():
        return visible(text)
    return "".join(
        one if one.isascii() or _font_of(one) is not None else _spelled(one)
        for one in visible(text)
    )


def fallback_fonts(texts: Iterable[str]) -> list[str]:
    """Families that matplotlib's own lacks letters of, in order of need; empty for most texts."""
    wanted = sorted({one for text in texts if not text.isascii() for one in text})
    return list(dict.fromkeys(family for one in wanted if (family := _font_of(one))))


def letter(text: Text) -> Text:
    """Make a text of a figure one that can be drawn without a warning; returns it."""
    content = text.get_text()
    if not content.isascii():
        text.set_text(written(content))
        if others := fallback_fonts([content]):
            text.set_fontfamily([*text.get_fontfamily(), *others])
    return text


def text_width(texts: Sequence[str], *, size: float, dpi: float, bold: bool = False) -> int:
    """Width in whole pixels of the widest text; 0 for none."""
    from matplotlib.figure import Figure

    figure = Figure(dpi=dpi)
    weight = "bold" if bold else "normal"
    widths = [
        letter(figure.text(0, 0, text, fontsize=size, fontweight=weight, parse_math=False))
        .get_window_extent()
        .width
        for text in texts
        if text
    ]
    return math.ceil(max(widths, default=0.0))


def _spelled(character: str) -> str:
    if sound := anyascii(character):
        return sound
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@functools.cache
def _font_of(character: str) -> str | None:
    """The family to draw a character with: empty for matplotlib's own, None for none."""
    from matplotlib import font_manager

    own = font_manager.findfont(font_manager.FontProperties())
    if character.isspace() or _has(own, character):
        return ""
    for family, path in _families():
        if _has(path, character):
            return family
    return None


@functools.cache
def _families() -> tuple[tuple[str, str], ...]:
    """(family, file) of the upright fonts of this machine, preferred ones first."""
    from matplotlib import font_manager

    found: dict[str, str] = {}
    for font in font_manager.fontManager.ttflist:
        if font.name.startswith("Last Resort"):
            continue  # a font of boxes, which has every letter
        if font.style == "normal" and (font.weight in (400, "normal", "regular", "book")):
            found.setdefault(font.name, font.fname)
    return tuple(sorted(found.items(), key=lambda pair: (not _PREFERRED.match(pair[0]), pair[0])))


def _has(path: str, character: str) -> bool:
    from matplotlib import font_manager

    try:
        return bool(font_manager.get_font(path).get_char_index(ord(character)))
    except (OSError, RuntimeError):  # a font file that cannot be read
        return False
