"""From the arguments of a run to its configuration and its directory."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from fedpdm.config import ConfigError, RunConfig, load_config

__all__ = ["DEPLOYED_OVERRIDES", "add_overrides", "add_run_arguments", "resolve_run"]

DEPLOYED_OVERRIDES = "config key (repeatable); run.simulation is false here"


def add_overrides(parser: argparse.ArgumentParser, words: str) -> None:
    """Add `--set KEY=VALUE` as `options.overrides`; `words` are the rest of its help."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help=f"override a {words}",
    )  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser, *, overrides: str, dry_run: str) -> None:
    """Add what `resolve_run` reads, and --dry-run; the words are help."""
    parser.add_argument("experiment", nargs="?", type=Path, help="YAML file; not needed to resume")
    add_overrides(parser, overrides)
    parser.add_argument("--out", type=Path, help="run directory; default: runs/NAME")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def resolve_run(options: argparse.Namespace) -> tuple[RunConfig, Path]:
    """The run's config, with the data directory made absolute, and its directory."""
    if options.experiment is None:
        if not (options.resume and options.out):
            raise ConfigError("experiment: give a YAML file, or --resume with --out")
        from fedpdm.setup.continuing import overridden
        from fedpdm.storage.run_directory import RunDirectory

        known = RunDirectory(options.out).config()
        return overridden(known, options.overrides), options.out.absolute()
    config = load_config(options.experiment, options.overrides)
    root = config.data.root or os.environ.get("FEDPDM_DATA")
    if root and _has_files(config.data.name):
        data = dataclasses.replace(config.data, root=str(Path(root).expanduser().absolute()))
        config = dataclasses.replace(config, data=data)
    out = options.out or Path(os.environ.get("FEDPDM_RUNS", "runs")) / config.name
    if options.resume:
        from fedpdm.setup.continuing import run_to_go_on
        from fedpdm.storage.run_directory import RunDirectory

        config = run_to_go_on(RunDirectory(out), config)
    return config, out.absolute()


def _has_files(name: str) -> bool:
    """Whether a data set lies in files; it is only here that reading sets is imported."""
    from fedpdm.data import data_set

    return bool(data_set(name).needs)
