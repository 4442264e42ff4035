"""Files that appear complete or not at all, and survive a power cut.

A file is written under a temporary name, flushed to the disk and renamed, and the directory is
flushed too: a crash leaves the old content or the new one. Errors are one line that names the path.

Tensors, JSON objects, texts and archives are sealed: a file carries the SHA-256 of the rest of it,
and may carry a label that says what it is and whose. Both are checked when it is read, so damage
and files that have changed places are noticed. Whoever may write to the disk can make a new seal.
Files of earlier versions have none, and are read unchecked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config.strict import StrictError, parse_json, read_text
from fedpdm.storage.tensorfile import SEAL, check_seal, read_file, write_file
from fedpdm.text import finite, json_text

__all__ = [
    "Label",
    "StoreError",
    "appearing",
    "clear_leftovers",
    "flush_directory",
    "is_leftover",
    "locked",
    "make_directory",
    "read_json",
    "read_sealed_text",
    "read_sealed_zip",
    "read_tensors",
    "seal",
    "unseal",
    "write_atomic",
    "write_json",
    "write_sealed_text",
    "write_sealed_zip",
    "write_tensors",
]

LABEL = "file_label"
Label = Mapping[str, str]
_TEXT_SEAL = f"# {SEAL}: "  # the last line of a sealed text
_COMMENT = (64).to_bytes(2, "little")  # a zip archive ends with the length of its comment
_LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.tmp")


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


def write_json(path: Path, value: Mapping[str, Any], label: Label | None = None) -> None:
    """Write a JSON object, sealed, so that it appears complete or not at all; `StoreError`."""
    sealed = seal(finite({**value, **({LABEL: dict(label)} if label else {})}))
    write_atomic(path, (json_text(sealed) + "\n").encode())


def read_json(path: Path, label: Label | None = None) -> dict[str, Any]:
    """A JSON object from a file; `StoreError` if it is damaged, beyond `LARGEST_JSON`, or labelled
    as another file."""
    try:
        text = read_text(path, most=LARGEST_JSON)
        value = parse_json(text, most=LARGEST_JSON, earlier=True)
    except StrictError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: must hold an object, got {type(value).__name__}")
    if (LABEL in value and SEAL not in value) or not unseal(value):
        raise _changed(path)
    _check_label(path, value.pop(LABEL, {}), label)
    return value


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with one entry more, the digest of the others."""
    return {**value, SEAL: _json_digest(value)}


def unseal(value: dict[str, Any]) -> bool:
    """Take the digest out of an object; whether there was none, or the right one."""
    return value.pop(SEAL, None) in (None, _json_digest(value))


def _json_digest(value: Mapping[str, Any]) -> str:
    kept = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(kept, indent=1).encode()).hexdigest()


def write_sealed_text(path: Path, text: str) -> None:
    """Write lines of text with one more, `# file_sha256: ...`; `StoreError` if it cannot be."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(path, f"{text}{_TEXT_SEAL}{digest}\n".encode())


def read_sealed_text(path: Path) -> bytes:
    """The file's bytes; `StoreError` if its last line is a seal and not that of what precedes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    text, seal, digest = data.rpartition(_TEXT_SEAL.encode())
    if seal and hashlib.sha256(text).hexdigest().encode() != digest.strip():
        raise _changed(path, "; if the change is meant, remove its last line")
    return data


def write_sealed_zip(path: Path, archive: bytes) -> None:
    """Write a zip archive without a comment; its comment becomes the digest of the rest."""
    body = archive[:-2] + _COMMENT
    write_atomic(path, body + hashlib.sha256(body).hexdigest().encode())


def read_sealed_zip(path: Path) -> bytes:
    """The archive's bytes; `StoreError` if it is sealed and not as it was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    body, digest = data[:-64], data[-64:]
    if body.endswith(_COMMENT) and hashlib.sha256(body).hexdigest().encode() != digest:
        raise _changed(path)
    return data


def _changed(path: Path, more: str = "") -> StoreError:
    return StoreError(f"{path}: is not as it was written: its SHA-256 is another; restore it{more}")


def _check_label(path: Path, found: Any, wanted: Label | None) -> None:
    """Entries that a file does not have are not compared."""
    known = found if isinstance(found, dict) else {}
    if any(known.get(name, value) != value for name, value in (wanted or {}).items()):
        own, other = (" ".join(map(" ".join, label.items())) for label in (known, wanted or {}))
        raise StoreError(f"{path}: is the file of {own}, not of {other}; restore it")


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
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    label: Label | None = None,
) -> None:
    """Write named tensors as safetensors, as atomically, and sealed; no copy is made in memory."""
    entries = dict(metadata or {}) | ({LABEL: json.dumps(dict(label))} if label else {})
    with appearing(path) as temporary:
        write_file(temporary, tensors, entries, sealed=True)


def read_tensors(
    path: Path, label: Label | None = None, *, check: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Named tensors and metadata of a file of `write_tensors`.

    `StoreError` if it is damaged, or labelled as another file. Without `check` the values are not
    read until they are used: for a file that this process has just written.
    """
    try:
        tensors, metadata = read_file(path)
        sealed = metadata.pop(SEAL, None) is not None
        if (check and not check_seal(path)) if sealed else LABEL in metadata:
            raise _changed(path)
        _check_label(path, json.loads(metadata.pop(LABEL, "{}")), label)
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    return tensors, metadata


def is_leftover(name: str) -> bool:
    """Whether a file's name is one that `appearing` gives for a time."""
    return _LEFTOVER.fullmatch(name) is not None


def clear_leftovers(folder: Path, *, of: str = "") -> None:
    """Remove the temporary files that killed processes have left in a folder.

    A process with the number of this one counts as ended: in a container every start may have the
    same. Call it before writing, under the folder's lock where it has one. With `of`, only what was
    to become the file or folder of that name.
    """
    for path in folder.glob(".*.tmp"):
        found = _LEFTOVER.fullmatch(path.name)
        if found and of in ("", found[1]) and not _is_another(int(found[2])):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_another(pid: int) -> bool:
    """Whether a living process other than this one has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
