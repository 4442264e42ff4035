"""Files that appear complete or not at all, and survive a power cut.

A file is written under a temporary name, flushed to the disk and renamed, and the directory is
flushed too: a crash leaves the old content or the new one. Errors are one line that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config.strict import StrictError, parse_json, read_text
from fedpdm.storage.tensorfile import TensorFileError, read_file, write_file

__all__ = [
    "StoreError",
    "appearing",
    "flush_directory",
    "locked",
    "make_directory",
    "read_json",
    "read_tensors",
    "write_atomic",
    "write_tensors",
]


LARGEST_JSON = 1 << 28  # characters: results hold curves, members a digest for each image


class StoreError(ValueError):
    """A store that cannot be used as asked; one line that names the path."""


def flush_directory(path: Path) -> None:
    """Make the renames in a directory durable: a release lost to a power cut would be redrawn."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, so that they outlast a power cut too."""
    if path.exists():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `StoreError` if it is damaged, or beyond `LARGEST_JSON`."""
    try:
        text = read_text(path, most=LARGEST_JSON)
        value = parse_json(text, most=LARGEST_JSON, earlier=True)
    except StrictError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end, on disk, or removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_directory(path.parent)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror
        raise StoreError(f"{path}: cannot be written: {reason}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive access across processes, by a lock on the file `path`; waits for its holder."""
    try:
        make_directory(path.parent)
        handle = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{path.parent}: store cannot be written: {error.strerror}") from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomic(path: Path, data: bytes | np.ndarray) -> None:
    """Write a file so that it appears complete or not at all; `StoreError` if it cannot be."""
    with appearing(path) as temporary, open(temporary, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.data)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, as atomically; no copy of them is made in memory."""
    with appearing(path) as temporary:
        write_file(temporary, tensors, metadata or {})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Named tensors and metadata of a file of `write_tensors`; `StoreError` if it is damaged."""
    try:
        return read_file(path)
    except (OSError, TensorFileError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
