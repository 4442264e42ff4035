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
    failures.txt              what failed and was kept at home, a line each, with the time
    classes.json              images per class; classes-noised.json: with noise, for exports
    sampling.json             how it chose to sample (`fedpdm.setup.choice`)
    partial/                  fine-model checkpoints inside a round

Every file is written under a temporary name, flushed to disk and renamed, so a crash leaves the
old state or the new one. Every file that is read again carries a digest, and all but the samples
say whose they are (`fedpdm.storage.files`). A process serves several clients: all state is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig, run_digest
from fedpdm.storage.files import (
    Label,
    StoreError,
    clear_leftovers,
    flush_directory,
    locked,
    read_json,
    read_sealed_zip,
    read_tensors,
    write_atomic,
    write_json,
    write_sealed_zip,
    write_tensors,
)
from fedpdm.text import finite, json_text

__all__ = ["ClientStore", "Reply", "store_label"]


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


def store_label(config: RunConfig, client_id: int) -> dict[str, str]:
    """What a client's files of a run with this config say of whose they are."""
    return {"client": str(client_id), "config": run_digest(config)}


class ClientStore:
    """One client's directory. Use inside `with store.lock():` for anything that writes.

    `label` says whose it is (`store_label`): files are written with it, and one that has another is
    refused. Without one nothing is said or compared.
    """

    KEEP_ROUNDS = 2

    def __init__(self, root: Path, label: Label | None = None) -> None:
        self.root = root
        self._label = dict(label or {})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive access to the store across processes; waits for the other holder.

        What killed processes left half written is removed.
        """
        with locked(self.root / ".lock"):
            for folder in (self.root, self.root / "partial"):
                clear_leftovers(folder)
            yield

    def check(self) -> None:
        """`StoreError`, naming the file, unless all that a resumed run reads is as written."""
        last = self.last_round()
        for name in ("coarse", "fine"):
            self.load_state(last, name)
        for folder in self._finished():
            self.load_reply(int(folder.name))
        self.load_partial(last + 1)
        self.load_class_counts()
        self.load_statement()
        self.load_record("sampling")
        if (members := self.root / "members.json").exists():
            read_json(members)

    def ledger_heads(self) -> list[str]:
        """Heads of the ledger of releases at the time the kept rounds were answered."""
        records = (self._read_reply(int(folder.name)) for folder in self._finished())
        return [str(record["ledger"]) for record in records if record.get("ledger")]

    def save_record(self, name: str, record: Mapping[str, Any], *, part: str = "") -> None:
        """Write `name`.json, plain data; `part` is what its label says it is, default its name."""
        write_json(self.root / f"{name}.json", record, self._named(part or name))

    def load_record(self, name: str, *, part: str = "") -> dict[str, Any] | None:
        """What `save_record` wrote, or None; `StoreError` if it is damaged or another's."""
        path = self.root / f"{name}.json"
        return read_json(path, self._named(part or name)) if path.exists() else None

    def save_statement(self, statement: Mapping[str, Any], words: str) -> None:
        """Write what this client has released, in numbers and in words."""
        self.save_record("privacy", statement)
        write_atomic(self.root / "privacy.txt", words.encode())

    def load_statement(self) -> dict[str, Any] | None:
        """The numbers of `save_statement`, or None."""
        return self.load_record("privacy")

    def save_class_counts(self, counts: np.ndarray) -> None:
        """Write how many images of each class train the fine model, int64 (K,). They stay here."""
        self.save_record("classes", {"counts": counts.tolist()})

    def load_class_counts(self) -> np.ndarray | None:
        """What `save_class_counts` wrote, or None; `StoreError` if it is damaged."""
        path = self.root / "classes.json"
        if not path.exists():
            return None
        try:
            old = path.read_bytes().startswith(b"[")  # of earlier versions, without a digest
            known = None if old else self.load_record("classes")
            found = json.loads(path.read_bytes()) if known is None else known.get("counts")
            counts = np.array(found, dtype=np.int64)
        except StoreError:
            raise
        except (ValueError, TypeError, OverflowError):
            counts = np.zeros(0, dtype=np.int64)
        if counts.ndim != 1 or not len(counts) or (counts < 0).any():
            raise StoreError(f"{path}: must be a list of counts, one per class")
        return counts

    def note_failure(self, line: str) -> None:
        """Note for the owner what failed and was not told to the server: the last 1,000 lines."""
        path = self.root / "failures.txt"
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        new = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line[:2000]}"
        write_atomic(path, "".join(f"{each}\n" for each in [*before[-999:], new]).encode())

    def _named(self, part: str, **more: object) -> dict[str, str]:
        """The label of a file of this store; none where the store has none."""
        rest = {"part": part, **{name: str(value) for name, value in more.items()}}
        return self._label | rest if self._label else {}

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
        return read_tensors(path, self._named(name, round=round))[0] if path.exists() else {}

    def begin_round(self, round: int) -> None:
        """Forget what an interrupted attempt at `round` drafted."""
        shutil.rmtree(self._draft_path(round), ignore_errors=True)

    def draft_state(self, round: int, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a model's state after `round`; it counts once the round is finished."""
        path = self._draft_path(round) / f"{name}.safetensors"
        write_tensors(path, tensors, label=self._named(name, round=round))

    def draft_previous_state(self, round: int, name: str) -> None:
        """Draft the state of the last finished round once more, if it had one.

        A file that is damaged is kept as it is: nothing takes its place until its owner does.
        """
        draft = self._draft_path(round) / f"{name}.safetensors"
        draft.unlink(missing_ok=True)  # of the attempt that failed
        try:
            state = self.load_state(self.last_round(), name)
        except StoreError:
            draft.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._round_path(self.last_round()) / draft.name, draft)
            raise
        if state:
            self.draft_state(round, name, state)

    def load_reply(self, round: int) -> Reply | None:
        """The reply given in `round`, or None if it is not there (any more)."""
        folder = self._round_path(round)
        if not (folder / "reply.json").exists():
            return None
        record = self._read_reply(round)
        try:
            payload = (folder / "reply.safetensors").read_bytes()
            if record.pop("payload", None) not in (None, _digest(payload)):
                raise StoreError(
                    f"{folder / 'reply.safetensors'}: is not what reply.json records; restore both"
                )
            return Reply(round=round, payload=payload, **record)
        except OSError as error:
            raise StoreError(f"{folder}: reply cannot be read: {error}") from None
        except TypeError as error:
            raise StoreError(f"{folder / 'reply.json'}: reply cannot be read: {error}") from None

    def _read_reply(self, round: int) -> dict[str, Any]:
        return read_json(self._round_path(round) / "reply.json", self._named("reply", round=round))

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
            record["payload"] = _digest((draft / "reply.safetensors").read_bytes())
            write_json(draft / "reply.json", record, self._named("reply", round=reply.round))
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

    def save_partial(
        self,
        round: int,
        chunk: int,
        tensors: Mapping[str, torch.Tensor],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Fine-model state after `chunk` chunks of `round`, and what was measured in them."""
        write_tensors(
            self.root / "partial" / "fine.safetensors",
            tensors,
            {
                "round": str(round),
                "chunk": str(chunk),
                "notes": json_text(dict(notes or {}), indent=None),
            },
            self._named("partial"),
        )

    def load_partial(
        self, round: int
    ) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """(chunks done, state, notes) of an interrupted `round`, or None."""
        path = self.root / "partial" / "fine.safetensors"
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path, self._named("partial"))
        if metadata.get("round") != str(round):
            return None
        try:
            return int(metadata["chunk"]), tensors, json.loads(metadata.get("notes", "{}"))
        except (KeyError, ValueError):
            raise StoreError(f"{path}: chunk is missing or not a number") from None

    def save_samples(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store pictures: `labels` int64 (N,) and one uint8 (N, C, H, W) per method."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_sealed_zip(self.root / "samples.npz", buffer.getvalue())

    def load_samples(self) -> dict[str, np.ndarray] | None:
        """The arrays of `save_samples`, or None."""
        path = self.root / "samples.npz"
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(read_sealed_zip(path)), allow_pickle=False) as file:
                return dict(file)
        except StoreError:
            raise
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise StoreError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None

    def drop_partial(self) -> None:
        shutil.rmtree(self.root / "partial", ignore_errors=True)


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
