"""The files of a client's releases, and the order in which they come to be.

    ledger.jsonl                    what was released (`fedpdm.privacy.ledger`)
    releases/000001.safetensors     digests uint8 (n, 32) and x_tilde float32 (n, C, H, W)

A release is written to a `.tmp` file as it is made (it need not fit into memory), renamed to
`.ready` when complete, recorded in the ledger, and only then renamed to its name, under which alone
it is read. After a crash at any point `recover` finishes what was complete and discards what was
not: no noise that was complete is drawn again, and nothing incomplete was ever read or sent.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.ledger import Ledger, ReleaseRecord, append, read_ledger, release_fields
from fedpdm.privacy.mechanism import (
    implied_event,
    noised_chunks,
    read_release_metadata,
    release_metadata,
    restore_release,
)
from fedpdm.privacy.releases.request import DigestIndex, ReleaseRequest
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.storage.files import StoreError, flush_directory, make_directory, read_tensors
from fedpdm.storage.tensorfile import header

__all__ = ["Progress", "ReleaseArchive"]

Progress = Callable[[int, int], None]


class ReleaseArchive:
    """Ledger and release files of one directory. Writing needs the store's lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "releases"
        self.ledger_path = root / "ledger.jsonl"

    def ledger(self) -> Ledger:
        """The ledger, checked against itself and against the files that it names; reads only."""
        # Listed first: a release is recorded before it gets its name, maybe at this moment.
        there = {path.name for path in self.folder.glob("*.safetensors")}
        ledger = read_ledger(self.ledger_path)
        recorded = ledger.releases()
        if [record.release for record in recorded] != list(range(1, len(recorded) + 1)):
            raise StoreError(f"{self.ledger_path}: its releases are not numbered 1, 2, ...")
        if unknown := sorted(there - {record.file for record in recorded}):
            raise StoreError(
                f"{self.folder / unknown[0]}: is not in the ledger, which was cut or replaced; "
                "restore it"
            )
        for record in recorded:
            if not (self._ready(record.release).exists() or self._path(record).exists()):
                raise StoreError(
                    f"{self._path(record)}: is gone; its {record.images} images were released, "
                    "and noising them again would be a second release: restore it"
                )
        return ledger

    def recover(self) -> Ledger:
        """The ledger, after finishing what a crash interrupted."""
        for leftover in (*self.folder.glob("*.tmp"), *self.root.glob(".ledger.jsonl.*.tmp")):
            leftover.unlink()
        ledger = self.ledger()
        next_one = self._ready(len(ledger.releases()) + 1)
        if next_one.exists() and ledger.records:  # complete, not yet recorded
            ledger = self._record(ledger, next_one)
        recorded = {self._ready(record.release) for record in ledger.releases()}
        for ready in self.folder.glob("*.ready"):
            if ready not in recorded or ready.with_suffix(".safetensors").exists():
                raise StoreError(f"{ready}: does not follow the ledger's releases; restore it")
            self._name(ready)
        return ledger

    def index(self, ledger: Ledger) -> DigestIndex:
        """Which image lies where, from files that are what the ledger says, to the bit."""
        index = {}
        for record in ledger.releases():
            path = self._path(record)
            if _sha256(path) != record.sha256:
                raise StoreError(f"{path}: is not the file that the ledger records; restore it")
            tensors, metadata = read_tensors(path)
            known = {bytes(row): at for at, row in enumerate(tensors["digests"].numpy())}
            shape = tuple(tensors["x_tilde"].shape)
            if (
                metadata != _metadata(record)
                or shape != (record.images, *record.image_shape)
                or len(known) != record.images
            ):
                raise StoreError(f"{path}: the ledger says something else of it; restore both")
            index[record.release] = known
        return index

    def make(
        self,
        ledger: Ledger,
        images: np.ndarray,
        digests: Sequence[bytes],
        request: ReleaseRequest,
        progress: Progress | None,
    ) -> Ledger:
        """Noise images uint8 (N, C, H, W), once; see the module for the order of steps."""
        number = len(ledger.releases()) + 1
        ready = self._ready(number)
        temporary = ready.with_suffix(".tmp")
        noise = request.noise(number)
        metadata = release_metadata(
            request.parameters,
            implied_event(request.parameters),
            noise_source=noise.description,
            seeded=noise.seeded,
        )
        layout = {"digests": ("U8", (len(images), 32)), "x_tilde": ("F32", images.shape)}
        try:
            make_directory(self.folder)
            if shutil.disk_usage(self.folder).free < 4 * images.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(temporary, "wb") as file:
                file.write(header(layout, {**metadata, "delta": repr(request.delta)}))
                file.write(b"".join(digests))
                done = 0
                for chunk in noised_chunks(images, parameters=request.parameters, noise=noise):
                    file.write(chunk.data)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, len(images))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, ready)
            flush_directory(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            full = error.errno == errno.ENOSPC
            reason = "no space left on the device" if full else error.strerror
            raise StoreError(
                f"{ready.with_suffix('.safetensors')}: cannot be written: {reason}; nothing was "
                "released"
            ) from None
        ledger = self._record(ledger, ready)
        self._name(ready)
        return ledger

    def assemble(
        self,
        ledger: Ledger,
        index: DigestIndex,
        numbers: Sequence[int],
        digests: Sequence[bytes],
        labels: np.ndarray,
    ) -> ReleasedDataset:
        """The rows of these images from releases `numbers`, mapped from disk if they lie in order.

        `labels` is int64 (N,), one for each of the digests.
        """
        records = {record.release: record for record in ledger.releases()}
        parts, start = [], 0
        rows: dict[bytes, int] = {}
        metadata: dict[str, str] = {}
        for number in numbers:
            tensors, metadata = read_tensors(self._path(records[number]))
            parts.append(tensors["x_tilde"])
            rows |= {digest: start + at for digest, at in index[number].items()}
            start += len(parts[-1])
        x_tilde = parts[0] if len(parts) == 1 else torch.cat(parts)
        chosen = np.array([rows[digest] for digest in digests])
        if not np.array_equal(chosen, np.arange(len(x_tilde))):
            x_tilde = x_tilde[torch.from_numpy(chosen)]
        try:
            return restore_release(
                x_tilde, torch.from_numpy(labels.copy()), metadata, check_values=False
            )
        except ValueError as error:
            raise StoreError(f"{self.folder}: {error}") from None

    # Within.

    def _ready(self, number: int) -> Path:
        return self.folder / f"{number:06d}.ready"

    def _path(self, record: ReleaseRecord) -> Path:
        """Where a recorded release lies: under its name, or still to be renamed after a crash."""
        final, ready = self.folder / record.file, self._ready(record.release)
        return ready if ready.exists() and not final.exists() else final

    def _name(self, ready: Path) -> None:
        """Give a recorded release its name."""
        try:
            os.replace(ready, ready.with_suffix(".safetensors"))
            flush_directory(self.folder)
        except OSError as error:
            raise StoreError(f"{ready}: cannot be renamed: {error.strerror}") from None

    def _record(self, ledger: Ledger, ready: Path) -> Ledger:
        """Append a complete file to the ledger."""
        tensors, metadata = read_tensors(ready)
        try:
            parameters, event = read_release_metadata(metadata)
            delta = float(metadata["delta"])
            record = ReleaseRecord(
                release=len(ledger.releases()) + 1,
                sha256=_sha256(ready),
                images=len(tensors["x_tilde"]),
                image_shape=tuple(tensors["x_tilde"].shape[1:]),  # type: ignore[arg-type]
                parameters=parameters,
                event=event,
                epsilon=epsilon_spent([event], delta=delta),
                delta=delta,
                noise_source=metadata["noise_source"],
                seeded=metadata["seeded"] == "true",
                at="",
            )
        except (KeyError, ValueError) as error:
            raise StoreError(f"{ready}: {error}") from None
        return append(ledger, "release", release_fields(record))


def _metadata(record: ReleaseRecord) -> dict[str, str]:
    """What the file of a recorded release says of itself."""
    made_with = release_metadata(
        record.parameters, record.event, noise_source=record.noise_source, seeded=record.seeded
    )
    return {**made_with, "delta": repr(record.delta)}


def _sha256(path: Path) -> str:
    """SHA-256 of a file; computed anew when its inode, size or times have changed."""
    try:
        status = path.stat()
        return _sha256_of(path, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=1024)
def _sha256_of(path: Path, *_identity: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
