"""`fedpdm report`: runs as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import say
from fedpdm.text import json_text

__all__ = ["add_report_parser"]

DESCRIPTION = """\
Write one self-contained HTML page about one run, or about several side by side: settings, privacy
statement and ledgers, who holds what, curves, samples, the way from noise to image through the
run's own models, and attack results where there are any. It needs no network and no other file.
In simulation it shows samples of models trained on raw images: it is as private as those.
"""
EXAMPLES = """\
examples:
  fedpdm report runs/eps3
  fedpdm report runs/eps3 runs/eps10 runs/alone --out compared.html
  fedpdm report runs/eps3 --attacks attacks/eps3 --out eps3.html
"""


def add_report_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page about a run, or several side by side",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="default, of one run: RUN/report.html"
    )
    parser.add_argument(
        "--attacks", type=Path, action="append", default=[], metavar="DIR",
        help="holds attacks.json; once per run, in their order; default: in the run directory",
    )  # fmt: skip
    parser.add_argument(
        "--client", type=int, default=0,
        help="whose models draw the way from noise to image; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of that noise; default: %(default)s")
    parser.add_argument("--no-film", action="store_true", help="sample nothing")
    parser.set_defaults(action=run_report)


def run_report(options: argparse.Namespace) -> None:
    """The command's action. `ValueError` with one line for what cannot be read or written."""
    if options.out is None:
        if len(options.runs) > 1:
            raise ValueError(f"--out: is needed for a page about {len(options.runs)} runs")
        options.out = options.runs[0] / "report.html"
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: must end in .html, got {options.out}")
    if options.out.is_dir():
        raise IsADirectoryError(21, "is a directory", str(options.out))
    if len(options.attacks) > len(options.runs):
        raise ValueError(
            f"--attacks: at most one for each of {len(options.runs)} runs, got "
            f"{len(options.attacks)}"
        )
    for name in ("client", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name}: must be at least 0, got {getattr(options, name)}")
    from fedpdm.reporting.page import read_run, write_report

    given = [*options.attacks, *[None] * len(options.runs)]
    runs = [read_run(r, attacks=a) for r, a in zip(options.runs, given, strict=False)]

    def tell_progress(line: str) -> None:
        if not options.quiet:
            say(line)

    path = write_report(
        runs,
        options.out,
        client=options.client,
        seed=options.seed,
        films=not options.no_film,
        say=tell_progress,
    )
    if options.json:
        size = path.stat().st_size
        print(
            json_text(
                {"out": str(path), "runs": [str(r) for r in options.runs], "bytes": size},
                indent=None,
            )
        )
    elif not options.quiet:
        print(f"report written to {path}; open it in a browser")
