"""Runs that differ in one key, beside each other: a table, and a figure over the key's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.reporting.page.cells import is_number
from fedpdm.reporting.page.reading import RunFacts, read_run
from fedpdm.reporting.page.tables import comparison_table, mean_distances
from fedpdm.reporting.pictures.sweep_curves import Panel, draw_sweep
from fedpdm.storage.files import write_atomic
from fedpdm.text import markdown, visible

__all__ = ["Comparison", "compare_runs"]

KNOWN = {"heldout_coarse_known": "held-out images", "coarse_known": "training images"}
SHARED_LOSSES = {
    "heldout_coarse_loss": "shared model, held-out",
    "coarse_loss": "shared model, training",
}  # shown where nothing is known: they hardly move on releases
LOSSES = {"fine_loss": "fine models, training"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was written: `table` (Markdown), `figure` (PNG), `text` for a terminal, and `results`,
    for each run its value and numbers."""

    table: Path
    figure: Path
    text: str
    results: list[dict[str, Any]]


def compare_runs(base: Path, key: str, runs: Mapping[str, Path]) -> Comparison:
    """Write `sweep.md` and `sweep.png` under `base`, of finished runs by the value of `key`.

    `ConfigError` or `StoreError`, one line, for a run that cannot be read.
    """
    facts = {value: read_run(path) for value, path in runs.items()}
    table = comparison_table([*facts.values()], [f"{key} = {value}" for value in facts])
    rows = [[*map(str, row)] for row in table.rows]
    heads = ["", *(f"{key} = {value}" for value in facts)]
    lines = [f"# {markdown(base.name)}: {markdown(key)}", ""]
    lines += [f"| {' | '.join(map(markdown, cells))} |" for cells in (heads, *rows)]
    lines.insert(3, f"|{'---|' * len(heads)}")
    lines += ["", "![what the runs came to, by the key's value](sweep.png)", ""]
    write_atomic(base / "sweep.md", "\n".join(lines).encode())
    results = [
        {"value": value, "run": str(runs[value]), **_numbers(f)} for value, f in facts.items()
    ]
    draw_sweep(base / "sweep.png", [*facts], _panels(results), key=key)
    return Comparison(
        table=base / "sweep.md",
        figure=base / "sweep.png",
        text=_aligned([heads, *rows]),
        results=results,
    )


def _numbers(facts: RunFacts) -> dict[str, Any]:
    """Epsilon, what the shared model knows in percent (where that is clear), the last losses, and
    the mean distances over clients, by name."""
    last = facts.rounds[-1] if facts.rounds else {}
    known = {name: last[key] for key, name in KNOWN.items() if is_number(last.get(key))}
    shown = LOSSES if known else SHARED_LOSSES | LOSSES
    return {
        "epsilon": (facts.privacy or {}).get("epsilon"),
        "knows": {name: 100.0 * share for name, share in known.items() if abs(share) <= 1.0},
        "losses": {name: last[key] for key, name in shown.items() if is_number(last.get(key))},
        "distances": mean_distances(facts),
    }


def _panels(results: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel of distances where there are any, one of knowledge, and one of losses."""
    panels = []
    for part, title, label in (
        ("distances", "Distance of samples, lower is better", "Frechet distance"),
        ("knows", "What the shared model knows of images", "%"),
        ("losses", "Losses in the last round", "loss"),
    ):
        names = list(dict.fromkeys(name for each in results for name in each[part]))
        lines = {name: [each[part].get(name) for each in results] for name in names}
        if lines:
            panels.append(Panel(title=title, label=label, lines=lines))
    return panels


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    )
