"""Progress: lines with an estimate that moves, on standard error that is no terminal."""

from __future__ import annotations

import re

import pytest

from fedpdm.jobs import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_estimate_moves_and_begins_anew_with_further_work(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling is followed by a search under the same title: its pace is not sampling's."""
    show = progress.count_progress("work", "image")
    for now, done in ((20, 1), (40, 2), (80, 4)):
        clock.now = now
        show(done, 5)
    clock.now = 100
    show(5, 5)
    for now, done in ((101, 1), (115, 15), (140, 40)):
        clock.now = now
        show(done, 100)
    left = [float(x) for x in re.findall(r"([\d.]+) s left", capsys.readouterr().err)]
    assert left == [80, 60, 20, 99, 85, 60]


def test_terminals_get_a_bar_for_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    show = progress.count_progress("work", "image")
    for done in (1, 2, 1, 2):
        show(done, 2)
    shown = capsys.readouterr().err
    assert "1/2" in shown
    assert "-1/2" not in shown
