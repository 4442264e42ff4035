"""Flower gives its SuperLink 15 seconds to start: on a busy machine it is asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpdm.engines import flower
from fedpdm.engines.flowercli import RunFailed
from tests.support.federations import small_config

FLWR = """#!/bin/sh
echo "$1" >> {calls}
if [ "$1" = list ]; then echo '{found}'; exit 0; fi
if [ $(grep -c run {calls}) -le {slow} ]; then
  echo "Failed to start local SuperLink {words} See logs at superlink.log."
fi
"""


@pytest.mark.parametrize(
    ("slow", "words", "asked", "ended"),
    [
        (0, "", 1, "finished:completed"),
        (2, "within 15s.", 3, "finished:completed"),
        (9, "within 15s.", flower.STARTS, "none"),
        (9, ": exited with code 1.", 1, "none"),
    ],
)
def test_a_slow_start_is_tried_again(
    slow: int,
    words: str,
    asked: int,
    ended: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, script = tmp_path / "calls", tmp_path / "flwr"
    found = json.dumps({"runs": [{"pending-at": "1", "status": ended}]})
    script.write_text(FLWR.format(calls=calls, found=found, slow=slow, words=words))
    script.chmod(0o755)
    monkeypatch.setattr(flower, "tool", lambda name: str(script))
    if ended == "none":
        with pytest.raises(RunFailed, match="the run ended as 'none'"):
            flower.run_with_flower(small_config(), tmp_path / "out")
    else:
        flower.run_with_flower(small_config(), tmp_path / "out")
    assert calls.read_text().split() == ["run"] * asked + ["list"]
    told = capsys.readouterr().out.count("Flower's SuperLink was slow to start; once more")
    assert told == asked - 1
