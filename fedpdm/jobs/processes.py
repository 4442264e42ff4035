"""Ways to run jobs: in turn in this process, in a pool of processes, in a process each.

An interruption (Ctrl-C) reaches every process of a terminal. Processes of a pool ignore it; their
parent raises it when they have ended. A job's own process is sent one and waited for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from fedpdm.jobs.running import Failed, Way

__all__ = [
    "children_ignore_interruptions",
    "in_own_processes",
    "in_pool",
    "in_turn",
    "worker_pool",
]

Job = TypeVar("Job")


def in_turn(work: Callable[[Job], Any]) -> Way[Job]:
    """One job after the other, here; `work` gives a job's result."""

    def way(jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        for job in jobs:
            yield job, work(job)

    return way


@contextlib.contextmanager
def worker_pool(num_processes: int) -> Iterator[futures.Executor]:
    """Processes with one thread each. If the block raises, jobs that have not begun are dropped."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(
        num_processes, mp_context=spawn, initializer=_start_worker
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    """One thread per process: they share the processors between them."""
    import torch

    torch.set_num_threads(1)


def in_pool(
    pool: futures.Executor, work: Callable[[Job], Any], *, cost: Callable[[Job], float]
) -> Way[Job]:
    """Side by side in a `worker_pool`, by falling `cost`, so that none is left at the end.

    `work` and the jobs go to other processes, so they are pickled. What a job raises is raised.
    """

    def way(jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        with children_ignore_interruptions():
            running = {pool.submit(work, job): job for job in sorted(jobs, key=cost, reverse=True)}
        for future in futures.as_completed(running):
            yield running[future], future.result()

    return way


@contextlib.contextmanager
def children_ignore_interruptions() -> Iterator[None]:
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


def in_own_processes(
    command: Sequence[str],
    *,
    text: Callable[[Job], str],
    hear: Callable[[Job, str], None],
    side_by_side: int,
) -> Way[Job]:
    """Each in a process of its own, which may fail: `Failed` with the last line of its errors.

    `command` is given the job's `text` on standard input; `hear` gets each line that it prints.
    A job's result is None. The processes share the processors.
    """
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def way(jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        children: set[subprocess.Popen[str]] = set()
        stopped = threading.Event()

        def work(job: Job) -> Failed | None:
            if stopped.is_set():
                return None
            try:
                return _run_child(
                    command, text(job), lambda line: hear(job, line), children, environment
                )
            except OSError as error:  # no process could be started
                return Failed(line=str(error))

        with futures.ThreadPoolExecutor(side_by_side) as pool:
            running = {pool.submit(work, job): job for job in jobs}
            try:
                for future in futures.as_completed(running):
                    yield running[future], future.result()
            except BaseException:
                stopped.set()
                told: set[subprocess.Popen[str]] = set()
                while not all(future.done() for future in running):  # none may train on unseen
                    for child in set(children) - told:
                        child.send_signal(signal.SIGINT)
                        told.add(child)
                    time.sleep(0.05)
                raise

    return way


def _run_child(
    command: Sequence[str],
    text: str,
    hear: Callable[[str], None],
    children: set[subprocess.Popen[str]],
    environment: dict[str, str],
) -> Failed | None:
    """Run one process; it is in `children` while it runs."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
            child.stdin.write(text)
            child.stdin.close()
        for line in child.stdout:
            hear(line.rstrip())
        code = child.wait()
        reader.join()
    children.discard(child)
    if code == 0:
        return None
    lines = [line.strip() for line in errors if line.strip()]
    return Failed(line=lines[-1] if lines else f"exit code {code}")
