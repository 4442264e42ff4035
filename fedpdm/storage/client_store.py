"""A client's disk: its training state and the replies already given.

    ledger.jsonl  releases/   what it has released (`fedpdm.privacy.releases`), here or elsewhere
    privacy.json  privacy.txt what that promises
    members.json              in simulation: which images trained its models (`fedpdm.data.members`)
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

import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.storage.files import (
    StoreError,
    flush_directory,
    locked,
    read_json,
    read_tensors,
    write_atomic,
    write_tensors,
)
from fedpdm.text import finite, json_text

__all__ = ["ClientStore", "Reply"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client answered in a round: `payload` (empty for nothing, None if it was drafted),
    metrics, the fingerprint of the message it answered, and the head of its ledger of releases."""

    round: int
    payload: bytes | None
    num_examples: int
    metrics: dict[str, Any]
    request: str
    ledger: str = ""


class ClientStore:
    """One client's directory. Use inside `with store.lock():` for anything that writes."""

    KEEP_ROUNDS = 2

    def __init__(self, root: Path) -> None:
        self.root = root

    def lock(self) -> AbstractContextManager[None]:
        """Exclusive access to the store across processes; waits for the other holder."""
        return locked(self.root / ".lock")

    def ledger_heads(self) -> list[str]:
        """Heads of the ledger of releases at the time the kept rounds were answered."""
        records = (read_json(folder / "reply.json") for folder in self._finished())
        return [str(record["ledger"]) for record in records if record.get("ledger")]

    def save_statement(self, statement: Mapping[str, Any], words: str) -> None:
        """Write what this client has released, in numbers and in words."""
        write_atomic(self.root / "privacy.json", (json_text(statement) + "\n").encode())
        write_atomic(self.root / "privacy.txt", words.encode())

    def load_statement(self) -> dict[str, Any] | None:
        """The numbers of `save_statement`, or None."""
        path = self.root / "privacy.json"
        return read_json(path) if path.exists() else None

    def save_class_counts(self, counts: np.ndarray) -> None:
        """Write how many images of each class train the fine model, int64 (K,). They stay here."""
        write_atomic(
            self.root / "classes.json", (json_text(counts.tolist(), indent=None) + "\n").encode()
        )

    def load_class_counts(self) -> np.ndarray | None:
        """What `save_class_counts` wrote, or None; `StoreError` if it is damaged."""
        path = self.root / "classes.json"
        if not path.exists():
            return None
        try:
            counts = np.array(json.loads(path.read_bytes()), dtype=np.int64)
        except (ValueError, TypeError, OverflowError):
            counts = np.zeros(0, dtype=np.int64)
        if counts.ndim != 1 or not len(counts) or (counts < 0).any():
            raise StoreError(f"{path}: must be a list of counts, one per class")
        return counts

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

    def load_state(self, round: int, name: str) -> dict[str, torch.Tensor]:
        """Training state of a model (coarse, fine) after `round`; empty where there is none."""
        path = self._round_path(round) / f"{name}.safetensors"
        return read_tensors(path)[0] if path.exists() else {}

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
        record = read_json(folder / "reply.json")
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
            "metrics": {k: v for k, v in reply.metrics.items() if finite(v) is not None},
            "request": reply.request,
            "ledger": reply.ledger,
        }
        try:
            for name, tensors in (state or {}).items():
                self.draft_state(reply.round, name, tensors)
            if reply.payload is not None:
                self.draft_payload(reply.round, reply.payload)
            write_atomic(draft / "reply.json", json_text(record).encode())
            os.replace(draft, final)
            flush_directory(final.parent)
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
