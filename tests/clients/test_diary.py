"""What a node tells its owner of its rounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clients.diary import round_words
from tests.support.deployments import deployment


def test_a_round_in_words() -> None:
    metrics = {"coarse_known": 0.031, "coarse_loss": 1.0001, "seconds": 12, "fine_images": 8}
    words = round_words(3, metrics, num_bytes=1_640_000, fine_loss=0.01234)
    assert words == "round 3, shared model knows 3.1%, fine loss 0.0123, 1.6 MB sent, 12 s"
    again = round_words(3, {"replayed": True}, num_bytes=0, fine_loss=float("nan"))
    assert again == "round 3 again, as before, 0.0 MB sent"


@pytest.mark.slow
def test_a_node_says_what_it_released_and_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = deployment(tmp_path)
    for round in (1, 2):
        federation.ask(0, "train", {"round": round, "phase": "coarse"})
    federation.ask(0, "evaluate", {"round": 2, "final": False})
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("client 0: ")]
    assert re.fullmatch(r"client 0: released (\d+) images for the first time, of \1", said[0])
    for round, line in ((1, said[1]), (2, said[2])):
        assert re.fullmatch(
            rf"client 0: round {round}, shared model knows -?\d+\.\d%, fine loss \d+\.\d{{4}}, "
            r"\d+\.\d MB sent, \d+ s",
            line,
        )
    assert re.fullmatch(r"client 0: round 2 evaluated: held-out -?\d+\.\d%", said[3])
    assert len(said) == 4
