"""What every section of the configuration is made of: a key with its checks, and its error."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["ConfigError", "key"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and names the key."""


def key(default: Any, doc: str, **checks: Any) -> Any:
    """A config key: default, one-line description and checks (low, high, above, below, choices)."""
    return field(default=default, metadata={"doc": doc, **checks})
