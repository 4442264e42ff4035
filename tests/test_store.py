"""A client's disk: durable or unchanged, bound to one data set, one release, one writer."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.mechanism import SeededNoise, release, release_metadata
from fedpdm.schedule import make_schedule
from fedpdm.store import (
    ClientStore,
    Reply,
    StoreError,
    read_tensors,
    write_atomic,
    write_tensors,
)
from fedpdm.types import ReleasedDataset

FINE = {"model.w": torch.arange(6.0).view(2, 3), "step": torch.tensor(4)}


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "client")


def crash_in(monkeypatch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """End the process in the call of `os.<name>` that comes after so many good ones."""
    real, calls = getattr(os, name), [0]

    def last(*given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise Crash
        return real(*given, **options)

    monkeypatch.setattr(os, name, last)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_release(seed: int = 0) -> ReleasedDataset:
    return release(
        torch.ones(4, 1, 2, 2),
        torch.arange(4),
        schedule=make_schedule("linear"),
        t0=600,
        clip_norm=5.0,
        shift=-1.0,
        noise=SeededNoise(np.random.SeedSequence(seed)),
    )


def make_reply(round: int, payload: bytes = b"update") -> Reply:
    return Reply(
        round=round,
        payload=payload,
        num_examples=9,
        metrics={"client_id": 3, "coarse_loss": 1.25, "replayed": False},
        request="ab" * 32,
    )


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


# --- Atomic writes --------------------------------------------------------------------------


def test_files_appear_complete_and_replace_the_old(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert files(tmp_path) == {"deep/down/file"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    crash_in(monkeypatch, call)
    with pytest.raises(Crash):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_data_are_flushed_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def seen_replace(source: Any, target: Any) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomic(tmp_path / "file", b"data")
    assert calls == ["file", "rename", "directory"]


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: ClientStore
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError) as caught:
        write_atomic(path, b"new")
    assert str(caught.value) == f"{path}: cannot be written: no space left on the device"
    assert files(tmp_path) == {"file"}
    assert path.read_bytes() == b"old"
    for attempt in (
        lambda: store.claim({"t0": 1}),
        lambda: store.save_release(make_release()),
        lambda: store.save_partial(1, 2, FINE),
        lambda: store.draft_state(1, "fine", FINE),
        lambda: store.finish_round(make_reply(1)),
        lambda: store.save_samples({"labels": np.arange(3)}),
    ):
        with pytest.raises(StoreError, match=r"no space left on the device$"):
            attempt()
    assert files(store.root) == set()
    assert store.last_round() == 0
    assert store.load_release() is None


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        write_atomic(tmp_path / "file" / "below" / "x", b"")
    with pytest.raises(StoreError, match="store cannot be written: Not a directory"):  # noqa: SIM117
        with ClientStore(tmp_path / "file" / "client").lock():
            pass


def test_tensors_come_back_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {**FINE, "view": torch.arange(6.0).view(2, 3).T, "scalar": torch.tensor(2.5)}
    write_tensors(path, tensors, {"round": "3"})
    got, metadata = read_tensors(path)
    assert metadata == {"round": "3"}
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


# --- Identity -------------------------------------------------------------------------------

IDENTITY = {"client_id": 3, "data": "5e" * 32, "t0": 600, "clip_norm": 0.1 + 0.2, "shift": -1.0}


def test_a_store_belongs_to_its_first_claim(store: ClientStore) -> None:
    store.claim(IDENTITY)
    ClientStore(store.root).claim(IDENTITY)
    for key, value in (("t0", 601), ("clip_norm", 0.3), ("data", "6e" * 32), ("shift", 0.0)):
        with pytest.raises(StoreError) as caught:
            store.claim({**IDENTITY, key: value})
        message = str(caught.value)
        assert message.startswith(
            f"{store.root}: this store was made with {key} = {IDENTITY[key]!r}, now {value!r}; "
        )
        assert "would be a second release: use another directory or restore" in message
    with pytest.raises(StoreError, match="made with more = None, now 1"):
        store.claim({**IDENTITY, "more": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff"])
def test_a_damaged_identity_is_refused(store: ClientStore, text: str) -> None:
    store.claim(IDENTITY)
    (store.root / "identity.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError, match=r"identity\.json: (cannot be read|must hold an object)"):
        store.claim(IDENTITY)


# --- The release ----------------------------------------------------------------------------


def test_the_release_is_written_once_and_read_exactly(store: ClientStore) -> None:
    assert store.load_release() is None
    made = make_release()
    store.save_release(made)
    before = store.release_path.read_bytes()
    with pytest.raises(StoreError, match=r"release\.safetensors: a release is stored already"):
        store.save_release(make_release(1))
    assert store.release_path.read_bytes() == before
    got = ClientStore(store.root).load_release()
    assert got is not None
    assert torch.equal(got.x_tilde, made.x_tilde)
    assert torch.equal(got.labels, made.labels)
    assert (got.parameters, got.event) == (made.parameters, made.event)
    assert got.noise_source == made.noise_source


def test_a_lost_release_is_not_drawn_again(store: ClientStore) -> None:
    store.save_release(make_release())
    store.finish_round(make_reply(1))
    store.release_path.unlink()
    with pytest.raises(StoreError, match="is gone, but rounds were finished with it; noising"):
        store.load_release()


@pytest.mark.parametrize("damage", ["truncated", "bits", "empty", "other", "lying"])
def test_a_damaged_release_is_refused(store: ClientStore, damage: str) -> None:
    made = make_release()
    store.save_release(made)
    data = bytearray(store.release_path.read_bytes())
    data[12] ^= 0xFF
    damaged = {"truncated": data[:-1], "bits": data, "empty": b""}
    if damage in damaged:
        store.release_path.write_bytes(damaged[damage])
    elif damage == "other":
        write_tensors(store.release_path, {"x_tilde": torch.zeros(1)})
    else:  # claims less loss than its parameters imply
        record = {**release_metadata(made), "noise_multiplier": "50.0"}
        write_tensors(store.release_path, {"x_tilde": made.x_tilde, "labels": made.labels}, record)
    with pytest.raises(StoreError, match=r"release\.safetensors: "):
        store.load_release()


# --- The lock -------------------------------------------------------------------------------

HOLD = """
import fcntl, sys, time
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
"""

TRY = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(7)
"""


def test_the_lock_keeps_other_processes_out(store: ClientStore) -> None:
    def other() -> int:
        command = [sys.executable, "-S", "-c", TRY, str(store.root / ".lock")]
        return subprocess.run(command, check=False).returncode

    with store.lock():
        assert other() == 7
    assert other() == 0
    with pytest.raises(Crash), store.lock():
        raise Crash
    assert other() == 0  # released by the exception


def test_the_lock_waits_for_the_other_holder(store: ClientStore) -> None:
    store.root.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(store.root / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        timer = threading.Timer(0.4, holder.stdin.close)  # ends its readline
        started = time.perf_counter()
        timer.start()
        with store.lock():
            waited = time.perf_counter() - started
        timer.join()
    assert waited >= 0.35
