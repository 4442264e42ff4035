"""A client's disk: the stored release, the training state and the replies already given.

    identity.json             whose store this is: the data digest and the release settings
    release.safetensors       x_tilde and labels with their parameters; written once
    rounds/000007/            one directory per finished round, renamed into place when complete
        coarse.safetensors    optimiser moments of the coarse model
        fine.safetensors      fine model, EMA, moments, step
        reply.safetensors     the coarse update that was sent (a replayed round sends it again)
        reply.json            its metrics, and the fingerprint of the weights it answered
    samples.npz               pictures drawn with the finished models
    partial/                  fine-model checkpoints inside a round

Every file is written under a temporary name, flushed to disk and renamed, so a crash leaves the
old state or the new one. One Ray actor serves several clients: all state is here, none in the
process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.mechanism import release_metadata, restore_release
from fedpdm.tensorfile import TensorFileError, read_file, write_file
from fedpdm.types import ReleasedDataset

__all__ = ["ClientStore", "Reply", "StoreError", "read_tensors", "write_atomic", "write_tensors"]


class StoreError(ValueError):
    """A store that cannot be used as asked; one line that names the path."""


def _flush_directory(path: Path) -> None:
    """Make the renames in a directory durable: a release lost to a power cut would be redrawn."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `StoreError` if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end, on disk, or removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror
        raise StoreError(f"{path}: cannot be written: {reason}") from None


def write_atomic(path: Path, data: bytes | np.ndarray) -> None:
    """Write a file so that it appears complete or not at all; `StoreError` if it cannot be."""
    with _appearing(path) as temporary, open(temporary, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.data)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, as atomically; no copy of them is made in memory."""
    with _appearing(path) as temporary:
        write_file(temporary, tensors, metadata or {})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Named tensors and metadata of a file of `write_tensors`; `StoreError` if it is damaged."""
    try:
        return read_file(path)
    except (OSError, TensorFileError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client answered in a round: `payload` (empty for nothing, None if it was drafted),
    metrics, and the fingerprint of the message it answered."""

    round: int
    payload: bytes | None
    num_examples: int
    metrics: dict[str, Any]
    request: str


class ClientStore:
    """One client's directory. Use inside `with store.lock():` for anything that writes."""

    KEEP_ROUNDS = 2

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive access to the store across processes; waits for the other holder."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = open(self.root / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise StoreError(f"{self.root}: store cannot be written: {error.strerror}") from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Bind the store to `identity` on first use; `StoreError` if it belongs to another."""
        path = self.root / "identity.json"
        text = json.dumps(dict(identity), sort_keys=True, indent=1)
        if not path.exists():
            write_atomic(path, text.encode())
            return
        known = _read_json(path)
        for key, value in identity.items():
            if known.get(key) != value:
                raise StoreError(
                    f"{self.root}: this store was made with {key} = {known.get(key)!r}, "
                    f"now {value!r}; noising the same images again would be a second release: "
                    "use another directory or restore the old setting"
                )

    # The release.

    @property
    def release_path(self) -> Path:
        return self.root / "release.safetensors"

    def load_release(self) -> ReleasedDataset | None:
        """The stored release, or None if this store has none yet."""
        if not self.release_path.exists():
            if self.last_round() > 0:
                raise StoreError(
                    f"{self.release_path}: is gone, but rounds were finished with it; noising the "
                    "same images again would be a second release"
                )
            return None
        tensors, metadata = read_tensors(self.release_path)
        try:
            return restore_release(tensors["x_tilde"], tensors["labels"], metadata)
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.release_path}: {error}") from None

    def save_release(self, released: ReleasedDataset) -> None:
        """Store the release; refuses to replace one."""
        if self.release_path.exists():
            raise StoreError(f"{self.release_path}: a release is stored already")
        write_tensors(
            self.release_path,
            {"x_tilde": released.x_tilde, "labels": released.labels},
            release_metadata(released),
        )

    # Rounds.

    def _round_path(self, round: int) -> Path:
        return self.root / "rounds" / f"{round:06d}"

    def last_round(self) -> int:
        """The last finished round, 0 before the first."""
        return max((int(path.name) for path in self._finished()), default=0)

    def _finished(self) -> list[Path]:
        folder = self.root / "rounds"
        return sorted(path for path in folder.glob("[0-9]*") if path.name.isdecimal())

    def _draft_path(self, round: int) -> Path:
        return self.root / "rounds" / f".{round:06d}.tmp"

    def load_state(self, round: int) -> dict[str, dict[str, torch.Tensor]]:
        """Training state after `round`: model name -> named tensors; empty before the first."""
        folder = self._round_path(round)
        return {
            name: read_tensors(folder / f"{name}.safetensors")[0]
            for name in ("coarse", "fine")
            if (folder / f"{name}.safetensors").exists()
        }

    def begin_round(self, round: int) -> None:
        """Forget what an interrupted attempt at `round` drafted."""
        shutil.rmtree(self._draft_path(round), ignore_errors=True)

    def draft_state(self, round: int, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a model's state after `round`; it counts once the round is finished."""
        write_tensors(self._draft_path(round) / f"{name}.safetensors", tensors)

    def load_reply(self, round: int) -> Reply | None:
        """The reply given in `round`, or None if it is not there (any more)."""
        folder = self._round_path(round)
        if not (folder / "reply.json").exists():
            return None
        record = _read_json(folder / "reply.json")
        try:
            payload = (folder / "reply.safetensors").read_bytes()
            return Reply(round=round, payload=payload, **record)
        except (OSError, TypeError) as error:
            raise StoreError(f"{folder}: reply cannot be read: {error}") from None

    def draft_payload(self, round: int, payload: bytes | np.ndarray) -> None:
        """Write what `round` will answer (bytes or uint8 (n,)); counts once it is finished."""
        write_atomic(self._draft_path(round) / "reply.safetensors", payload)

    def finish_round(
        self, reply: Reply, state: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    ) -> Reply:
        """Make `round` durable in one step: reply, `state` and drafts appear together.

        Returns the reply with its payload.
        """
        final, draft = self._round_path(reply.round), self._draft_path(reply.round)
        record = {
            "num_examples": reply.num_examples,
            "metrics": reply.metrics,
            "request": reply.request,
        }
        try:
            for name, tensors in (state or {}).items():
                self.draft_state(reply.round, name, tensors)
            if reply.payload is not None:
                self.draft_payload(reply.round, reply.payload)
            write_atomic(draft / "reply.json", json.dumps(record, indent=1).encode())
            os.replace(draft, final)
            _flush_directory(final.parent)
        except StoreError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise StoreError(f"{final}: cannot be written: {error.strerror}") from None
        self.drop_partial()
        for old in self._finished()[: -self.KEEP_ROUNDS]:
            shutil.rmtree(old, ignore_errors=True)
        finished = self.load_reply(reply.round)
        assert finished is not None
        return finished

    # Inside a round.

    def save_partial(self, round: int, chunk: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fine-model state after `chunk` chunks of `round`."""
        write_tensors(
            self.root / "partial" / "fine.safetensors",
            tensors,
            {"round": str(round), "chunk": str(chunk)},
        )

    def load_partial(self, round: int) -> tuple[int, dict[str, torch.Tensor]] | None:
        """(chunks done, state) of an interrupted `round`, or None."""
        path = self.root / "partial" / "fine.safetensors"
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path)
        if metadata.get("round") != str(round):
            return None
        try:
            return int(metadata["chunk"]), tensors
        except (KeyError, ValueError):
            raise StoreError(f"{path}: chunk is missing or not a number") from None

    def save_samples(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store pictures: `labels` int64 (N,) and one uint8 (N, C, H, W) per method."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(self.root / "samples.npz", buffer.getvalue())

    def load_samples(self) -> dict[str, np.ndarray] | None:
        """The arrays of `save_samples`, or None."""
        path = self.root / "samples.npz"
        if not path.exists():
            return None
        try:
            with open(path, "rb") as handle, np.load(handle) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(f"{path}: cannot be read: {error}") from None

    def drop_partial(self) -> None:
        shutil.rmtree(self.root / "partial", ignore_errors=True)
