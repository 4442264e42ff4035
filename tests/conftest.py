"""Fixtures for all tests, and how they are shared out to workers side by side (`pytest -n 2`).

A file's tests stay together, so that what they share is made once. Files with tests that start
Flower's processes or Ray (marker `flower`) are one lot: they follow each other in one worker. So
are those whose processes are forked from one that takes seconds to begin.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# One thread each, in processes that tests start too: sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.support.made_once import made_once
from tests.support.quick_runs import quick_runs

# Whose tests look at a run's pictures, or hand them to readers.
SHOW_PICTURES = {"artefacts", "commands", "deployment", "docs", "reporting"}

torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, and children inherit that; interruptions are
# tested all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Whatever the code under test sets, fixtures of the next test have one thread again."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_runs_are_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs of a test's own are quick. Fixtures of modules, and of all, make theirs in full."""
    with quick_runs(pictures=request.path.parent.name in SHOW_PICTURES):
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tests.support.command_line.CONFIG` that `fedpdm run` has brought to its end.

    It is only read; whoever writes does so in a copy.
    """
    from tests.support.command_line import run_to_its_end

    return made_once(tmp_path_factory, "finished-run", run_to_its_end) / "out"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tests.support.federations.small_config()` in process; it is only read."""
    from fedpdm.engines.inprocess import run_in_process
    from tests.support.federations import small_config

    def make(folder: Path) -> None:
        run_in_process(small_config(), folder / "out")

    return made_once(tmp_path_factory, "small-run", make) / "out"


FORKS = re.compile(r"support\.apart|release_processes|OwnProcess|worker_pool")
# Fixtures that take seconds: whole runs, trained networks, processes, a browser.
SLOW_FIXTURES = {
    "assessed", "browser", "finished", "finished_run", "old", "page", "processes", "root",
    "small_run", "trained", "warm", "world",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is slow if its fixtures are. What takes longest comes first, so that no worker is left
    alone with it at the end."""
    for item in items:
        if isinstance(item, pytest.Function) and SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    flower = {item.path for item in items if item.get_closest_marker("flower")}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in flower, item.path not in slow))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and collected tests stay to the end: nobody looks among them for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class FilesTogether(LoadScopeScheduling):
    """A file's tests go to one worker, in their order; files with Flower's are one lot, and so are
    those that fork processes from one that has imported the libraries."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return _lot(self.config.rootpath / file) or file


@functools.cache
def _lot(file: Path) -> str | None:
    text = file.read_text(encoding="utf-8")
    if "pytest.mark.flower" in text:
        return "flower"
    return "forks" if FORKS.search(text) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether:
    config.option.loadscopereorder = False
    return FilesTogether(config, log)
