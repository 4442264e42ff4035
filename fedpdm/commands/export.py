"""`fedpdm export`: a client's models of a finished run, or of a node's store, as a pipeline."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import tell

__all__ = ["add_export_parser"]

DESCRIPTION = """\
Write a client's models as a directory that loads with diffusers alone: both models, the privacy
statement and a model card. RUN is a run directory of a simulation, or a node's own store after a
deployed run. The fine model was trained on raw images without noise: who has it may learn about
them.

--push-to-hub uploads the directory to a model repository of the Hugging Face Hub, which is made if
it is not there, and is private unless --public says otherwise. RUN may then also be a directory
that was exported before, for instance with a licence added to its README.md.
"""
EXAMPLES = """\
examples:
  fedpdm export runs/eps3 --client 0 --out pipeline0
  fedpdm export STORE --out pipeline
  fedpdm export pipeline0 --push-to-hub NAME/digits
"""


def add_export_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "export", help="write a diffusers pipeline of one client, or put it on the Hub",
        description=DESCRIPTION, epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="run directory, or a node's store")
    parser.add_argument("--client", type=int, help="default: a node's own, else 0")
    parser.add_argument("--out", type=Path, help="directory to make; needed without --push-to-hub")
    parser.add_argument(
        "--counts-epsilon", type=float, metavar="EPSILON",
        help="noise the numbers of images per class that it holds with sampling.coarse_worth",
    )  # fmt: skip
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="model repository of the Hub, as OWNER/NAME"
    )
    parser.add_argument("--public", action="store_true", help="everybody may read that repository")
    parser.set_defaults(action=run_export)


def run_export(options: argparse.Namespace) -> None:
    """The command's action. `ValueError`, one line, for what cannot be exported."""
    if options.public and options.push_to_hub is None:
        raise ValueError("--public: is of --push-to-hub, which is not given")
    if options.push_to_hub is None:
        if options.out is None:
            raise ValueError("--out: give a directory to make, or --push-to-hub NAME")
        line, facts = _write(options, options.out)
        tell(options, line, facts)
        return
    from fedpdm.publishing.hub import check_hub

    check_hub(options.push_to_hub)
    if (options.run / "model_index.json").is_file():
        given = (("--out", options.out), ("--client", options.client),
                 ("--counts-epsilon", options.counts_epsilon))  # fmt: skip
        if others := [name for name, value in given if value is not None]:
            raise ValueError(f"{others[0]}: {options.run} is exported already, and only pushed")
        _push(options, options.run, "", {"out": str(options.run)})
    elif options.out is not None:
        _push(options, options.out, *_write(options, options.out))
    else:
        with tempfile.TemporaryDirectory(prefix="fedpdm-export-") as folder:
            line, facts = _write(options, Path(folder) / "pipeline")
            del facts["out"]
            _push(options, Path(folder) / "pipeline", line.partition(" written to ")[0], facts)


def _push(options: argparse.Namespace, folder: Path, line: str, facts: dict[str, Any]) -> None:
    """Upload an exported directory, and tell both outcomes."""
    from fedpdm.publishing.hub import HubError, push_to_hub

    try:
        url = push_to_hub(folder, options.push_to_hub, public=options.public)
    except HubError as error:
        kept = f"; it is in {folder}, and can be pushed again from there" if "out" in facts else ""
        raise HubError(f"{error}{kept}") from None
    who = "everybody may read it" if options.public else "private"
    words = f"{line}\npushed to {url} ({who})".lstrip()
    tell(options, words, {**facts, "hub": url, "public": options.public})


def _write(options: argparse.Namespace, out: Path) -> tuple[str, dict[str, Any]]:
    """Write the directory; what to say of it, in words and as facts."""
    from fedpdm.publishing.export import export_pipeline
    from fedpdm.storage.node_run import open_run

    run, epsilon = open_run(options.run), options.counts_epsilon
    client = run.first_client() if options.client is None else options.client
    path = export_pipeline(run, client_id=client, out=out, counts_epsilon=epsilon)
    line = f"pipeline of client {client} written to {path}"
    if epsilon is None and run.config().sampling.coarse_worth is not None:
        line += "\nit holds the exact numbers of its images per class: see its README.md, Privacy"
    return line, {"out": str(path), "client": client}
