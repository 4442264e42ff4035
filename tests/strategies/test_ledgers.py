"""A coordinator notices a participant whose store was set back: its ledger may only grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpdm.storage.files import StoreError
from strategies.ledgers import MOST, SeenLedgers
from strategies.roster import ClientFailure
from tests.strategies.test_roster import roster_of
from tests.support.strategy_fakes import FakeProxy, drift, fedavg_server, update

A, B, C = ("a" * 16, "b" * 16, "c" * 16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledgers.json"


def test_a_ledger_may_grow_and_nothing_else(path: Path) -> None:
    assert SeenLedgers(path).check(0, "") is None
    for marks in (A, A + B, A + B, A + B + C):
        assert SeenLedgers(path).check(0, marks) is None
    for marks, words in (
        (A + B, "its ledger has 2 records where 3 were seen: its store was set back"),
        ("", "its ledger has 0 records where 3 were seen"),
        (None, "its ledger has 0 records where 3 were seen"),
        (7, "its ledger has 0 records where 3 were seen"),
        ("x" * 64, "its ledger has 0 records where 3 were seen"),
        (A + B + C + "d", "its ledger has 0 records where 3 were seen"),
        (A + C, "its ledger is not the one that was seen before: its store was set back"),
        (A + C + B + B, "its ledger is not the one that was seen before"),
        (A * (MOST // 16 + 1), "its ledger has 0 records where 3 were seen"),
    ):
        line = SeenLedgers(path).check(0, marks)
        assert line is not None
        assert line.startswith(words), (marks, line)
        assert str(path) in line
    assert json.loads(path.read_text()) == {"0": A + B + C}
    assert SeenLedgers(path).check(1, C) is None  # each has its own
    assert json.loads(path.read_text()) == {"0": A + B + C, "1": C}


def test_without_a_file_nothing_is_noticed(path: Path) -> None:
    seen = SeenLedgers(None)
    assert seen.check(0, A) is None
    assert seen.check(0, B) is None
    assert not path.parent.exists()


def test_a_damaged_file_is_named(path: Path) -> None:
    path.parent.mkdir()
    for text in ("[]", '{"0": 3}', "{"):
        path.write_text(text)
        with pytest.raises(StoreError, match=str(path)):
            SeenLedgers(path).check(0, A)


class Shows(FakeProxy):
    """A node that shows these marks."""

    def __init__(self, client_id: int, marks: str) -> None:
        super().__init__(client_id)
        self.properties["ledger"] = marks


def test_a_participant_that_was_set_back_is_left_out(path: Path) -> None:
    first, manager = roster_of(*(Shows(k, A + B) for k in range(3)), ledgers=path)
    assert len(first.choose(1, manager)) == 3
    nodes = [Shows(0, A + B + C), Shows(1, A), Shows(2, A + C)]
    second, manager = roster_of(*nodes, ledgers=path)
    for round in (1, 2):
        assert [proxy.cid for proxy in second.choose(round, manager)] == ["n0"]
        lines = [line.partition(": its store")[0] for line in second.problems]
        assert lines == [
            "client 1: its ledger has 1 records where 2 were seen",
            "client 2: its ledger is not the one that was seen before",
        ]
    nodes[1].properties["ledger"] = A + B  # restored
    assert [proxy.cid for proxy in second.choose(3, manager)] == ["n0", "n1"]


def test_such_a_participant_ends_a_run_where_failures_do(path: Path) -> None:
    SeenLedgers(path).check(1, A + B)
    roster, manager = roster_of(Shows(0, A), Shows(1, A), ledgers=path, on_failure="raise")
    with pytest.raises(ClientFailure, match="round 1: client 1: its ledger has 1 records where 2"):
        roster.choose(1, manager)


def with_marks(client: int, marks: str, round: int = 1) -> Any:
    """A client's good update, with what it shows of its ledger."""
    metrics = {"client_id": client, "coarse_loss": 0.5, "ledger": marks}
    return update(client, drift(client, round), round=round, metrics=metrics)


def test_each_round_tells_how_long_a_ledger_is_now(path: Path, tmp_path: Path) -> None:
    """A release is made in the first round: a run's own first message would come too late."""
    server = fedavg_server(tmp_path / "run", on_failure="skip", ledgers=path)
    server.ask(1)
    server.take(1, {k: with_marks(k, A + B) for k in range(3)})
    assert json.loads(path.read_text()) == {str(k): A + B for k in range(3)}
    server.ask(2)
    server.take(2, {0: with_marks(0, A + B, 2), 1: with_marks(1, A, 2), 2: with_marks(2, "", 2)})
    rounds = server.strategy.history["rounds"]
    assert rounds[0]["failed"] == []
    assert [line.partition(":")[0] for line in rounds[1]["failed"]] == ["client 1", "client 2"]
    assert [entry["client_id"] for entry in rounds[1]["clients"]] == [0]
    assert all("ledger" not in entry for record in rounds for entry in record["clients"])
