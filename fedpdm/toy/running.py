"""The cells of the toy's experiment, run side by side; finished ones are kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpdm.jobs.processes import in_pool, worker_pool
from fedpdm.jobs.running import Ended, Kept, Standing, run_jobs
from fedpdm.storage.files import seal, unseal
from fedpdm.text import json_text
from fedpdm.toy.cells import Cell, run_cell
from fedpdm.toy.figures import ScatterData, scatter_data

__all__ = ["CellLines", "run_cells"]

Rows = list[dict[str, Any]]


class CellLines:
    """A `Shelf` of cells: one file, with a line of JSON for each that is done.

    Lines are added as cells end; one that was cut off by an interruption, or is not as it was
    written, is left out.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Without `resume`, what an earlier run left is removed."""
        self._path = path
        self._rows: dict[str, Rows] = {}
        if not resume:
            path.unlink(missing_ok=True)
        path.touch()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if unseal(entry):
                self._rows[entry["key"]] = entry["rows"]
        if lines and not lines[-1].endswith("\n"):
            self._append("\n")  # what comes next is a line of its own

    def find(self, job: Cell) -> Kept | None:
        """See `fedpdm.jobs.running.Shelf`."""
        rows = self._rows.get(job.key())
        return None if rows is None else Kept(result=rows)

    def keep(self, job: Cell, result: Rows, seconds: float) -> None:
        """See `fedpdm.jobs.running.Shelf`; `FloatingPointError` for a value that is not finite."""
        for row in result:
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"toy: {job.sweep}: {name} is {value}")
        self._rows[job.key()] = result
        self._append(json_text(seal({"key": job.key(), "rows": result}), indent=None) + "\n")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def rows(self, cells: Sequence[Cell]) -> Rows:
        """The rows of these cells, all of which are done, in order."""
        return [row for cell in cells for row in self._rows[cell.key()]]


def run_cells(
    cells: Sequence[Cell], kept: CellLines, *, num_processes: int, say: Callable[[str], None]
) -> tuple[Rows, ScatterData]:
    """Rows of every cell in order, and the first cell's samples for a picture."""
    todo = [cell for cell in cells if kept.find(cell) is None]
    if len(todo) < len(cells):
        say(f"toy: {len(cells) - len(todo)} of {len(cells)} cells are there already")

    def tell(one: Ended[Cell], standing: Standing) -> None:
        done = f"{standing.number}/{standing.total} cells ({one.job.sweep})"
        say(f"toy: {done}, about {standing.seconds_left:.0f} s left")

    with worker_pool(num_processes, library="torch") as pool:
        try:
            scatter = pool.submit(scatter_data, cells[0])
            run_jobs(todo, shelf=kept, way=in_pool(pool, run_cell, cost=_cost), tell=tell)
            samples = scatter.result()
        except BaseException:
            say("toy: stopping; the cells in progress are finished first")
            raise
    return kept.rows(cells), samples


def _cost(cell: Cell) -> float:
    trained = cell.training_steps * 500.0 if cell.fit != "closed" else 0.0
    runs = (len(cell.methods) + len(cell.t0)) * len(cell.samplers) * len(cell.labels)
    return cell.replicates * (cell.samples * cell.dim * runs + trained)
