"""A client's disk: one writer, a full disk, the statement, and the ledger that rounds stood on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpdm.storage.client_store import ClientStore, Reply
from fedpdm.storage.files import StoreError
from tests.storage.test_files import FINE, TRY
from tests.support.disk_faults import files, full_disk


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "client")


def make_reply(round: int, payload: bytes = b"update", ledger: str = "") -> Reply:
    return Reply(
        round=round,
        payload=payload,
        num_examples=9,
        metrics={"client_id": 3, "coarse_loss": 1.25, "replayed": False},
        request="ab" * 32,
        ledger=ledger,
    )


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, store: ClientStore
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    for attempt in (
        lambda: store.save_partial(1, 2, FINE),
        lambda: store.draft_state(1, "fine", FINE),
        lambda: store.finish_round(make_reply(1)),
        lambda: store.save_samples({"labels": np.arange(3)}),
        lambda: store.save_statement({"epsilon": 1.0}, "words"),
    ):
        with pytest.raises(StoreError, match=r"no space left on the device$"):
            attempt()
    assert files(store.root) == set()
    assert store.last_round() == 0
    assert store.load_statement() is None


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file/client: store cannot be written: Not a directory"):  # noqa: SIM117
        with ClientStore(tmp_path / "file" / "client").lock():
            pass


def test_one_writer_at_a_time(store: ClientStore) -> None:
    command = [sys.executable, "-S", "-c", TRY, str(store.root / ".lock")]
    with store.lock():
        assert subprocess.run(command, check=False).returncode == 7
    assert subprocess.run(command, check=False).returncode == 0


def test_the_statement_comes_back(store: ClientStore) -> None:
    assert store.load_statement() is None
    statement = {"epsilon": 9.87654321, "images": 12, "does_not_protect": ["labels"]}
    store.save_statement(statement, "plain words\n")
    assert ClientStore(store.root).load_statement() == statement
    assert (store.root / "privacy.txt").read_text() == "plain words\n"
    (store.root / "privacy.json").write_text("{")
    with pytest.raises(StoreError, match=r"privacy\.json: cannot be read"):
        store.load_statement()


def test_rounds_remember_the_ledger_that_they_were_answered_with(store: ClientStore) -> None:
    assert store.ledger_heads() == []
    for round, head in enumerate(("a" * 64, "", "b" * 64, "c" * 64), 1):
        store.finish_round(make_reply(round, ledger=head))
    assert store.ledger_heads() == ["b" * 64, "c" * 64]  # of the rounds that are kept
    reply = store.load_reply(4)
    assert reply is not None
    assert reply.ledger == "c" * 64
