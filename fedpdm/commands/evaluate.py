"""`fedpdm evaluate`: what the clients of a finished simulation draw, against real images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError

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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    from fedpdm.assessment import assess_run, handover_curve
    from fedpdm.files import write_atomic
    from fedpdm.runs import RunDirectory

    run = RunDirectory(options.run)
    scores: Any
    if options.handover:
        levels = _numbers(options.handover, "--handover")
        scores = handover_curve(run, client=clients[0], levels=levels, num_images=options.num)
        for point in scores:
            print(f"{point['group']:<9} t = {point['t']:>4}  " + _line(point["scores"]))
    else:
        scores, _ = assess_run(run, clients=clients, num_images=options.num, method=options.method)
        for client in scores["clients"]:
            for group, record in client["groups"].items():
                print(f"client {client['client_id']} {group}, {record['num_own']} own images")
                print(f"  samples     {_line(record['scores'])}")
                print(f"  real images {_line(record['floor'])}")
            for name, value in client["downstream"].items():
                print(f"  {name.replace('_', ' ')} {value:.3f}")
    if options.out:
        write_atomic(options.out, (json.dumps(scores, indent=1) + "\n").encode())
        print(f"written to {options.out}")


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: must be whole numbers with commas, got {text!r}") from None


def _line(scores: dict[str, float]) -> str:
    return "  ".join(f"{name.split('_', 1)[1]} {value:.3g}" for name, value in scores.items())
