"""The runner: it skips finished jobs, keeps each result as its job ends, and estimates the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Ended", "Failed", "Kept", "Shelf", "Standing", "Way", "run_jobs"]

Job = TypeVar("Job")
JobIn = TypeVar("JobIn", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A kept result, and the seconds it took, where these are known."""

    result: Any
    seconds: float | None = None


class Shelf(Protocol[JobIn]):
    """Where results are kept. Everything that decides a job's result identifies the job."""

    def find(self, job: JobIn) -> Kept | None:
        """The kept result of exactly this job; None if it is missing, damaged or of another job."""
        ...

    def keep(self, job: JobIn, result: Any, seconds: float) -> None:
        """Write a result so that an interruption leaves all of it or nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Failed:
    """In place of a result: a line that says why there is none. It is not kept."""

    line: str


Way = Callable[[Sequence[Job]], Generator[tuple[Job, Any], None, None]]
"""How jobs are run: each with its result or `Failed`, as they end; see `processes`."""


@dataclass(frozen=True, kw_only=True)
class Ended(Generic[Job]):
    """A job with its result or `Failed`; `reused` says that it was kept before.

    `seconds` is the time since the job before it ended: its own where jobs run in turn.
    """

    job: Job
    result: Any
    seconds: float
    reused: bool


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How many jobs have ended, of how many, and about how many seconds the rest will take."""

    number: int
    total: int
    seconds_left: float


def run_jobs(
    jobs: Sequence[Job],
    *,
    shelf: Shelf[Job],
    way: Way[Job],
    tell: Callable[[Ended[Job], Standing], None],
) -> list[Ended[Job]]:
    """Run the jobs whose results `shelf` does not have; all results, in the order of `jobs`.

    `tell` is called for each job as it ends, and for a kept one when all before it have ended. Any
    exception, an interruption too, ends the run; finished jobs are kept.
    """
    kept = [shelf.find(job) for job in jobs]
    places = {id(job): place for place, job in enumerate(jobs)}
    ended: list[Ended[Job] | None] = [None] * len(jobs)
    num_left = kept.count(None)
    spent, number = 0.0, 0

    def end(place: int, one: Ended[Job]) -> None:
        nonlocal number
        ended[place] = one
        number += 1
        left = num_left * spent / number
        tell(one, Standing(number=number, total=len(jobs), seconds_left=left))

    def end_kept() -> None:
        """Of the kept ones, those that come before the first that is not done yet."""
        nonlocal spent
        for place, known in enumerate(kept):
            if ended[place] is None:
                if known is None:
                    return
                seconds = known.seconds or 0.0
                spent += seconds  # it tells as much of how long a job takes
                job = jobs[place]
                end(place, Ended(job=job, result=known.result, seconds=seconds, reused=True))

    todo = [job for job, known in zip(jobs, kept, strict=True) if known is None]
    end_kept()
    before = time.perf_counter()
    with contextlib.closing(way(todo)) as running:
        for job, result in running:
            seconds = time.perf_counter() - before
            spent += seconds
            num_left -= 1
            if not isinstance(result, Failed):
                shelf.keep(job, result, seconds)
            end(places[id(job)], Ended(job=job, result=result, seconds=seconds, reused=False))
            end_kept()
            before = time.perf_counter()
    return [one for one in ended if one is not None]
