"""What Flower's flat run configuration means: the `RunConfig` and the run directory.

Server and clients are handed the same flat mapping (`[tool.flwr.app.config]` with overrides), in
other processes and other directories. Both read it here, so that they agree.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError, RunConfig, config_from_json, load_config
from fedpdm.storage.run_directory import RunDirectory

__all__ = [
    "FEDERATION_VARIABLE",
    "experiments_root",
    "is_resumed",
    "ledgers_path",
    "new_release_allowed",
    "release_path",
    "run_config_of",
    "run_root",
]


FEDERATION_VARIABLE = "FEDPDM_FEDERATION"
"""The state directory of a coordinator's federation, for the processes that it starts."""


def experiments_root() -> Path:
    """Where the bundled `experiments/` lie: beside the package, in a checkout and in a FAB."""
    return Path(__file__).resolve().parents[2] / "experiments"


def run_config_of(flat: Mapping[str, Any]) -> RunConfig:
    """The run's configuration.

    `resolved-config` (JSON, as `fedpdm run` passes it) wins; else `experiment`, a YAML file of
    `experiments/` or an absolute path, with `set`, overrides separated by blanks.
    """
    if text := str(flat.get("resolved-config", "")):
        return config_from_json(text)
    name = str(flat.get("experiment", "digits"))
    path = Path(name)
    if not path.is_absolute():
        relative = path if path.suffix else Path(f"{path}.yaml")
        if relative.parts and relative.parts[0] == "experiments":
            relative = Path(*relative.parts[1:])
        path = experiments_root() / relative
    if not name or not path.is_file():
        known = sorted(p.stem for p in experiments_root().glob("*.yaml"))
        raise ConfigError(f"experiment: {name!r} not found; there are {', '.join(known)}")
    try:
        overrides = shlex.split(str(flat.get("set", "")))
    except ValueError as error:
        raise ConfigError(f"set: {error} in {flat['set']!r}") from None
    num_clients = flat.get("num-clients", 0)
    if type(num_clients) is not int:
        raise ConfigError(f"num-clients: must be a whole number, got {num_clients!r}")
    if num_clients:
        overrides.insert(0, f"partition.num_clients={num_clients}")
    return load_config(path, overrides)


def run_root(flat: Mapping[str, Any], config: RunConfig, run_id: int) -> Path:
    """The run directory: `run-dir` where given, else `runs/NAME-RUNID` under `FEDPDM_RUNS` or
    the current directory."""
    if chosen := str(flat.get("run-dir", "")):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("FEDPDM_RUNS", "runs")).expanduser().absolute()
    return base / f"{config.name}-{run_id}"


def release_path(flat: Mapping[str, Any], run: RunDirectory, client_id: int) -> Path:
    """Where a simulated client keeps its releases: under `release-dir` where given, to share them
    between runs, else in its store in the run directory."""
    if chosen := str(flat.get("release-dir", "")):
        return Path(chosen).expanduser().absolute() / str(client_id)
    return run.client_path(client_id)


def ledgers_path(run: RunDirectory) -> Path:
    """Where a coordinator keeps what participants showed of their ledgers: in the state directory
    of its federation, for all runs; for a run of none, in the run's directory."""
    state = os.environ.get(FEDERATION_VARIABLE)
    return Path(state) / "ledgers.json" if state else run.root / "server" / "ledgers.json"


def is_resumed(flat: Mapping[str, Any]) -> bool:
    """Whether the run continues the one in `run-dir`."""
    return _flag(flat, "resume")


def new_release_allowed(flat: Mapping[str, Any]) -> bool:
    """Whether simulated clients may noise released images once more."""
    return _flag(flat, "allow-new-release")


def _flag(flat: Mapping[str, Any], key: str) -> bool:
    value = flat.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: must be true or false, got {value!r}")
    return value
