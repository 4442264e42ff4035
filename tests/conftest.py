"""Fixtures for all tests, and how they are shared out to workers side by side (`pytest -n 2`).

A file's tests stay together, so that what they share is made once. Tests that start Flower's
processes or Ray (marker `flower`) are one lot: they follow each other in one worker.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread each, in processes that tests start too: sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from xdist.scheduler import LoadGroupScheduling

from tests.support.made_once import made_once

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        if item.get_closest_marker("flower"):
            item.add_marker(pytest.mark.xdist_group("flower"))
    items.sort(key=lambda item: (not item.get_closest_marker("flower"), item.path not in slow))


class FilesAndGroups(LoadGroupScheduling):
    """Tests of a group, or else of a file, go to one worker, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return str(super()._split_scope(nodeid)).split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndGroups:
    config.option.loadscopereorder = False
    return FilesAndGroups(config, log)
