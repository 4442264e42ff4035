"""`fedpdm experiment`: the methods of a suite at one size, over seeds, and the table of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.terminal import progress_aside
from fedpdm.config import ConfigError, Suite, apply_overrides, load_suite

if TYPE_CHECKING:
    from fedpdm.commands.experiment_cell import Cell

__all__ = ["add_experiment_parser"]

EXAMPLES = """\
examples:
  fedpdm experiment experiments/colored-mnist.yaml --profile smoke
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --jobs 2
  fedpdm experiment experiments/cifar10.yaml --method alone --seeds 0
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --ablation epsilon
  fedpdm experiment experiments/colored-mnist.yaml --profile cpu --ablation epsilon --variant 100
What is done is not repeated; an interrupted experiment goes on where it was.
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
    cells = [] if options.table else plan_cells(suite, options)
    from fedpdm.commands.experiment_cell import finished

    todo = [cell for cell in cells if not finished(cell)]
    with progress_aside(options):
        if cells:
            done = len(cells) - len(todo)
            print(f"{suite.name}, {options.profile}: {len(cells)} cells, {done} done before")
            from fedpdm.engines.preflight import check_run
            from fedpdm.evaluation.assessment import check_scoring

            sets = {(c.config.data, c.config.partition, c.config.evaluation): c for c in todo}
            for cell in sets.values():
                check_run(cell.config, options.runs / "not-there", resume=False)
                clients = range(min(cell.clients, cell.config.partition.num_clients))
                check_scoring(cell.config, clients=clients)
        failed = _run_all(todo, jobs=options.jobs)
    if options.json:
        folder = options.results / f"{suite.name}-{options.profile}"
        _print_json(suite, options.profile, folder, options.ablation, failed)
    else:
        from fedpdm.commands.tables import suite_tables

        print("\n" + suite_tables(suite, options.profile, options.results))
    for title, line in failed:
        print(f"fedpdm: {title} failed: {line}", file=sys.stderr)
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
        "variants": load_variants(folder, ablation, suite.ablation(ablation)) if ablation else {},
        "failed": [{"cell": title, "error": line} for title, line in failed],
    }
    print(json.dumps(facts, indent=1))


def plan_cells(suite: Suite, options: argparse.Namespace) -> list[Cell]:
    """Every cell of the call, seed by seed, so that a table fills evenly."""
    from fedpdm.commands.experiment_cell import Cell

    size = suite.profile(options.profile)
    seeds = _seeds(options.seeds, size.seeds)
    overrides = apply_overrides({}, options.overrides)
    if root := options.data_dir or os.environ.get("FEDPDM_DATA"):
        overrides.setdefault("data", {})["root"] = str(Path(root).expanduser().absolute())
    variants: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
    methods: Sequence[str] = tuple(dict.fromkeys(options.method)) or suite.table
    if options.ablation:
        ablation = suite.ablation(options.ablation)
        chosen = tuple(dict.fromkeys(options.variant)) or tuple(ablation.variants)
        variants = [(name, dict(ablation.variant(name))) for name in chosen]
        methods = tuple(dict.fromkeys(options.method)) or ablation.methods
    cells = []
    for seed in seeds:
        for variant, change in variants:
            if not change:
                variant = None  # the table's own cell, which need not run twice
            for method in methods:
                config = suite.compose(
                    options.profile, method, seed=seed, overrides=[change, overrides],
                    label=f"{options.ablation}{variant}" if variant else "",
                )  # fmt: skip
                cells.append(
                    Cell(
                        suite=suite.name,
                        profile=options.profile,
                        method=method,
                        seed=seed,
                        ablation=options.ablation if variant else None,
                        variant=variant,
                        clients=size.clients,
                        config=config,
                        runs=options.runs.absolute(),
                        results=options.results.absolute(),
                        engine=options.engine,
                        keep=options.keep,
                    )
                )
    return cells


def _seeds(text: str | None, count: int) -> list[int]:
    if text is None:
        return list(range(count))
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds: must be whole numbers with commas, got {text!r}") from None
    if min(seeds) < 0:
        raise ConfigError(f"--seeds: must be at least 0, got {min(seeds)}")
    return seeds


def _run_all(cells: Sequence[Cell], *, jobs: int) -> list[tuple[str, str]]:
    """Run cells, `jobs` side by side; returns (title, last line) of those that failed."""
    failed: list[tuple[str, str]] = []
    waiting, lock = list(cells), threading.Lock()
    started, finished = time.perf_counter(), 0
    children: set[subprocess.Popen[str]] = set()
    stopped = threading.Event()

    def work() -> None:
        nonlocal finished
        while not stopped.is_set():
            with lock:
                if not waiting:
                    return
                cell = waiting.pop(0)
            try:
                line = _run_one(cell, children, threads=max(1, (os.cpu_count() or 1) // jobs))
            except OSError as error:  # no process could be started
                line = str(error)
            with lock:
                if stopped.is_set():
                    return
                finished += 1
                if line is not None:
                    failed.append((cell.title, line))
                pace = (time.perf_counter() - started) / finished
                left = pace * (len(cells) - finished)
                print(
                    f"[{finished}/{len(cells)}] {cell.title}: "
                    f"{'done' if line is None else 'FAILED'}, about {left / 60:.0f} min left",
                    flush=True,
                )

    with futures.ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work) for _ in range(jobs)]
        try:
            futures.wait(workers)
        except KeyboardInterrupt:
            stopped.set()
            told: set[subprocess.Popen[str]] = set()
            while not all(worker.done() for worker in workers):  # none may train on unseen
                for child in set(children) - told:
                    child.send_signal(signal.SIGINT)
                    told.add(child)
                time.sleep(0.05)
            raise
    for worker in workers:
        worker.result()  # raises what it raised
    return failed


def _run_one(cell: Cell, children: set[subprocess.Popen[str]], *, threads: int) -> str | None:
    """Run one cell; its rounds are shown as they end. The line that says why it failed, or None."""
    from fedpdm.commands.experiment_cell import to_text

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen(
        [sys.executable, "-m", "fedpdm.commands.experiment_cell"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    children.add(child)
    assert child.stdin is not None
    assert child.stdout is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or []), daemon=True)
    with child:
        reader.start()
        with contextlib.suppress(BrokenPipeError):  # it says itself why it ended
            child.stdin.write(to_text(cell))
            child.stdin.close()
        for line in child.stdout:
            if line.startswith(("round ", "client ", "feature network")):
                print(f"  {cell.title}: {line.rstrip()}", flush=True)
        code = child.wait()
        reader.join()
    children.discard(child)
    if code == 0:
        return None
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
