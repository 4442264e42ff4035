"""Which client each key is that a coordinator has registered: the key's name says it.

`fedpdm federation start` registers `node-N.pub`, or `node-N-WORDS.pub` where a key was replaced. It
writes Flower's node id and the name into `federation.json` of its state directory. The server app,
which the SuperLink starts, finds that directory in its environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fedpdm.config import ConfigError
from fedpdm.config.strict import StrictError, parse_json, read_text
from fedpdm.setup.flower_config import FEDERATION_VARIABLE

__all__ = ["FILE", "client_of_key", "registered_clients"]

FILE = "federation.json"
_NAME = re.compile(r"node-(\d{1,6})(?:[-._][A-Za-z0-9._-]{1,64})?")


def client_of_key(name: str) -> int | None:
    """N of `node-N` or `node-N-WORDS`; None for a name that says no client."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def registered_clients(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Flower's node id -> client, of every registered key whose name says one, the oldest first.

    Empty where no coordinator of ours runs. `ConfigError` if its file cannot be read.
    """
    state = environment.get(FEDERATION_VARIABLE)
    if not state:
        return {}
    path = Path(state) / FILE
    try:
        nodes = parse_json(read_text(path))["nodes"]
        named = {str(node): client_of_key(str(name)) for node, name in nodes.items()}
    except (StrictError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return {node: client for node, client in named.items() if client is not None}
