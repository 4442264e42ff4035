"""Digests of a config: whether two are the same, and which run a file is of."""

from __future__ import annotations

import dataclasses
import hashlib

from fedpdm.config.reading import config_to_json
from fedpdm.config.schema import RunConfig

__all__ = ["config_digest", "run_digest"]


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the resolved config, without its name and the coordinator's own data folder.

    A node does not use those two. A change of any other key makes it another config.
    """
    data = dataclasses.replace(config.data, root=None)
    plain = dataclasses.replace(config, name="federation", data=data)
    return hashlib.sha256(config_to_json(plain).encode()).hexdigest()


def run_digest(config: RunConfig) -> str:
    """What a run's files say of which run they are: 16 digits of the digest of the config that it
    was begun with. One that goes on for more rounds keeps it."""
    if config.run.begun_with is not None:
        begun = dataclasses.replace(config.run, rounds=config.run.begun_with, begun_with=None)
        config = dataclasses.replace(config, run=begun)
    return config_digest(config)[:16]
