"""What every section of the configuration is made of: a key with its checks, and its error."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["ConfigError", "key"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and names the key."""


def key(default: Any, doc: str, **checks: Any) -> Any:
    """A config key: default, one-line description and checks.

    Checks are low, high, above, below and choices; with `own=True` custom code may stand for
    a choice, as `package.module:NAME` (`fedpdm.config.plugins`).
    """
    return field(default=default, metadata={"doc": doc, **checks})
