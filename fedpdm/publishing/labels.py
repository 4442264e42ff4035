"""Which class is meant: by its number, or by its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

__all__ = ["label_of"]

NAMES_SHOWN = 12


def label_of(given: int | str, names: Mapping[int, str], known: range) -> int:
    """The label that a number (-1: none) or the name of a class means; `ValueError` for others."""
    number = str(given).strip()
    if number.removeprefix("-").isdecimal():
        if int(number) != -1 and int(number) not in known:
            raise ValueError(f"labels must be in [0, {len(known) - 1}], got {number}")
        return int(number)
    found = [k for k, name in names.items() if name.casefold() == number.casefold()]
    if len(found) != 1:
        near = difflib.get_close_matches(number, names.values(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(list(names.values())[:NAMES_SHOWN]) or "without names"
        raise ValueError(
            f"label must be a number from 0 to {len(known) - 1} or a class ({listed}"
            f"{', ...' if len(names) > NAMES_SHOWN else ''}), got {number!r}{hint}"
        )
    return found[0]
