"""What every section of the configuration is made of: a key with its checks, and its error."""

from __future__ import annotations

import unicodedata
from dataclasses import field
from typing import Any

from fedpdm.text import visible

__all__ = ["LONGEST_NAME", "NAME_MARKS", "ConfigError", "check_name", "key"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and names the key."""


def key(default: Any, doc: str, **checks: Any) -> Any:
    """A config key: default, one-line description and checks.

    Checks are low, high, above, below, choices and `form`, a pair of a regular expression and what
    to say of it; with `own=True` custom code may stand for a choice, as `package.module:NAME`
    (`fedpdm.config.plugins`). A node's policy must say a `stated` key, if only `none`.
    """
    return field(default=default, metadata={"doc": doc, **checks})


LONGEST_NAME = 128
NAME_MARKS = "._-+=,@()"  # in a name, besides letters, digits and blanks


def check_name(name: str) -> None:
    """`ConfigError` unless an experiment's name is one of letters and digits of any script and some
    marks, and can name a directory and stand in any text."""
    kinds = {unicodedata.category(c)[0] if c not in f" {NAME_MARKS}" else "" for c in name}
    seen = visible(name) == name and kinds <= {"L", "M", "N", ""}
    if not seen or not 1 <= len(name) <= LONGEST_NAME or not (name[0].isalnum() or name[0] == "_"):
        raise ConfigError(
            f"name: must be 1 to {LONGEST_NAME} letters, digits and {NAME_MARKS} or blanks, "
            f"beginning with a letter, a digit or _, got {name[:LONGEST_NAME]!r}"
        )
