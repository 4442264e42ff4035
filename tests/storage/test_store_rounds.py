"""Finished rounds, replies, partial work and samples on a client's disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.storage.client_store import ClientStore, Reply
from fedpdm.storage.files import StoreError, read_json, write_json, write_tensors
from tests.storage.test_files import FINE
from tests.storage.test_store import make_reply
from tests.support.disk_faults import Crash, crash_in


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "client")


def finish(store: ClientStore, reply: Reply, **states: dict[str, torch.Tensor]) -> None:
    store.begin_round(reply.round)
    for name, tensors in states.items():
        store.draft_state(reply.round, name, tensors)
    store.finish_round(reply)


def test_a_finished_round_is_all_there(store: ClientStore) -> None:
    assert (store.last_round(), store.load_state(0, "fine"), store.load_reply(1)) == (0, {}, None)
    moments = {"exp_avg.w": torch.ones(2)}
    store.save_partial(1, 2, FINE)
    finish(store, make_reply(1), coarse=moments, fine=FINE)
    assert store.last_round() == 1
    assert store.load_reply(1) == make_reply(1)
    coarse, fine = store.load_state(1, "coarse"), store.load_state(1, "fine")
    assert (coarse.keys(), fine.keys()) == (moments.keys(), FINE.keys())
    assert torch.equal(coarse["exp_avg.w"], moments["exp_avg.w"])
    assert torch.equal(fine["model.w"], FINE["model.w"])
    assert store.load_partial(1) is None
    finish(store, make_reply(2, b""), fine=FINE)
    assert store.load_reply(2) == make_reply(2, b"")
    assert store.load_state(2, "coarse") == {} != store.load_state(2, "fine")


def test_drafts_do_not_count_until_the_round_is_finished(store: ClientStore) -> None:
    finish(store, make_reply(1), fine=FINE)
    store.draft_state(2, "coarse", FINE)
    store.draft_state(2, "fine", FINE)
    assert store.last_round() == 1
    assert store.load_state(2, "coarse") == store.load_state(2, "fine") == {}
    store.begin_round(2)  # forgets them
    store.finish_round(make_reply(2))
    assert store.last_round() == 2
    assert store.load_state(2, "coarse") == store.load_state(2, "fine") == {}


def test_loaded_states_outlive_their_files(store: ClientStore) -> None:
    finish(store, make_reply(1), fine=FINE)
    state = store.load_state(1, "fine")
    for round in (2, 3):
        finish(store, make_reply(round), fine={"model.w": torch.zeros(2, 3)})
    assert store.load_state(1, "fine") == {}
    assert torch.equal(state["model.w"], FINE["model.w"])
    state["model.w"] += 1  # and are not the file
    partial = {"model.w": torch.ones(2)}
    store.save_partial(4, 1, partial)
    found = store.load_partial(4)
    assert found is not None
    found[1]["model.w"].zero_()
    again = store.load_partial(4)
    assert again is not None
    assert torch.equal(again[1]["model.w"], partial["model.w"])


def test_old_rounds_are_dropped_but_the_last_two(store: ClientStore) -> None:
    for round in (1, 2, 3, 7, 12):
        finish(store, make_reply(round), fine=FINE)
    (store.root / "rounds" / "000012.bak").mkdir()  # not ours
    assert store.last_round() == 12
    found = [round for round in range(1, 13) if store.load_reply(round) is not None]
    assert found == [7, 12]


def test_a_round_is_finished_once(store: ClientStore) -> None:
    finish(store, make_reply(1, b"first"), fine=FINE)
    with pytest.raises(StoreError, match="rounds/000001: cannot be written: Directory not empty"):
        finish(store, make_reply(1, b"second"), fine=FINE)
    reply = store.load_reply(1)
    assert reply is not None
    assert reply.payload == b"first"
    assert [p.name for p in (store.root / "rounds").iterdir()] == ["000001"]


@pytest.mark.parametrize("after", range(4))
def test_a_crash_inside_a_round_leaves_the_last_one(
    store: ClientStore, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Three files and the directory are renamed: end the process before each."""
    finish(store, make_reply(1), fine=FINE)
    store.save_partial(2, 5, FINE)
    crash_in(monkeypatch, "replace", after)
    with pytest.raises(Crash):
        finish(store, make_reply(2), fine=FINE)
    monkeypatch.undo()
    again = ClientStore(store.root)
    assert again.last_round() == 1
    assert again.load_reply(2) is None
    partial = again.load_partial(2)
    assert partial is not None
    assert partial[0] == 5
    finish(again, make_reply(2), fine=FINE)
    assert again.last_round() == 2
    assert not [p.name for p in (store.root / "rounds").iterdir() if p.name.startswith(".")]


def test_partials_belong_to_their_round(store: ClientStore) -> None:
    assert store.load_partial(1) is None
    store.save_partial(1, 1, {"w": torch.zeros(1)})
    store.save_partial(1, 2, FINE)
    found = store.load_partial(1)
    assert found is not None
    assert found[0] == 2
    assert torch.equal(found[1]["model.w"], FINE["model.w"])
    assert store.load_partial(2) is None
    store.drop_partial()
    store.drop_partial()
    assert store.load_partial(1) is None


def test_samples_come_back(store: ClientStore) -> None:
    assert store.load_samples() is None
    arrays = {"labels": np.arange(3), "pfdm": np.zeros((3, 1, 2, 2), np.uint8)}
    store.save_samples(arrays)
    got = store.load_samples()
    assert got is not None
    assert got.keys() == arrays.keys()
    assert all(np.array_equal(got[k], v) and got[k].dtype == v.dtype for k, v in arrays.items())


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 40, b'{"what": 1}', b"PK\x03\x04"])
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("rounds/000001/fine.safetensors", lambda store: store.load_state(1, "fine")),
        ("rounds/000001/reply.json", lambda store: store.load_reply(1)),
        ("partial/fine.safetensors", lambda store: store.load_partial(2)),
        ("samples.npz", lambda store: store.load_samples()),
    ],
)
def test_damaged_files_are_store_errors(
    store: ClientStore, name: str, load: Callable[[ClientStore], Any], damage: bytes
) -> None:
    finish(store, make_reply(1), fine=FINE)
    store.save_partial(2, 1, FINE)
    store.save_samples({"labels": np.arange(3)})
    (store.root / name).write_bytes(damage)
    with pytest.raises(StoreError) as caught:
        load(store)
    assert str(store.root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_with_missing_parts_are_store_errors(store: ClientStore) -> None:
    finish(store, make_reply(1))
    folder = store.root / "rounds" / "000001"
    record = read_json(folder / "reply.json")
    (folder / "reply.safetensors").unlink()
    with pytest.raises(StoreError, match="reply cannot be read"):
        store.load_reply(1)
    (folder / "reply.safetensors").write_bytes(b"update")
    del record["request"]
    write_json(folder / "reply.json", record)
    with pytest.raises(StoreError, match="reply cannot be read"):
        store.load_reply(1)
    write_tensors(store.root / "partial" / "fine.safetensors", FINE, {"round": "2", "chunk": "x"})
    with pytest.raises(StoreError, match="chunk is missing or not a number"):
        store.load_partial(2)
