"""The runner of jobs: what is kept, skipped, told and estimated; ways to run; interruptions."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedpdm.jobs.files import JobFiles
from fedpdm.jobs.processes import in_own_processes, in_pool, in_turn, worker_pool
from fedpdm.jobs.running import Ended, Failed, Standing, run_jobs


@dataclass(frozen=True, kw_only=True)
class Square:
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return int(self.settings["number"])


def squares(*numbers: int) -> list[Square]:
    return [Square(name=f"No. {n}", settings={"number": n}) for n in numbers]


def squared(job: Square) -> dict[str, int]:
    return {"square": job.number**2}


class Told:
    """Hears of each job; may stop the run at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.heard: list[tuple[str, bool, int, int]] = []
        self.left: list[float] = []
        self._stop_at = stop_at

    def __call__(self, one: Ended[Square], standing: Standing) -> None:
        self.heard.append((one.job.name, one.reused, standing.number, standing.total))
        self.left.append(standing.seconds_left)
        if len(self.heard) == self._stop_at:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_and_kept_jobs_come_in_their_turn(tmp_path: Path) -> None:
    shelf, made = JobFiles(tmp_path, entry="square"), []

    def work(job: Square) -> dict[str, int]:
        made.append(job.number)
        return squared(job)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(squares(2, 3, 4), shelf=shelf, way=in_turn(work), tell=Told(stop_at=2))
    assert made == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no-2.json", "no-3.json"]
    (tmp_path / "no-2.json").write_text('{"half')
    told = Told()
    ended = run_jobs(squares(2, 3, 4, 5), shelf=shelf, way=in_turn(work), tell=told)
    assert made == [2, 3, 2, 4, 5]
    assert [one.result["square"] for one in ended] == [4, 9, 16, 25]
    assert [one.reused for one in ended] == [False, True, False, False]
    assert told.heard == [
        ("No. 2", False, 1, 4), ("No. 3", True, 2, 4), ("No. 4", False, 3, 4),
        ("No. 5", False, 4, 4),
    ]  # fmt: skip
    assert told.left[-1] == 0.0


def test_another_setting_or_entry_is_another_job(tmp_path: Path) -> None:
    (job,) = squares(2)
    JobFiles(tmp_path, entry="square").keep(job, squared(job), 1.5)
    kept = JobFiles(tmp_path, entry="square").find(job)
    assert kept is not None
    assert (kept.result, kept.seconds) == ({"square": 4}, 1.5)
    other = dataclasses.replace(job, settings={"number": 2, "seed": 1})
    assert JobFiles(tmp_path, entry="square").find(other) is None
    assert JobFiles(tmp_path, entry="cube").find(job) is None
    assert [path.name for path in tmp_path.iterdir()] == ["no-2.json"]  # nothing half written


def test_the_estimate_is_the_pace_so_far(tmp_path: Path) -> None:
    """A kept result's recorded seconds count as if they had been spent now."""
    shelf = JobFiles(tmp_path, entry="square")
    jobs = squares(1, 2, 3)
    shelf.keep(jobs[0], squared(jobs[0]), 100.0)
    told = Told()
    run_jobs(jobs, shelf=shelf, way=in_turn(squared), tell=told)
    assert told.left[0] == pytest.approx(200.0)
    assert told.left[1] == pytest.approx(50.0, abs=5.0)
    assert told.left[2] == 0.0


def test_a_pool_runs_the_costliest_first_and_gives_results_in_order(tmp_path: Path) -> None:
    told = Told()
    with worker_pool(1) as pool:
        way = in_pool(pool, squared, cost=lambda job: job.number)
        ended = run_jobs(
            squares(1, 3, 2), shelf=JobFiles(tmp_path, entry="square"), way=way, tell=told
        )
    assert [one.result["square"] for one in ended] == [1, 9, 4]
    assert {name for name, *_ in told.heard} == {"No. 1", "No. 2", "No. 3"}


def child(job: Square) -> int:
    print("began", job.number)
    if job.number < 0:
        sys.exit(f"first\n{job.number} is negative\n")
    if job.number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


class Nothing:
    """A shelf that is always empty, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def find(self, job: Square) -> None:
        return None

    def keep(self, job: Square, result: Any, seconds: float) -> None:
        self.given.append(job.number)


def test_a_process_that_fails_is_named_and_not_kept() -> None:
    shelf, heard = Nothing(), []
    way = in_own_processes(
        child, hear=lambda job, line: heard.append((job.name, line)), side_by_side=2
    )
    ended = run_jobs(squares(1, -2, 0, 3), shelf=shelf, way=way, tell=lambda *_: None)
    assert [one.result for one in ended] == [
        None, Failed(line="-2 is negative"), Failed(line="exit code -9"), None
    ]  # fmt: skip
    assert sorted(shelf.given) == [1, 3]
    assert {line for _, line in heard} >= {"began -2", "began 1", "began 3"}
    assert ("No. 3", "began 3") in heard
    assert ("No. -2", "-2 is negative") in heard  # on standard error, where progress is shown


def surroundings(job: Square) -> int:
    print(os.getcwd(), os.environ.get("FEDPDM_DATA"), os.environ["OMP_NUM_THREADS"])
    print("first line\nsecond", end="")
    return 0


def test_a_process_has_the_surroundings_of_its_parent_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is forked from one that began earlier, elsewhere."""
    heard: list[str] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("FEDPDM_DATA", name)
        way = in_own_processes(
            surroundings, hear=lambda _, line: heard.append(line), side_by_side=10_000
        )
        run_jobs(squares(1), shelf=Nothing(), way=way, tell=lambda *_: None)
    printed = ("first line", "second")
    assert heard == [f"{tmp_path}/a a 1", *printed, f"{tmp_path}/b b 1", *printed]


def wait_to_be_told(job: Square) -> int:
    place = Path(job.settings["place"])

    def leave(*_: object) -> None:
        place.with_suffix(".told").touch()
        sys.exit(130)

    signal.signal(signal.SIGINT, leave)
    place.touch()
    time.sleep(120)
    return 0


def test_an_interruption_ends_the_processes_and_starts_no_other(tmp_path: Path) -> None:
    """The first process waits to be told; the second job never begins."""
    way = in_own_processes(wait_to_be_told, hear=lambda *_: None, side_by_side=1)
    told = Told()

    def interrupt() -> None:
        while not (tmp_path / "one").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    jobs = [Square(name=n, settings={"place": str(tmp_path / n)}) for n in ("one", "two")]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, shelf=Nothing(), way=way, tell=told)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "one.told"}
    assert told.heard == []
