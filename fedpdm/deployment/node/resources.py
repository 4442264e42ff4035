"""Disk, memory and clock of a participant's machine."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import shutil
import stat
import tempfile
from pathlib import Path

import psutil

from fedpdm.storage.files import StoreError, make_directory

__all__ = [
    "check_clock",
    "check_store",
    "free_disk",
    "free_memory",
    "store_bytes",
    "training_bytes",
]

UNSYNCHRONISED = 5  # TIME_ERROR, adjtimex(2)
BASE_BYTES = 1_000_000_000  # Python, torch and Flower in the two processes of a node


def store_bytes(*, coarse: int, fine: int, values: int) -> int:
    """Bytes that a client's store takes at most: models of so many parameters, `values` pixels.

    Two finished rounds and a draft, each with fine weights, EMA and Adam's two moments, and the
    coarse reply and moments; the release and a temporary copy of it, float32.
    """
    return 4 * (3 * 4 * fine + 3 * 3 * coarse) + 2 * 4 * values


def training_bytes(*, coarse: int, fine: int, values: int) -> int:
    """Bytes of memory that training needs at least, without the activations of a batch.

    One model at a time has weights, gradients, two moments and EMA; the coarse message comes and
    goes; images are held as uint8 and their release as float32.
    """
    return BASE_BYTES + 4 * (5 * max(coarse, fine) + 3 * coarse) + 5 * values


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def free_memory() -> int:
    """Bytes available, to this machine or to this control group if that has less."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, limit - used))
    return free


def check_store(root: Path) -> str:
    """Make the store if it is missing (mode 0700), write and remove a file; returns its state.

    `StoreError` if it cannot be written, belongs to somebody else or others can read it.
    """
    try:
        if not root.exists():
            make_directory(root.parent)
            root.mkdir(mode=0o700)
        facts = root.stat()
        if not stat.S_ISDIR(facts.st_mode):
            raise StoreError(f"{root}: is not a directory")
        if facts.st_mode & 0o077:
            raise StoreError(
                f"{root}: others can read it (mode {facts.st_mode & 0o777:04o}); chmod 700 {root}"
            )
        if facts.st_uid != os.geteuid():
            raise StoreError(f"{root}: belongs to user {facts.st_uid}, not to {os.geteuid()}")
        with tempfile.NamedTemporaryFile(dir=root, prefix=".check-", suffix=".tmp") as file:
            file.write(b"fedpdm")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"{root}: cannot be written: {error.strerror}") from None
    return str(root)


def check_clock(now: datetime.datetime, *, not_before: datetime.datetime | None) -> str:
    """A line about the clock; `ValueError` if it is earlier than something that has happened.

    Linux says whether the clock is synchronised; nothing is sent anywhere.
    """
    if not_before is not None and now < not_before:
        raise ValueError(
            f"clock: {now:%F %T} UTC is before {not_before:%F %T}, when something that is here was "
            "made; set the clock"
        )
    state = -1
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    known = {-1: "synchronisation unknown", UNSYNCHRONISED: "NOT synchronised (NTP), check it"}
    return f"{now:%F %T} UTC, {known.get(state, 'synchronised')}"
