"""A store that lost its memory: a trace of any run is enough to refuse a new release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpdm.config import config_from_mapping
from fedpdm.deployment.acceptance import accept
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import baseline_statement, client_statement, plain_text
from fedpdm.storage.client_store import ClientStore, Reply
from fedpdm.storage.files import StoreError, write_atomic
from tests.support.refusals import tree
from tests.support.release_toys import DELTA, image_set, request

RUN = "runs/0123456789abcdef"  # of another config than whatever is asked for below


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "vault")


def released(store: ReleaseStore, count: int = 9) -> None:
    store.obtain(image_set(count), request(simulation=False))


def statement(store: ReleaseStore) -> None:
    said = client_statement(store, delta=DELTA)
    ClientStore(store.root / RUN).save_statement(said, plain_text(said))


def reply(store: ReleaseStore) -> None:
    ClientStore(store.root / RUN).finish_round(
        Reply(round=1, payload=b"x", num_examples=9, metrics={}, request="r",
              ledger=store.ledger().head)
    )  # fmt: skip


def model(store: ReleaseStore) -> None:
    ClientStore(store.root / RUN).save_partial(1, 1, {"w": torch.ones(2)})


def draft(store: ReleaseStore) -> None:
    ClientStore(store.root / RUN).draft_state(1, "coarse", {"w": torch.ones(2)})


def samples(store: ReleaseStore) -> None:
    ClientStore(store.root / RUN).save_samples({"labels": np.arange(3)})


def classes(store: ReleaseStore) -> None:
    ClientStore(store.root / RUN).save_class_counts(np.arange(3))


def damaged(store: ReleaseStore) -> None:
    reply(store)
    (store.root / RUN / "rounds" / "000001" / "reply.json").write_text("{")


def acceptance(store: ReleaseStore) -> None:
    config = config_from_mapping({"run": {"simulation": False}})
    numbers = {"epsilon": 1.0, "delta": 1e-5, "images": 3}
    record = accept(store, config, numbers, client_id=3, by="me", code="c", images_sha256="i")
    write_atomic(store.root / "accepted" / f"{record.number:06d}.txt", b"words")


TRACES = (statement, reply, model, draft, samples, classes, damaged, acceptance)


def forget(store: ReleaseStore) -> None:
    """The ledger and the releases are gone."""
    (store.root / "ledger.jsonl").unlink()
    shutil.rmtree(store.root / "releases", ignore_errors=True)


def refused(store: ReleaseStore) -> str:
    """The line of everything that looks or would release, the release allowed or not."""
    before, lines = tree(store.root), set()
    for allow in (False, True):
        asked = request(simulation=False, allow=allow)
        for attempt in (
            lambda asked=asked: store.obtain(image_set(9), asked),
            lambda asked=asked: store.preview(image_set(9), asked),
            store.check_traces,
            lambda: store.note("accepted", {}, client_id=3),
        ):
            with pytest.raises(StoreError) as caught:
                attempt()
            lines.add(str(caught.value))
    assert tree(store.root) == before
    (line,) = lines
    assert "\n" not in line
    assert line.endswith("restore it")
    return line.removeprefix(f"{store.root}/")


@pytest.mark.parametrize("leave", TRACES)
def test_a_trace_of_any_run_is_enough(
    store: ReleaseStore, leave: Callable[[ReleaseStore], None]
) -> None:
    released(store)
    leave(store)
    store.check_traces()
    store.obtain(image_set(12), request(simulation=False))
    forget(store)
    line = refused(store)
    if leave in (statement, reply, acceptance):
        assert "was written with a ledger" in line or "was accepted in record 3, which" in line
    else:
        assert line.startswith(f"{RUN}: images were released in this run, and {store.root}/ledger")


@pytest.mark.parametrize("leave", [statement, reply, acceptance])
def test_a_shorter_ledger_is_refused(
    store: ReleaseStore, tmp_path: Path, leave: Callable[[ReleaseStore], None]
) -> None:
    """Ledger and releases of an older backup, beside the runs of today."""
    released(store, 5)
    backup = tmp_path / "backup"
    shutil.copytree(store.root, backup)
    released(store, 9)
    leave(store)
    for name in ("ledger.jsonl", "releases"):
        place = store.root / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        shutil.move(backup / name, place)
    assert len(store.ledger().releases()) == 1
    refused(store)


@pytest.mark.parametrize("leave", [statement, reply, acceptance])
def test_the_ledger_of_another_store_is_refused(
    store: ReleaseStore, tmp_path: Path, leave: Callable[[ReleaseStore], None]
) -> None:
    released(store)
    leave(store)
    forget(store)
    other = ReleaseStore(tmp_path / "other")
    released(other)
    if leave is acceptance:  # a release stands where the acceptance was
        released(other, 12)
    for name in ("ledger.jsonl", "releases"):
        shutil.move(other.root / name, store.root / name)
    ledger = (store.root / "ledger.jsonl").read_bytes()
    refused(store)
    assert (store.root / "ledger.jsonl").read_bytes() == ledger


def test_a_run_that_released_nothing_is_no_trace(store: ReleaseStore) -> None:
    """A baseline that trains alone: after its rounds, and after a crash in the first of them."""
    said = baseline_statement(config_from_mapping({"coarse": {"training": "none"}}))
    kept = ClientStore(store.root / "runs" / "alone")
    kept.save_statement(said, plain_text(said))
    kept.save_partial(1, 1, {"w": torch.ones(2)})
    older = ClientStore(store.root / "runs" / "alone-of-an-earlier-version")
    older.save_samples({"labels": np.arange(3)})
    older.finish_round(
        Reply(round=1, payload=b"", num_examples=9, metrics={}, request="r",
              ledger=store.ledger().head)
    )  # fmt: skip
    (store.root / "runs" / "just-opened").mkdir()
    (store.root / "runs" / "just-opened" / ".lock").touch()
    released(store)
    assert len(store.ledger().releases()) == 1


def test_rounds_beside_the_ledger_count_too(tmp_path: Path) -> None:
    """In a simulation a client has one directory for both."""
    store = ReleaseStore(tmp_path / "clients" / "3")
    store.obtain(image_set(5), request())
    ClientStore(store.root).finish_round(
        Reply(round=1, payload=b"x", num_examples=5, metrics={}, request="r",
              ledger=store.ledger().head)
    )  # fmt: skip
    store.obtain(image_set(9), request())
    forget(store)
    with pytest.raises(StoreError, match=r"was written with a ledger that .* does not continue"):
        store.obtain(image_set(9), request(seed=5))
    told = json.loads((store.root / "rounds" / "000001" / "reply.json").read_text())
    assert len(told["ledger"]) == 64


def test_a_file_that_is_no_acceptance_is_no_trace(store: ReleaseStore) -> None:
    released(store)
    for name in ("0.txt", "1x.txt"):
        (store.root / "accepted").mkdir(exist_ok=True)
        (store.root / "accepted" / name).write_text("notes")
    store.check_traces()
    (store.root / "accepted" / "2.txt").write_text("accepted what the ledger does not know")
    with pytest.raises(StoreError, match="was accepted in record 2, which"):
        store.check_traces()
