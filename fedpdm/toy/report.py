"""The report of the toy's experiment: files, figures, a table, and contradictions of theory."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpdm.config import ToyConfig
from fedpdm.text import json_text, table_lines
from fedpdm.toy.cells import Cell
from fedpdm.toy.figures import (
    ScatterData,
    directions_figure,
    draw_all,
    scatter_figure,
)
from fedpdm.toy.plan import slopes
from fedpdm.toy.spectra import spectra_at_epsilon

__all__ = ["contradictions", "draw_figures", "report_text", "summarise", "write_results"]

LIMIT = 2.3
"""Half-widths of a 95% interval (4.5 standard errors) beyond which a value contradicts theory."""
ENOUGH = 16
"""Replicates from which on an interval is trusted that far out."""


def draw_figures(
    rows: Sequence[Mapping[str, Any]],
    samples: ScatterData,
    cells: Sequence[Cell],
    out: Path,
    *,
    delta: float,
) -> list[Path]:
    """Every figure of the experiment, as PNG and PDF in `out`."""
    epsilon = 10.0
    variances, sigma2 = spectra_at_epsilon(epsilon, delta=delta)
    return [
        *draw_all(rows, cells, out, delta=delta),
        *scatter_figure(samples, out),
        *directions_figure(variances, sigma2, out, epsilon=epsilon),
    ]


def write_results(
    rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], config: ToyConfig, out: Path
) -> None:
    """`results.json`, with the config and the summary, and `results.csv`."""
    plain = json.loads(json_text(dataclasses.asdict(config), indent=None))
    facts = {"config": plain, **report, "rows": rows}
    (out / "results.json").write_text(json_text(facts) + "\n", encoding="utf-8")
    _write_csv(rows, out / "results.csv")


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


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Slopes of the error, how many ratios have theory in their interval, and `contradictions`."""
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


HEAD = ("cell", "method", "W2^2", "95% interval", "theory", "ratio", "95% interval", "theory")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the printed table, under `HEAD`."""
    theory = "" if row["theory_w2"] is None else f"{row['theory_w2']:.5f}"
    interval = f"{row['w2_low']:.5f}-{row['w2_high']:.5f}"
    where = f"{row['sweep']} {row['x']:g}, {row['fit']}, {row['sampler']}, {row['class']}"
    cells = [where, row["method"], f"{row['w2']:.5f}", interval, theory, "", "", ""]
    if "ratio" in row:
        expected = "" if row["theory_ratio"] is None else f"{row['theory_ratio']:.3f}"
        interval = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
        cells[5:] = [f"{row['ratio']:.3f}", interval, expected]
    return cells


def report_text(
    rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], *, width: int | None = None
) -> str:
    """The rows as a table of at most `width` columns, and the lines of `summarise`."""
    body = [_cells(row) for row in rows if row["method"] != "coarse"]
    lines = [
        "Squared 2-Wasserstein distance to the truth, and its ratio to training alone",
        *table_lines(HEAD, body, width=width),
    ]
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
