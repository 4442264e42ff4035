"""Atomic files: the old content or the new one, on the disk, and errors that name the path."""

from __future__ import annotations

import json
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

from fedpdm.storage.files import (
    StoreError,
    appearing,
    locked,
    read_json,
    read_tensors,
    write_atomic,
    write_tensors,
)
from tests.support.disk_faults import Crash, CrashAt, crash_in, files, full_disk

FINE = {"model.w": torch.arange(6.0).view(2, 3), "step": torch.tensor(4)}

# --- Writing --------------------------------------------------------------------------------


def test_files_appear_complete_and_replace_the_old(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    write_atomic(path, np.frombuffer(b"three", dtype=np.uint8))
    assert path.read_bytes() == b"three"
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


def test_a_crash_at_any_call_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    for at in range(20):
        path.write_bytes(b"old")
        with monkeypatch.context() as patched:
            crashing = CrashAt(patched, at)
            try:
                write_atomic(path, b"new")
            except Crash:
                seen.append(path.read_bytes())
                continue
        assert crashing.calls == ["write", "fsync", "replace", "fsync"]
        break
    assert seen == [b"old", b"old", b"old", b"new"]


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
    calls.clear()
    write_tensors(tmp_path / "file", FINE)
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("how", ["write", "lock"])
def test_new_directories_are_flushed_into_those_that_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Else a power cut may take a new store as a whole, and its images would be noised again."""
    flushed = []
    fsync = os.fsync

    def seen_fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    if how == "write":
        write_atomic(tmp_path / "a" / "b" / "file", b"data")
    else:
        with locked(tmp_path / "a" / "b" / ".lock"):
            pass
    assert {tmp_path, tmp_path / "a"} <= set(flushed)


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, full_disk)
            with pytest.raises(StoreError) as caught:
                write_atomic(path, b"new")
            assert str(caught.value) == f"{path}: cannot be written: no space left on the device"
            with pytest.raises(StoreError, match=r"file: cannot be written: no space left on the"):
                write_tensors(path, FINE)
        assert files(tmp_path) == {"file"}
        assert path.read_bytes() == b"old"


def test_what_is_not_the_disk_s_fault_is_passed_on(tmp_path: Path) -> None:
    def fail() -> None:
        with appearing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert files(tmp_path) == set()


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file/below/x: cannot be written: Not a directory"):
        write_atomic(tmp_path / "file" / "below" / "x", b"")
    with pytest.raises(StoreError, match="file/x: cannot be written: Not a directory"):
        write_atomic(tmp_path / "file" / "x", b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "client"):
        with pytest.raises(StoreError, match="store cannot be written: Not a directory"):  # noqa: SIM117
            with locked(folder / ".lock"):
                pass
    (tmp_path / "taken" / "file").mkdir(parents=True)
    with pytest.raises(StoreError, match="taken: cannot be written: Is a directory"):
        write_atomic(tmp_path / "taken", b"")
    assert files(tmp_path) == {"file"}


# --- Reading --------------------------------------------------------------------------------


def test_tensors_come_back_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {**FINE, "view": torch.arange(6.0).view(2, 3).T, "scalar": torch.tensor(2.5)}
    write_tensors(path, tensors, {"round": "3"})
    got, metadata = read_tensors(path)
    assert metadata == {"round": "3"}
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


def test_damaged_tensor_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(StoreError, match=r"t\.safetensors: cannot be read: "):
        read_tensors(path)
    write_tensors(path, FINE)
    data = path.read_bytes()
    for cut in (0, 7, 8, 40, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(StoreError, match=r"t\.safetensors: cannot be read: ") as caught:
            read_tensors(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff", b"9" * 5000, b"[" * 100_000])
def test_damaged_objects_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "object.json"
    path.write_bytes(json.dumps({"a": 1}).encode())
    assert read_json(path) == {"a": 1}
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"object\.json: (cannot be read|must hold an object)"):
        read_json(path)


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


def test_the_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    path = tmp_path / "store" / ".lock"

    def other() -> int:
        command = [sys.executable, "-S", "-c", TRY, str(path)]
        return subprocess.run(command, check=False).returncode

    with locked(path):
        assert other() == 7
    assert other() == 0
    with pytest.raises(Crash), locked(path):
        raise Crash
    assert other() == 0  # released by the exception


def test_the_lock_waits_for_the_other_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(path)],
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
        with locked(path):
            waited = time.perf_counter() - started
        timer.join()
    assert waited >= 0.35


@pytest.mark.slow
def test_a_file_of_a_stranger_is_read_strictly(tmp_path: Path) -> None:
    """No key twice, no depth, no end; NaN is what earlier versions wrote into results."""
    path = tmp_path / "partition.json"
    for text, words in (
        ('{"a": 1, "a": 2}', "key 'a' stands there twice"),
        ("[" * 100_000, "nests too deep"),
        ("[1]", "must hold an object, got list"),
    ):
        path.write_text(text)
        with pytest.raises(StoreError, match=words) as caught:
            read_json(path)
        assert str(caught.value).startswith(f"{path}: ")
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match="must have at most"):
        read_json(path)
    path.write_text('{"a": NaN, "b": [-Infinity]}')
    assert str(read_json(path)) == "{'a': nan, 'b': [-inf]}"
