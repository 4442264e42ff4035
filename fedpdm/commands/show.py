"""`fedpdm show`: the summary of a run or of a node's store, which runs print at their end too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import show
from fedpdm.text import json_text

__all__ = ["add_show_parser", "show_run", "tell_run"]


def add_show_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    show = commands.add_parser("show", help="summary of a finished run, or of a node's store")
    show.add_argument("run", type=Path, help="run directory, or a node's store")
    show.set_defaults(action=lambda options: show_run(options.run, as_json=options.json))


def show_run(root: Path, *, as_json: bool) -> None:
    """Print a finished run's places, privacy and metrics: in words, or its statement and
    `metrics.json` in one object. `ConfigError`, one line, if it has not got that far."""
    from fedpdm.reporting.node_summary import summarise_node
    from fedpdm.reporting.run_files import summarise
    from fedpdm.storage.node_run import NodeRun, open_run

    run = open_run(root)
    run.config()  # or it is no run at all
    if as_json:
        facts = {"privacy": run.statement(), "metrics": run.read_json("metrics.json")}
        print(json_text({"run": str(run.root), **facts}))
    else:
        show(summarise_node(run) if isinstance(run, NodeRun) else summarise(run))


def tell_run(options: argparse.Namespace, out: Path) -> None:
    """The JSON of a command that ran, or with `options.dry_run` only checked, the run in `out`."""
    if options.dry_run:
        print(json_text({"run": str(out), "dry_run": True}))
    else:
        show_run(out, as_json=True)
