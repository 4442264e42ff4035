"""From the arguments of a run to its configuration and its directory."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from fedpdm.config import ConfigError, RunConfig, load_config

__all__ = ["resolve_run"]


def resolve_run(options: argparse.Namespace) -> tuple[RunConfig, Path]:
    """The run's config, with the data directory made absolute, and its directory."""
    if options.experiment is None:
        if not (options.resume and options.out):
            raise ConfigError("experiment: give a YAML file, or --resume with --out")
        if options.overrides:
            raise ConfigError("--set: a resumed run keeps its config; give the experiment file")
        from fedpdm.runs import RunDirectory

        return RunDirectory(options.out).config(), options.out.absolute()
    config = load_config(options.experiment, options.overrides)
    root = config.data.root or os.environ.get("FEDPDM_DATA")
    if root and config.data.name != "digits":
        data = dataclasses.replace(config.data, root=str(Path(root).expanduser().absolute()))
        config = dataclasses.replace(config, data=data)
    out = options.out or Path(os.environ.get("FEDPDM_RUNS", "runs")) / config.name
    return config, out.absolute()
