"""Custom objects by name: `package.module:NAME` in a config, imported here alone.

Naming code in a config runs it, with the rights of whoever starts the run. A node refuses code
that its policy's digests do not cover.

A module is looked for where Python looks, and last of all in the directory where the run was
started: console scripts do not look there. Flower's own processes work elsewhere; they are told
that directory by `DIRECTORY_VARIABLE`. It is on the module path only while a name is resolved, so
what such a module imports from there it imports at its top.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TypeVar

from fedpdm.config.keys import ConfigError

__all__ = [
    "DIRECTORY_VARIABLE",
    "check_form",
    "find",
    "is_named",
    "load_installed",
    "load_kind",
    "load_named",
]

DIRECTORY_VARIABLE = "FEDPDM_MODULES"

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_named(value: str) -> bool:
    """Whether `value` names custom code (it has a colon), not a registered name."""
    return ":" in value


def check_form(value: str, *, key: str) -> None:
    """`ConfigError` unless `value` has the form of a name of custom code. Imports nothing."""
    if not _FORM.fullmatch(value):
        raise ConfigError(f"{key}: {value!r} must have the form package.module:NAME")


@contextlib.contextmanager
def _own_directory() -> Iterator[None]:
    """The directory where the run was started at the end of the module path, for this block."""
    path = list(sys.path)
    sys.path.append(os.environ.get(DIRECTORY_VARIABLE) or os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = path


def load_named(value: str, *, key: str) -> object:
    """The object that `package.module:NAME` names.

    `ConfigError`, one line with `key` and `value`, for another form, a module that cannot be
    imported (for whatever reason) and a name that the module lacks.
    """
    check_form(value, key=key)
    where = f"{key}: {value!r}"
    module_name, _, name = value.partition(":")
    try:
        with _own_directory():
            module = importlib.import_module(module_name)
    except Exception as error:  # a custom module may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{where} cannot be imported (is it installed, or on PYTHONPATH?): {reason}"
        ) from None
    if not hasattr(module, name):
        raise ConfigError(f"{where}: module {module_name} has no {name}")
    found: object = getattr(module, name)
    return found


def load_installed(group: str, name: str) -> object | None:
    """What an installed package declares as the entry point `name` of `group`, or None.

    `ConfigError`, one line, if its module cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group=group, name=name):
        return load_named(entry.value, key=f"entry point {name} of {group}")
    return None


T = TypeVar("T")


def load_kind(value: str, kind: type[T], *, key: str) -> T:
    """As `load_named`; `ConfigError` also for an object that is no `kind`."""
    found = load_named(value, key=key)
    if not isinstance(found, kind):
        raise ConfigError(
            f"{key}: {value!r} must be a {kind.__module__}.{kind.__name__}, "
            f"is a {type(found).__name__}"
        )
    return found


def find(value: str, table: Mapping[str, T], kind: type[T], *, key: str) -> T:
    """The entry of `table` that `value` names, or the custom `kind` that it names."""
    return table[value] if value in table else load_kind(value, kind, key=key)
