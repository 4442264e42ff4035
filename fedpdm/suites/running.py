"""Cells side by side, each in its own process, which writes the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpdm.engines.preflight import check_run
from fedpdm.engines.run_checks import check_named
from fedpdm.evaluation.assessment import check_scoring
from fedpdm.jobs.processes import in_own_processes
from fedpdm.jobs.running import Ended, Failed, Kept, Standing, run_jobs
from fedpdm.storage.files import read_json
from fedpdm.storage.holding import check_not_held
from fedpdm.suites.cell import Cell, finished, run_in_own_process

__all__ = ["CellResults", "check_cells", "run_cells"]

HEARD = ("round ", "client ", "feature network")  # how lines of a cell begin that are passed on


class CellResults:
    """A `Shelf` of cells: the files that they write."""

    def find(self, job: Cell) -> Kept | None:
        """See `fedpdm.jobs.running.Shelf`."""
        return Kept(result=read_json(job.result)) if finished(job) else None

    def keep(self, job: Cell, result: Any, seconds: float) -> None:
        """The cell's own process has done it."""


def check_cells(cells: Sequence[Cell], *, nowhere: Path) -> None:
    """`ConfigError` for what could not be trained or scored; once for each set of images.

    `nowhere` is a run directory that is not there.
    """
    for cell in cells:
        check_named(cell.config)
        check_not_held(cell.working)
    sets = {(c.config.data, c.config.partition, c.config.evaluation): c for c in cells}
    for cell in sets.values():
        check_run(cell.config, nowhere, resume=False)
        clients = range(min(cell.clients, cell.config.partition.num_clients))
        check_scoring(cell.config, clients=clients)


def run_cells(
    cells: Sequence[Cell], *, jobs: int, say: Callable[[str], None]
) -> list[tuple[str, str]]:
    """Run the cells that have no result, `jobs` side by side; (title, last line) of what failed.

    `say` hears of each cell's rounds as they end, and of each cell.
    """

    def hear(cell: Cell, line: str) -> None:
        if line.startswith(HEARD):
            say(f"  {cell.title}: {line}")

    def tell(one: Ended[Cell], standing: Standing) -> None:
        outcome = "FAILED" if isinstance(one.result, Failed) else "done"
        say(
            f"[{standing.number}/{standing.total}] {one.job.title}: {outcome}, "
            f"about {standing.seconds_left / 60:.0f} min left"
        )

    ended = run_jobs(
        cells,
        shelf=CellResults(),
        way=in_own_processes(run_in_own_process, hear=hear, side_by_side=jobs),
        tell=tell,
    )
    return [(one.job.title, one.result.line) for one in ended if isinstance(one.result, Failed)]
