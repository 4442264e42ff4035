"""What samples and Gaussians are worth to the client's own classifier, and how training's length
trades precision for recall: for cells whose methods share own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.config import Suite
from fedpdm.reporting.pictures import Panel, Series, draw_panels
from fedpdm.reporting.results import Column, cell_text, rows

__all__ = ["draw_lengths", "use_table"]

HEAD = ("trained on", "seeds", "minority classes", "all classes")
ROWS = {
    "own": "own images alone",
    "samples": "own images and samples: {}",
    "gaussians": "no network: the Gaussians of {} as a classifier",
    "together": "own images alone, and the Gaussians of {}",
    "others": "own images and real images of others",
}
LARGEST = 4  # lines of a panel


def use_table(
    suite: Suite, methods: Sequence[str], found: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]] | None:
    """(head, rows); None where no result has a classifier's accuracies."""
    body = []
    for kind, words in ROWS.items():
        columns = [
            Column(title=of, path=("clients", "use", kind, of), scale=100, digits=1)
            for of in ("minority", "mean")
        ]
        for row in rows(found, methods, columns):
            if row.cells[0]:
                title = words.format(suite.method(row.method).title)
                values = [cell_text(cells, 1) for cells in row.cells]
                body.append([title, str(len(row.cells[0])), *values])
    return (list(HEAD), body) if body else None


def draw_lengths(
    suite: Suite, methods: Sequence[str], found: Sequence[Mapping[str, Any]], stem: Path
) -> bool:
    """Precision against recall of minority classes, a point per method and length of training,
    means over seeds and clients; whether there were any."""
    lines = []
    for method in methods:
        points: dict[float, list[tuple[float, float]]] = {}
        for result in found:
            for client in result["clients"] if result["method"] == method else ():
                for each in client.get("lengths", ()):
                    scores, name = each["scores"], f"[{result['extractor']}]"
                    pair = tuple(
                        scores[f"{each['group']}_{k}{name}"] for k in ("recall", "precision")
                    )
                    points.setdefault(each["share"], []).append(pair)
        if points:
            means = np.array([np.mean(points[share], axis=0) for share in sorted(points)])
            lines.append((suite.method(method).title, means))
    if not lines:
        return False
    panels = []
    for start in range(0, len(lines), LARGEST):
        part = lines[start : start + LARGEST]
        series = [
            Series(name=title, x=means[:, 0], y=means[:, 1], low=means[:, 1], high=means[:, 1],
                   curve_x=means[:, 0], curve_y=means[:, 1])
            for title, means in part
        ]  # fmt: skip
        panels.append(
            Panel(title="", x_label="recall", y_label="precision", series=series, log_x=False)
        )
    draw_panels(
        stem, panels[:LARGEST], title="Minority classes, by length of training",
        note="Lines run from an eighth of the own models' steps to all of them.",
    )  # fmt: skip
    return True
