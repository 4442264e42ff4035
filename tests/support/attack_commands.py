"""`fedpdm attack` in this process, planted faults of noise, and what a command says of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedpdm.cli import main
from fedpdm.privacy.mechanism import SeededNoise, SystemNoise
from tests.support.command_line import without_advice

__all__ = [
    "HalfNoise",
    "HalfSeeded",
    "SameNoise",
    "SameSeeded",
    "SlightlyLess",
    "caught",
    "failed",
    "last_line",
    "run",
    "with_known_seeds",
]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """(exit code, what it printed as JSON)."""
    code = main(arguments)
    return code, json.loads(capsys.readouterr().out)


def failed(facts: dict[str, Any]) -> set[str]:
    """Names of the findings that did not pass."""
    return {finding["name"] for finding in facts["findings"] if not finding["passed"]}


def caught(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[set[str], dict[str, Any]]:
    """Of a command that must fail: (names of the findings that did not pass, what it printed)."""
    code, facts = run(arguments, capsys)
    assert code == 1
    return failed(facts), facts


def with_known_seeds(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> list[tuple[int, set[str]]]:
    """(exit code, what did not pass) with noise of seed 12, 11 and 12 known; 11 known."""
    answers = []
    for known in (["11", "12"], ["11"]):
        words = [word for seed in known for word in ("--known-seed", seed)]
        code, facts = run([*arguments, "--seeded", "12", *words], capsys)
        answers.append((code, failed(facts)))
    return answers


def last_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the error line) of a command that is refused."""
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    return code, without_advice(capsys.readouterr().err).strip().splitlines()[-1]


class HalfNoise(SystemNoise):
    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        np.rint(0.5 * out, out=out)


class SlightlyLess(SystemNoise):
    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        np.rint(np.float32(0.97) * out, out=out)


class HalfSeeded(SeededNoise):
    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        np.rint(0.5 * out, out=out)


class SameSeeded(SeededNoise):
    def __init__(self, sequence: np.random.SeedSequence) -> None:
        super().__init__(np.random.SeedSequence(0))


class SameNoise(SystemNoise):
    """Every release has the same noise."""

    def __init__(self) -> None:
        super(SystemNoise, self).__init__(bytes(32))
