"""`fedpdm toy`: the method on a Gaussian mixture, measured and held against theory."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpdm.toy.cells import Cell
    from fedpdm.toy.figures import ScatterData

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
LIMIT = 2.3
"""Half-widths of a 95% interval (4.5 standard errors) beyond which a value contradicts theory."""
ENOUGH = 16
"""Replicates from which on an interval is trusted that far out."""


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
        keys = json.dumps(config_keys(ToyConfig), indent=1) if options.json else None
        print(keys or config_reference(ToyConfig))
        return 0
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs: must be at least 1, got {options.jobs}")
    if options.experiment is None:
        config = toy_config_from_mapping({"name": "gmm"}, options.overrides)
    else:
        config = load_toy_config(options.experiment, options.overrides)
    from fedpdm.toy.plan import plan

    started = time.perf_counter()
    cells = plan(config)
    out: Path = options.out or Path(os.environ.get("FEDPDM_RUNS", "runs")) / config.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    if not options.resume:
        (out / "cells.jsonl").unlink(missing_ok=True)
    rows, samples = _run_cells(cells, out, jobs=options.jobs or os.cpu_count() or 1)
    _say("toy: drawing figures ...")
    figures = _draw(rows, samples, cells, out, delta=config.release.delta)
    report = _report(rows)
    facts = {"config": json.loads(json.dumps(_plain(config))), **report, "rows": rows}
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _write_csv(rows, out / "results.csv")
    _say(f"toy: done in {time.perf_counter() - started:.0f} s; {len(figures)} figures, "
         f"results.json and results.csv in {out}")  # fmt: skip
    print(json.dumps(report) if options.json else _text(rows, report))
    return 1 if report["contradictions"] else 0


def _plain(config: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(config)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _start_worker() -> None:
    """One thread per process: they share the processors between them."""
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def _children_ignore_interruptions() -> Iterator[None]:
    """Processes started here leave Ctrl-C, which reaches all of a terminal's, to their parent.

    They inherit the blocked signal. One that comes meanwhile is not lost: it is raised at the end.
    """
    resource_tracker.ensure_running()  # starting it unblocks the signal, so not in between
    came = []
    # A library's thread may take the signal that this one blocks, hence a handler as well.
    previous = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
    if came:
        signal.raise_signal(signal.SIGINT)


def _run_cells(
    cells: Sequence[Cell], out: Path, *, jobs: int
) -> tuple[list[dict[str, Any]], ScatterData]:
    """Rows of every cell in order; finished cells are kept in cells.jsonl and not run again."""
    from fedpdm.toy.cells import run_cell
    from fedpdm.toy.figures import scatter_data

    kept = out / "cells.jsonl"
    done = dict(_finished(kept))
    todo = [cell for cell in cells if cell.key() not in done]
    if len(todo) < len(cells):
        _say(f"toy: {len(cells) - len(todo)} of {len(cells)} cells are there already")
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with (
        kept.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker) as pool,
    ):
        try:
            with _children_ignore_interruptions():
                scatter = pool.submit(scatter_data, cells[0])
                # The longest first, so that no process is left with one at the end.
                ordered = sorted(todo, key=_cost, reverse=True)
                futures = {pool.submit(run_cell, cell): cell for cell in ordered}
            for count, future in enumerate(as_completed(futures), 1):
                cell = futures[future]
                done[cell.key()] = future.result()
                file.write(json.dumps({"key": cell.key(), "rows": done[cell.key()]}) + "\n")
                file.flush()
                spent = time.perf_counter() - started
                left = spent / count * (len(todo) - count)
                _say(f"toy: {count}/{len(todo)} cells ({cell.sweep}), about {left:.0f} s left")
            samples = scatter.result()
        except BaseException:
            _say("toy: stopping; the cells in progress are finished first")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [row for cell in cells for row in done[cell.key()]], samples


def _cost(cell: Cell) -> float:
    trained = cell.training_steps * 500.0 if cell.fit != "closed" else 0.0
    chains = (len(cell.methods) + len(cell.t0)) * len(cell.samplers) * len(cell.labels)
    return cell.replicates * (cell.samples * cell.dim * chains + trained)


def _finished(kept: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Cells of an earlier run; a line cut off by an interruption is left out."""
    if not kept.exists():
        return
    for line in kept.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        yield entry["key"], entry["rows"]


def _draw(
    rows: Sequence[Mapping[str, Any]],
    samples: ScatterData,
    cells: Sequence[Cell],
    out: Path,
    *,
    delta: float,
) -> list[Path]:
    from fedpdm.toy.figures import directions_figure, draw_all, scatter_figure
    from fedpdm.toy.spectra import spectra_at_epsilon

    epsilon = 10.0
    variances, sigma2 = spectra_at_epsilon(epsilon, delta=delta)
    return [
        *draw_all(rows, cells, out, delta=delta),
        *scatter_figure(samples, out),
        *directions_figure(variances, sigma2, out, epsilon=epsilon),
    ]


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def contradictions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measured values of closed-form fits that lie further from theory than chance allows.

    Beyond `LIMIT` half-widths of the 95% interval, plus 2% of the theory for the discretisation.
    """
    found = []
    for row in rows:
        for name in ("w2", "ratio"):
            theory = row.get(f"theory_{name}")
            if theory is None or row["fit"] != "closed" or row["replicates"] < ENOUGH:
                continue
            half = row[f"{name}_high"] - row[name]
            if abs(row[name] - theory) > LIMIT * half + 0.02 * theory:
                found.append(
                    f"{row['sweep']} {row['x']:g} {row['class']} {row['sampler']} {row['method']}: "
                    f"{name} {row[name]:.4g}, theory {theory:.4g}"
                )
    return found


def _report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from fedpdm.toy.plan import slopes

    checked = [
        r
        for r in rows
        if r["fit"] == "closed" and r["method"] == "pfdm" and r["replicates"] >= ENOUGH
    ]
    inside = sum(r["ratio_low"] <= r["theory_ratio"] <= r["ratio_high"] for r in checked)
    return {
        "slopes": slopes(rows),
        "ratios_checked": len(checked),
        "ratios_inside_95": inside,
        "contradictions": contradictions(rows),
    }


def _text(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    lines = [
        "Squared 2-Wasserstein distance to the truth, and its ratio to training alone",
        f"{'sweep':<10}{'x':>7} {'fit':<7}{'sampler':<10}{'class':<9}{'method':<8}"
        f"{'W2^2':>9} {'95% interval':>19}{'theory':>9}  {'ratio':>6} {'95% interval':>15}"
        f"{'theory':>8}",
    ]
    for row in rows:
        if row["method"] == "coarse":
            continue
        theory = "" if row["theory_w2"] is None else f"{row['theory_w2']:.5f}"
        line = (
            f"{row['sweep']:<10}{row['x']:>7g} {row['fit']:<7}{row['sampler']:<10}"
            f"{row['class']:<9}{row['method']:<8}{row['w2']:>9.5f} "
            f"{row['w2_low']:>9.5f}-{row['w2_high']:>9.5f}{theory:>9}"
        )
        if "ratio" in row:
            expected = "" if row["theory_ratio"] is None else f"{row['theory_ratio']:.3f}"
            line += (
                f"  {row['ratio']:>6.3f} {row['ratio_low']:>7.3f}-{row['ratio_high']:>7.3f}"
                f"{expected:>8}"
            )
        lines.append(line)
    for name, slope in report["slopes"].items():
        lines.append(
            f"slope of the error in {name}: {slope['slope']:.4f} ({slope['low']:.4f} to "
            f"{slope['high']:.4f}), closed form {slope['theory']:.4f}"
        )
    lines.append(
        f"{report['ratios_inside_95']} of {report['ratios_checked']} ratios of coarse then fine "
        "have the theory inside their 95% interval"
    )
    lines += [f"CONTRADICTS THE THEORY: {line}" for line in report["contradictions"]]
    return "\n".join(lines)
