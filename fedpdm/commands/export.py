"""`fedpdm export`: a client's models of a finished run, or of a node's store, as a pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import tell

__all__ = ["add_export_parser"]

DESCRIPTION = """\
Write a client's models as a directory that loads with diffusers alone: both models, the privacy
statement and a model card. RUN is a run directory of a simulation, or a node's own store after a
deployed run. The fine model was trained on raw images without noise: who has it may learn about
them.
"""


def add_export_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "export", help="write a diffusers pipeline of one client", description=DESCRIPTION
    )
    parser.add_argument("run", type=Path, help="run directory, or a node's store")
    parser.add_argument("--client", type=int, help="default: a node's own, else 0")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--counts-epsilon", type=float, metavar="EPSILON",
        help="noise the numbers of images per class that it holds with sampling.coarse_worth",
    )  # fmt: skip
    parser.set_defaults(action=run_export)


def run_export(options: argparse.Namespace) -> None:
    """The command's action. `ValueError`, one line, for what cannot be exported."""
    from fedpdm.publishing.export import export_pipeline
    from fedpdm.storage.node_run import open_run

    run, epsilon = open_run(options.run), options.counts_epsilon
    client = run.first_client() if options.client is None else options.client
    path = export_pipeline(run, client_id=client, out=options.out, counts_epsilon=epsilon)
    line = f"pipeline of client {client} written to {path}"
    if epsilon is None and run.config().sampling.coarse_worth is not None:
        line += "\nit holds the exact numbers of its images per class: see its README.md, Privacy"
    tell(options, line, {"out": str(path), "client": client})
