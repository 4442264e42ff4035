"""`fedpdm toy`: the method on a Gaussian mixture, measured and held against theory."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import say, terminal_width
from fedpdm.text import json_text

__all__ = ["add_toy_parser"]

DESCRIPTION = """\
The Gaussian-mixture toy (docs/toy.md): release, training, hand-over and samplers are those for
images, and every answer is known in closed form. Writes results.json, results.csv and figures
(PNG, PDF). Exit code 1 if a measured value contradicts the theory.
"""
EXAMPLES = """\
examples:
  fedpdm toy                                     the default experiment, under a minute
  fedpdm toy --out runs/toy --set release.sigma2=5 --set mixture.dim=4
  fedpdm toy experiments/gmm.yaml --set 'sweep.sigma2=[0.5, 50]' --set measure.replicates=256
  fedpdm toy --keys                              every key, default and meaning
"""


def add_toy_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "toy",
        help="the method on a Gaussian mixture, beside its theory",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("experiment", nargs="?", type=Path, help="YAML file; default: defaults")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a key, e.g. release.sigma2=5 (repeatable)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="directory; default: runs/NAME")  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="keep the cells of an earlier run in --out whose settings are the same",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, help="processes; default: one per processor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--keys", action="store_true", help="print every key and end")
    parser.set_defaults(action=run_toy)


def run_toy(options: argparse.Namespace) -> int:
    """The action: 0 if theory holds, 1 if a value contradicts it."""
    from fedpdm.config import (
        ToyConfig,
        config_keys,
        config_reference,
        config_to_yaml,
        load_toy_config,
        toy_config_from_mapping,
    )

    if options.keys:
        keys = json_text(config_keys(ToyConfig)) if options.json else None
        print(keys or config_reference(ToyConfig))
        return 0
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs: must be at least 1, got {options.jobs}")
    if options.experiment is None:
        config = toy_config_from_mapping({"name": "gmm"}, options.overrides)
    else:
        config = load_toy_config(options.experiment, options.overrides)
    from fedpdm.processors import available
    from fedpdm.storage.holding import held
    from fedpdm.toy.plan import plan
    from fedpdm.toy.report import draw_figures, report_text, summarise, write_results
    from fedpdm.toy.running import CellLines, run_cells

    started = time.perf_counter()
    cells = plan(config)
    out: Path = options.out or Path(os.environ.get("FEDPDM_RUNS", "runs")) / config.name
    with held(out):
        (out / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        kept = CellLines(out / "cells.jsonl", resume=options.resume)
        rows, samples = run_cells(cells, kept, num_processes=options.jobs or available(), say=say)
        say("toy: drawing figures ...")
        figures = draw_figures(rows, samples, cells, out, delta=config.release.delta)
        report = summarise(rows)
        write_results(rows, report, config, out)
    say(f"toy: done in {time.perf_counter() - started:.0f} s; {len(figures)} figures, "
         f"results.json and results.csv in {out}")  # fmt: skip
    if options.json:
        print(json_text(report, indent=None))
    else:
        print(report_text(rows, report, width=terminal_width()))
    return 1 if report["contradictions"] else 0
