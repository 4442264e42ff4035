"""A folder that one process works in: who is named, and what is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fedpdm.config import ConfigError, config_to_yaml
from fedpdm.engines.inprocess import run_in_process
from fedpdm.jobs.processes import OwnProcess
from fedpdm.storage.holding import HOLD, check_not_held, held
from tests.support.apart import start_apart, wait_until
from tests.support.command_line import call
from tests.support.federations import small_config


def hold(folder: str) -> int:
    with held(Path(folder)):
        print("there")
        time.sleep(60)
    return 0


def holder(folder: Path) -> OwnProcess[str]:
    """A process that has the folder."""
    heard: list[str] = []
    process = OwnProcess(str(folder), hold, environment=os.environ, hear=heard.append)
    while not heard:
        process.read(process.pipes[0])
    return process


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        words = rf"^{folder}: is in use by process \d+ since \d\d:\d\d \(.*\); wait until it ends$"
        with pytest.raises(ConfigError, match=words), held(folder):
            pass
        with pytest.raises(ConfigError, match=r"is in use by process \d+"):
            check_not_held(folder)
    finally:
        process.interrupt(signal.SIGKILL)
        assert process.end() == -9
    assert (folder / HOLD).exists()  # left behind, and held by nobody
    check_not_held(folder)
    with held(folder):
        assert (folder / HOLD).exists()
    assert not (folder / HOLD).exists()


def test_nothing_is_left_of_a_folder_that_was_not_used(tmp_path: Path) -> None:
    with held(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with held(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]


def test_a_lock_without_words_is_respected(tmp_path: Path) -> None:
    """Its holder has not written who it is yet."""
    with held(tmp_path):
        (tmp_path / HOLD).write_text("")
        with pytest.raises(ConfigError, match=r"is in use by another process"):
            check_not_held(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_running_is_not_resumed_attacked_or_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "out"
    long = {"steps_per_round": 100_000, "checkpoint_every": 5}
    config.write_text(config_to_yaml(small_config(fine=long)))
    process = start_apart("run", config, "--engine", "inprocess", "--out", out)
    try:
        wait_until(lambda: list(out.glob("clients/*/partial/*")), process)
        for command in (
            ["run", "--resume", "--out", out, "--engine", "inprocess"],
            ["run", "--resume", "--out", out],
            ["attack", out, "--out", tmp_path / "attack"],
            ["evaluate", out],
        ):
            assert call(*command) == 2
            error = capsys.readouterr().err
            assert f"{out}: is in use by process" in error
            assert "fedpdm" in error
        with pytest.raises(ConfigError, match="is in use by process"):
            run_in_process(small_config(fine=long), out, resume=True)
    finally:
        process.interrupt()
        assert process.end() == 130
    assert not (tmp_path / "attack").exists()
