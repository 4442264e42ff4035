"""How many processors a process counts, and what it tells OpenMP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpdm.processors import available, set_thread_defaults

BOUND = len(os.sched_getaffinity(0))


def counted(folder: Path, files: dict[str, str], own: str) -> int:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    return available(folder, folder / "own")


@pytest.mark.parametrize(
    ("files", "own"),
    [
        ({"cpu.max": "100000 100000\n"}, "0::/\n"),
        ({"jobs/7/cpu.max": "50000 100000\n"}, "0::/jobs/7\n"),
        ({"jobs/cpu.max": "100000 100000\n", "jobs/7/cpu.max": "max 100000\n"}, "0::/jobs/7\n"),
        ({"cpu/a/cpu.cfs_quota_us": "90000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "4:cpu:/a"),
    ],
    ids=["the container's", "its own", "its parent's", "cgroups 1"],
)
def test_no_more_than_its_share_of_time(tmp_path: Path, files: dict[str, str], own: str) -> None:
    assert counted(tmp_path, files, own) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000\n"},
        {"cpu.max": "nonsense"},
        {"cpu.max": "640000000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_all_that_it_is_bound_to_without_a_share(tmp_path: Path, files: dict[str, str]) -> None:
    assert counted(tmp_path, files, "0::/\n") == BOUND
    assert available(tmp_path, tmp_path / "nothing") == BOUND


def test_a_process_bound_to_one_processor_counts_one(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available(tmp_path, tmp_path / "nothing") == 1
    finally:
        os.sched_setaffinity(0, before)


def test_what_the_user_has_set_stands() -> None:
    given = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}
    own = dict(given)
    set_thread_defaults(own)
    assert own == given
    nothing: dict[str, str] = {}
    set_thread_defaults(nothing)
    assert nothing["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["OMP_WAIT_POLICY"]  # of this process, since fedpdm is imported
