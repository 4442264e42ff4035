"""Objects of one's own by name: `package.module:NAME` in a config, imported here alone.

Naming code in a config runs it, with the rights of whoever starts the run. A node refuses code
that its policy's digests do not cover.
"""

from __future__ import annotations

import importlib
import re

from fedpdm.config.keys import ConfigError

__all__ = ["is_named", "load_named"]

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_named(value: str) -> bool:
    """Whether `value` names code of one's own (it has a colon), not a registered name."""
    return ":" in value


def load_named(value: str, *, key: str) -> object:
    """The object that `package.module:NAME` names.

    `ConfigError`, one line with `key` and `value`, for another form, a module that cannot be
    imported (for whatever reason) and a name that the module lacks.
    """
    where = f"{key}: {value!r}"
    if not _FORM.fullmatch(value):
        raise ConfigError(f"{where} must have the form package.module:NAME")
    module_name, _, name = value.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of one's own may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{where} cannot be imported (is it installed, or on PYTHONPATH?): {reason}"
        ) from None
    if not hasattr(module, name):
        raise ConfigError(f"{where}: module {module_name} has no {name}")
    found: object = getattr(module, name)
    return found
