"""Results of experiments: one JSON file per method and seed, and the tables made from them.

A result is `experiments/results/SUITE-PROFILE/METHOD-seedK.json`. An ablation's results lie one
folder deeper, in `SUITE-PROFILE/ABLATION/VARIANT/`; a variant that changes nothing uses the table's
own result. Further draws of the releases' noise are `METHOD-seedK-drawD.json`, those of the table's
own runs in `SUITE-PROFILE/draws/`. Beside each lies an .npz with some samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.config.suite import Ablation, Profile
from fedpdm.storage.files import read_json

__all__ = [
    "DRAWS",
    "Column",
    "Row",
    "cell_text",
    "gap_closed",
    "load_results",
    "load_variants",
    "rows",
]

MISSING = "-"
DRAWS = "draws"  # folder, beside those of ablations


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of the table: where it stands in a result, and how it is printed."""

    title: str
    path: tuple[str, ...]
    digits: int = 2
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """All results of one method; `cells` hold the values of the seeds that were run."""

    method: str
    seeds: tuple[int, ...]
    cells: tuple[tuple[float, ...], ...]


def load_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, by method and seed; `ValueError` naming a file that is damaged."""
    found = []
    for path in sorted(folder.glob("*-seed*.json")):
        found.append(read_json(path))
    return found


def load_variants(
    folder: Path, name: str, ablation: Ablation, profile: Profile
) -> dict[str, list[dict[str, Any]]]:
    """Of each variant, the results of the ablation's methods, in the order of the suite.

    Where the profile has draws of the noise, those of its first seed.
    """
    seed = profile.first_seed if profile.draws > 1 else None
    found = {}
    for variant in ablation.variants:
        own = (folder / name / variant,)
        folders = own if ablation.variant(variant) else (folder, folder / DRAWS)
        found[variant] = [
            r
            for where in (folders if seed is not None else folders[:1])
            for r in load_results(where)
            if r["method"] in ablation.methods and seed in (None, r["seed"])
        ]
    return found


def rows(
    results: Iterable[Mapping[str, Any]], methods: Sequence[str], columns: Sequence[Column]
) -> list[Row]:
    """One row per method, also for those that were not run; a value is the mean over clients."""
    kept = sorted(results, key=lambda result: (result["seed"], result.get("draw", 0)))
    table = []
    for method in methods:
        own = [result for result in kept if result["method"] == method]
        cells = tuple(
            tuple(v * column.scale for v in (_value(r, column.path) for r in own) if v is not None)
            for column in columns
        )
        table.append(Row(method=method, seeds=tuple(r["seed"] for r in own), cells=cells))
    return table


def _value(result: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """The number at `path`; of a list (clients) the mean; None where there is none."""
    nodes: list[Any] = [result]
    for name in path:
        below: list[Any] = []
        for node in nodes:
            child = node.get(name) if isinstance(node, Mapping) else None
            below += child if isinstance(child, list) else [child]
        nodes = [node for node in below if node is not None]
    numbers = [float(node) for node in nodes if isinstance(node, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def cell_text(values: Sequence[float], digits: int, *, error: bool = False) -> str:
    """`mean ± std` (divisor n - 1), the value alone for one seed, `-` where nothing was run.

    With `error` it is the standard error of the mean: std / sqrt(n).
    """
    if not values:
        return MISSING
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    spread /= math.sqrt(len(values)) if error else 1.0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def gap_closed(
    alone: Sequence[float], method: Sequence[float], central: Sequence[float]
) -> float | None:
    """(alone - method) / (alone - centralised) of the means: 1 is as good as centralised."""
    if not (alone and method and central):
        return None
    a, m, c = (sum(values) / len(values) for values in (alone, method, central))
    return (a - m) / (a - c) if a != c else None
