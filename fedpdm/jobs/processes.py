"""Ways to run jobs: in turn in this process, in a pool of processes, in a process each.

Processes are forked from one that has imported the libraries, so they start at once. An
interruption (Ctrl-C) reaches every process of a terminal. Processes of a pool ignore it; their
parent raises it when they have ended. A job's own process is sent one and waited for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any, Generic, TypeVar

from fedpdm.jobs.running import Failed, Way
from fedpdm.processors import available

__all__ = [
    "OwnProcess",
    "in_own_processes",
    "in_pool",
    "in_turn",
    "interruptions_blocked",
    "worker_pool",
]

Job = TypeVar("Job")
LIBRARIES = "fedpdm.jobs.libraries"  # all that training and Flower need


def in_turn(work: Callable[[Job], Any]) -> Way[Job]:
    """One job after the other, here; `work` gives a job's result."""

    def way(jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        for job in jobs:
            yield job, work(job)

    return way


@contextlib.contextmanager
def worker_pool(num_processes: int, *, library: str = LIBRARIES) -> Iterator[futures.Executor]:
    """Processes with one thread each. If the block raises, jobs that have not begun are dropped.

    `library` is the module that is imported before all others (by the first call here).
    """
    with futures.ProcessPoolExecutor(
        num_processes, mp_context=_forks(library), initializer=_start_worker
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
        with interruptions_blocked():  # the first starts the processes: all of them, or none
            running = {pool.submit(work, job): job for job in sorted(jobs, key=cost, reverse=True)}
        for future in futures.as_completed(running):
            yield running[future], future.result()

    return way


@functools.cache
def _forks(library: str = LIBRARIES) -> ForkServerContext:
    """Makes processes that begin with the library imported, and with Ctrl-C blocked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([library])
    with interruptions_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def interruptions_blocked() -> Iterator[None]:
    """Processes started here inherit the blocked Ctrl-C. One that comes is raised at the end."""
    resource_tracker.ensure_running()  # starting it unblocks the signal, so not in between
    came: list[int] = []
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
    work: Callable[[Job], int], *, hear: Callable[[Job, str], None], side_by_side: int
) -> Way[Job]:
    """Each in a process of its own, which may fail: `Failed` with the last line of its errors.

    `work` is pickled, as the jobs are, and gives an exit code; `hear` gets each line that it
    prints, on both outputs. A job's result is None. The processes share the processors.
    """
    threads = max(1, available() // side_by_side)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def started(job: Job) -> OwnProcess[Job]:
        return OwnProcess(job, work, environment=environment, hear=lambda text: hear(job, text))

    def way(jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        waiting, running = list(jobs), list[OwnProcess[Job]]()
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    running.append(started(waiting.pop(0)))
                pipes = {pipe: process for process in running for pipe in process.pipes}
                for pipe in connection.wait(list(pipes)):
                    assert isinstance(pipe, connection.Connection)
                    pipes[pipe].read(pipe)
                for process in [one for one in running if not one.pipes]:
                    code = process.end()
                    running.remove(process)
                    yield process.job, _outcome(code, process.errors)
        except BaseException:
            for process in running:  # none may train on unseen
                process.interrupt()
            for process in running:
                process.end()
            raise

    return way


def _outcome(code: int, errors: Sequence[str]) -> Failed | None:
    if code == 0:
        return None
    lines = [text.strip() for text in errors if text.strip()]
    return Failed(line=lines[-1] if lines else f"exit code {code}")


class OwnProcess(Generic[Job]):
    """A job at work in another process, with what that prints."""

    def __init__(
        self,
        job: Job,
        work: Callable[[Job], int],
        *,
        environment: Mapping[str, str],
        hear: Callable[[str], None],
    ) -> None:
        """`hear` gets each line that is printed, also those on standard error, where progress is
        shown; these are in `errors` too."""
        self.job = job
        self.errors: list[str] = []
        output, printed = connection.Pipe(duplex=False)
        complaints, complained = connection.Pipe(duplex=False)
        self._process = _forks().Process(
            target=_own_process,
            args=(work, job, printed, complained, dict(environment), os.getcwd()),
        )
        self._process.start()
        printed.close()
        complained.close()

        def hear_error(text: str) -> None:
            self.errors.append(text)
            hear(text)

        self._open = {output: _Lines(hear), complaints: _Lines(hear_error)}

    @property
    def pipes(self) -> list[connection.Connection]:
        """Those of its output that are still open: none if it has ended."""
        return list(self._open)

    def read(self, pipe: connection.Connection) -> None:
        """What there is to read from one of the `pipes`; waits until there is anything."""
        part = os.read(pipe.fileno(), 1 << 16)
        self._open[pipe].add(part)
        if not part:
            del self._open[pipe]
            pipe.close()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """As Ctrl-C does, or by another signal."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def end(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        while self._open:
            for pipe in connection.wait(self.pipes):
                assert isinstance(pipe, connection.Connection)
                self.read(pipe)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


class _Lines:
    """Passes lines on as they are complete."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear, self._rest = hear, b""

    def add(self, part: bytes) -> None:
        """Empty at the end."""
        *lines, self._rest = (self._rest + part + b"\n" * (not part)).split(b"\n")
        for text in lines if part else [one for one in lines if one]:
            self._hear(text.decode(errors="replace").rstrip())


def _own_process(
    work: Callable[[Job], int],
    job: Job,
    printed: connection.Connection,
    complained: connection.Connection,
    environment: dict[str, str],
    directory: str,
) -> None:
    """What the process does: the job, with its output in the pipes."""
    for number, pipe in ((1, printed), (2, complained)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    import torch

    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.exit(work(job))
