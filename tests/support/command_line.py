"""The `fedpdm` command in this process, and a run that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedpdm.cli import main
from fedpdm.config import config_to_yaml
from tests.support.federations import small_config

CONFIG = small_config(
    run={"rounds": 1},
    data={"max_images": 120},
    partition={"num_clients": 2},
    coarse={"steps_per_round": 1},
    fine={"steps_per_round": 1},
    sampling={"num_steps": 2},
    evaluation={"num_images": 4},
)


def forget_surroundings(monkeypatch: pytest.MonkeyPatch, folder: Any) -> None:
    """No settings of whoever runs the tests, and a working directory of the test's own."""
    for name in ("FEDPDM_DATA", "FEDPDM_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)


def call(*arguments: Any) -> int:
    """Exit code of `fedpdm ARGUMENTS`."""
    return main([str(argument) for argument in arguments])


class Called(NamedTuple):
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


def called(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Called:
    """As `call`, with what was printed."""
    capsys.readouterr()
    code = call(*arguments)
    return Called(code, *capsys.readouterr())


def without_advice(errors: str) -> str:
    """Standard error of a refused or failed command, without its last line: what to do next."""
    lines = errors.splitlines(keepends=True)
    assert lines[-1].startswith("Next: "), errors
    return "".join(lines[:-1])


def in_process(*arguments: Any) -> int:
    """Exit code of `fedpdm run ARGUMENTS --engine inprocess`."""
    return call("run", *arguments, "--engine", "inprocess")


def run_to_its_end(folder: Path) -> None:
    """A run of `CONFIG` in `out` under the folder."""
    (folder / "small.yaml").write_text(config_to_yaml(CONFIG))
    assert in_process(folder / "small.yaml", "--out", folder / "out", "--quiet") == 0
