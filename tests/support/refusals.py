"""Running the command line where it should refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpdm.config import config_to_yaml
from tests.support.command_line import call, forget_surroundings, without_advice
from tests.support.federations import small_config

CONFIG = small_config(data={"max_images": None})


def tree(folder: Path) -> dict[str, bytes]:
    """Every path under a folder, with the contents of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


class Refuser:
    """A folder with an experiment in it, where every command is to be refused without a trace."""

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forget_surroundings(monkeypatch, folder)
        self.folder, self.out = folder, folder / "out"
        self.experiment = folder / "digits.yaml"
        self.experiment.write_text(config_to_yaml(CONFIG))
        self._capsys = capsys

    def line(self, *arguments: Any) -> str:
        """The line of a refusal, before advice: exit code 2, no other output, nothing written."""
        before = tree(self.folder)
        self._capsys.readouterr()
        assert call(*arguments) == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        said = without_advice(printed.err)
        assert said.startswith("fedpdm: ")
        assert said.endswith("\n")
        assert said.count("\n") == 1
        assert tree(self.folder) == before
        return said.strip()

    def run_line(self, *settings: str, flags: tuple[str, ...] = ()) -> str:
        """`line` of a run of the experiment with some keys set."""
        sets = [word for setting in settings for word in ("--set", setting)]
        return self.line(
            "run", self.experiment, "--out", self.out, "--engine", "inprocess", *sets, *flags
        )
