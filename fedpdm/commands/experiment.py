"""`fedpdm experiment`: the methods of a suite at one size, over seeds, and the table of results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.terminal import complain, progress_aside, show, terminal_width
from fedpdm.config import ConfigError, Suite, apply_overrides, load_suite
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.suites.cell import Cell

__all__ = ["add_experiment_parser", "chosen_cells"]

EXAMPLES = """\
examples:
  fedpdm experiment experiments/colored-mnist.yaml --profile smoke
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --jobs 2
  fedpdm experiment experiments/cifar10.yaml --method alone --seeds 0
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --ablation epsilon
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --ablation epsilon --variant 100
Cells that have a result are skipped; an interrupted experiment goes on where it was.
"""


def add_experiment_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "experiment",
        help="run the methods of an experiment and print the paper's table beside ours",
        epilog=EXAMPLES,
    )
    parser.add_argument("suite", type=Path, help="YAML file of the experiment")
    parser.add_argument("--profile", default="smoke", help="size; default: %(default)s")
    parser.add_argument(
        "--method", action="append", default=[], help="repeatable; default: all of the table"
    )
    parser.add_argument(
        "--seeds", help="which, with commas, e.g. 0,1,2; default: as many as the profile says"
    )
    parser.add_argument("--ablation", help="run the variants of this ablation of the suite")
    parser.add_argument(
        "--variant", action="append", default=[], help="repeatable; default: all of the ablation"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="torchvision layout; default: FEDPDM_DATA"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a config key in every method (repeatable)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument(
        "--engine", choices=("inprocess", "flower"), default="inprocess",
        help="inprocess: no Ray; flower: flwr run. Results are the same bit for bit",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the clients' stores")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.set_defaults(action=run_experiment)


def run_experiment(options: argparse.Namespace) -> int:
    """Run all cells that have no result yet, then print the table; 1 if a cell failed."""
    if options.jobs < 1:
        raise ConfigError(f"--jobs: must be at least 1, got {options.jobs}")
    suite = load_suite(options.suite)
    suite.profile(options.profile)
    if options.variant and not options.ablation:
        raise ConfigError("--variant: needs --ablation")
    cells = [] if options.table else chosen_cells(suite, options)
    from fedpdm.suites.running import CellResults, check_cells, run_cells

    todo = [cell for cell in cells if CellResults().find(cell) is None]
    with progress_aside(options):
        if cells:
            done = len(cells) - len(todo)
            show(f"{suite.name}, {options.profile}: {len(cells)} cells, {done} done before")
            check_cells(todo, nowhere=options.runs / "not-there")
        failed = run_cells(todo, jobs=options.jobs, say=show)
    if options.json:
        folder = options.results / f"{suite.name}-{options.profile}"
        _print_json(suite, options.profile, folder, options.ablation, failed)
    else:
        from fedpdm.reporting.suite_tables import suite_tables

        width = terminal_width()
        show("\n" + suite_tables(suite, options.profile, options.results, width=width))
    for title, line in failed:
        complain(f"{title} failed: {line}")
    return 1 if failed else 0


def _print_json(
    suite: Suite,
    profile: str,
    folder: Path,
    ablation: str | None,
    failed: Sequence[tuple[str, str]],
) -> None:
    """The results in `folder` or, of an ablation, of its variants."""
    from fedpdm.reporting.results import load_results, load_variants

    facts = {
        "suite": suite.name,
        "profile": profile,
        "results": [] if ablation else load_results(folder),
        "variants": load_variants(
            folder, ablation, suite.ablation(ablation), suite.profile(profile)
        )
        if ablation
        else {},
        "failed": [{"cell": title, "error": line} for title, line in failed],
    }
    print(json_text(facts))


def chosen_cells(suite: Suite, options: argparse.Namespace) -> list[Cell]:
    """Every cell of the call."""
    from fedpdm.suites.planning import plan_cells

    overrides = apply_overrides({}, options.overrides)
    if root := options.data_dir or os.environ.get("FEDPDM_DATA"):
        overrides.setdefault("data", {})["root"] = str(Path(root).expanduser().absolute())
    return plan_cells(
        suite,
        options.profile,
        seeds=_seeds(options.seeds),
        methods=options.method,
        ablation=options.ablation,
        variants=options.variant,
        overrides=overrides,
        runs=options.runs.absolute(),
        results=options.results.absolute(),
        engine=options.engine,
        keep=options.keep,
    )


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds: must be whole numbers with commas, got {text!r}") from None
    if min(seeds) < 0:
        raise ConfigError(f"--seeds: must be at least 0, got {min(seeds)}")
    return seeds
