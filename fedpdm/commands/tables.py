"""`fedpdm tables`: results as Markdown, the paper's numbers beside ours, pictures of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import tell

__all__ = ["add_tables_parser"]


def add_tables_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser("tables", help="write docs/results.md from experiments/results")
    parser.add_argument("--experiments", type=Path, default=Path("experiments"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.set_defaults(action=write_tables)


def write_tables(options: Any) -> None:
    """Write the page, and a picture per experiment beside it."""
    from fedpdm.reporting.suite_tables import write_results_page

    shown = write_results_page(options.experiments, options.out)
    facts = {"out": str(options.out), "tables": shown}
    tell(options, f"written to {options.out}", facts)
