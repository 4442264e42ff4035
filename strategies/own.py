"""A custom strategy, named by `aggregation.method: package.module:NAME`."""

from __future__ import annotations

import inspect

from fedpdm.config import ConfigError
from fedpdm.config.plugins import is_named, load_named
from strategies.coarse import CoarseStrategy

__all__ = ["own_strategy"]


def own_strategy(method: str) -> type[CoarseStrategy] | None:
    """The class that `aggregation.method` names; None for a method of this package.

    `ConfigError`, one line, for what is not there, is no subclass of `CoarseStrategy` or lacks a
    method.
    """
    if not is_named(method):
        return None
    where = f"aggregation.method: {method!r}"
    found = load_named(method, key="aggregation.method")
    if not (isinstance(found, type) and issubclass(found, CoarseStrategy)):
        raise ConfigError(f"{where} must be a subclass of strategies.coarse.CoarseStrategy")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{where} must define {missing}")
    return found
