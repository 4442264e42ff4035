"""`fedpdm evaluate`: score the samples of a finished simulation against real images."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import progress_aside, show, terminal_width
from fedpdm.config import ConfigError
from fedpdm.text import json_text

__all__ = ["add_evaluate_parser"]

EXAMPLES = """\
examples:
  fedpdm evaluate runs/eps3 --clients 0,1 --num 500
  fedpdm evaluate runs/eps3 --method alone
  fedpdm evaluate runs/eps3 --handover 0,200,400,642   (the fine stage by itself, from each t)
"""


def add_evaluate_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "evaluate",
        help="score the samples of a finished simulation: distances, recall, copies, downstream",
        epilog=EXAMPLES,
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", default="0", help="with commas; default: %(default)s")
    parser.add_argument("--num", type=int, help="images per class group; default: the config's")
    parser.add_argument("--method", choices=("run", "alone"), default="run")
    parser.add_argument("--handover", metavar="T,T,...", help="noise real images to t and refine")
    parser.add_argument("--out", type=Path, help="write the scores as JSON")
    parser.set_defaults(action=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> None:
    """Score, print a table, and write JSON where asked."""
    clients = _numbers(options.clients, "--clients")
    from fedpdm.evaluation.assessment import assess_run, handover_curve
    from fedpdm.storage.files import write_atomic
    from fedpdm.storage.holding import check_not_held
    from fedpdm.storage.run_directory import RunDirectory

    check_not_held(options.run)
    run = RunDirectory(options.run)
    scores: Any
    with progress_aside(options):
        if options.handover:
            levels = _numbers(options.handover, "--handover")
            scores = handover_curve(run, client=clients[0], levels=levels, num_images=options.num)
            lines = [
                f"{point['group']:<9} t = {point['t']:>4}  {_line(point['scores'])}"
                for point in scores
            ]
        else:
            scores, _ = assess_run(
                run, clients=clients, num_images=options.num, method=options.method
            )
            lines = _client_lines(scores["clients"])
    if options.out:
        write_atomic(options.out, (json_text(scores) + "\n").encode())
        lines.append(f"written to {options.out}")
    if options.json:
        print(json_text(scores))
    elif not options.quiet:
        width = terminal_width()
        show("\n".join(each for one in lines for each in _wrapped(one, width)))


def _wrapped(text: str, width: int | None) -> list[str]:
    """A line in parts of at most `width` columns, broken between scores."""
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(
        text, max(width, 20), subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _client_lines(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for client in clients:
        for group, record in client["groups"].items():
            lines += [
                f"client {client['client_id']} {group}, {record['num_own']} own images",
                f"  samples     {_line(record['scores'])}",
                f"  real images {_line(record['floor'])}",
            ]
        lines += [f"  {k.replace('_', ' ')} {v:.3f}" for k, v in client["downstream"].items()]
    return lines


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: must be whole numbers with commas, got {text!r}") from None


def _line(scores: dict[str, float]) -> str:
    return "  ".join(f"{name.split('_', 1)[1]} {value:.3g}" for name, value in scores.items())
