"""The files of a client's releases, and the order in which they come to be.

    ledger.jsonl                    what was released (`fedpdm.privacy.ledger`)
    releases/000001.safetensors     digests and identities uint8 (n, 32) of the images in it, of
                                    what was noised and of what came in, and its values

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
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.ledger import Ledger, ReleaseRecord, append, read_ledger, release_fields
from fedpdm.privacy.mechanism import (
    IMAGES,
    ReleaseSource,
    StoredRelease,
    event_of,
    mechanism_of,
    read_release_metadata,
    release_metadata,
    restore_release,
)
from fedpdm.privacy.releases.request import ImageKey, ReleaseIndex, ReleaseRequest, Rows
from fedpdm.privacy.types import Parameters, PrivacyEvent, Release
from fedpdm.storage.files import StoreError, flush_directory, make_directory, read_tensors
from fedpdm.storage.tensorfile import header, num_bytes
from fedpdm.text import json_text

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
            if not self._path(record).exists():
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

    def index(self, ledger: Ledger) -> ReleaseIndex:
        """Which image lies where, from files that are what the ledger says, to the bit."""
        index = {}
        for record in ledger.releases():
            path = self._path(record)
            if _sha256(path) != record.sha256:
                raise StoreError(f"{path}: is not the file that the ledger records; restore it")
            tensors, metadata = read_tensors(path)
            names = ("digests",) if record.preparation is None else ("digests", "identities")
            layout = _layout(
                record.parameters, record.images, record.image_shape, identified=len(names) > 1
            )
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            if metadata != _metadata_of(record) or shapes != {
                name: shape for name, (_, shape) in layout.items()
            }:
                raise StoreError(f"{path}: the ledger says something else of it; restore both")
            found = [
                {bytes(row): at for at, row in enumerate(tensors[name].numpy())} for name in names
            ]
            if any(len(each) != record.images for each in found):
                raise StoreError(f"{path}: the ledger says something else of it; restore both")
            index[record.release] = Rows(pixels=found[0], identities=dict(*found[1:]))
        return index

    def make(
        self,
        ledger: Ledger,
        source: ReleaseSource,
        keys: Sequence[ImageKey],
        request: ReleaseRequest,
        progress: Progress | None,
    ) -> Ledger:
        """Release images, once; see the module for the order of steps."""
        number = len(ledger.releases()) + 1
        ready = self._ready(number)
        temporary = ready.with_suffix(".tmp")
        noise, parameters = request.noise(number), request.parameters
        count, channels, height, width = source.images.shape
        shape = (channels, height, width)
        metadata = _metadata(
            parameters,
            event_of(parameters),
            noise_source=noise.description,
            seeded=noise.seeded,
            image_shape=shape,
            delta=request.delta,
            preparation=request.preparation,
        )
        layout = _layout(parameters, count, shape, identified=True)
        size = num_bytes(layout) - 64 * count
        try:
            make_directory(self.folder)
            if shutil.disk_usage(self.folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(temporary, "wb") as file:
                file.write(header(layout, metadata))
                digests = [key.pixels for key in keys], [key.identity for key in keys]
                file.write(b"".join(itertools.chain(*digests)))
                done = 0
                for chunk in mechanism_of(parameters).make(source, parameters, noise):
                    done += file.write(chunk.data)
                    if progress is not None:
                        progress(done * count // size, count)
                if done != size:
                    raise ValueError(
                        f"release mechanism {parameters.mechanism}: made {done} bytes, its layout "
                        f"has {size}"
                    )
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
        index: ReleaseIndex,
        numbers: Sequence[int],
        digests: Sequence[bytes],
        labels: np.ndarray,
    ) -> Release:
        """What is sent for these images, from releases `numbers`.

        `digests` are those of what was noised, `labels` is int64 (N,), one for each of them.
        """
        records = {record.release: record for record in ledger.releases()}
        stored = []
        metadata: dict[str, str] = {}
        for number in numbers:
            tensors, metadata = read_tensors(self._path(records[number]))
            stored.append(StoredRelease(tensors=tensors, rows=index[number].pixels))
        mechanism = mechanism_of(records[numbers[0]].parameters)
        try:
            tensors = mechanism.gather(stored, digests, labels)
            return restore_release(tensors, metadata, check_values=False)
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
                images=len(tensors["digests"]),
                image_shape=_image_shape(tensors, metadata),
                parameters=parameters,
                event=event,
                epsilon=epsilon_spent([event], delta=delta),
                delta=delta,
                noise_source=metadata["noise_source"],
                seeded=metadata["seeded"] == "true",
                at="",
                preparation=_preparation(metadata),
            )
        except (KeyError, ValueError) as error:
            raise StoreError(f"{ready}: {error}") from None
        return append(ledger, "release", release_fields(record))


def _layout(
    parameters: Parameters, count: int, image_shape: tuple[int, int, int], *, identified: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a release's file, in order; files of earlier versions know no identities."""
    values = mechanism_of(parameters).layout(parameters, count, image_shape)
    digests = dict.fromkeys(("digests", "identities")[: 1 + identified], ("U8", (count, 32)))
    return {**digests, **values}


def _metadata(
    parameters: Parameters,
    event: PrivacyEvent,
    *,
    noise_source: str,
    seeded: bool,
    image_shape: tuple[int, int, int],
    delta: float,
    preparation: Mapping[str, Any] | None,
) -> dict[str, str]:
    """What a release's file says of itself; the shape of images where its values do not."""
    made_with = release_metadata(parameters, event, noise_source=noise_source, seeded=seeded)
    if parameters.mechanism != IMAGES:
        made_with["image_shape"] = "x".join(map(str, image_shape))
    if preparation is not None:
        made_with["preparation"] = json_text(dict(preparation), indent=None)
    return {**made_with, "delta": repr(delta)}


def _metadata_of(record: ReleaseRecord) -> dict[str, str]:
    """What the file of a recorded release says of itself."""
    return _metadata(
        record.parameters,
        record.event,
        noise_source=record.noise_source,
        seeded=record.seeded,
        image_shape=record.image_shape,
        delta=record.delta,
        preparation=record.preparation,
    )


def _preparation(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What had been done to the images in a release's file, if it says so."""
    return dict(json.loads(metadata["preparation"])) if "preparation" in metadata else None


def _image_shape(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[int, int, int]:
    """(C, H, W) of the images in a release's file."""
    if "image_shape" in metadata:
        channels, height, width = map(int, metadata["image_shape"].split("x"))
    else:
        channels, height, width = tensors["x_tilde"].shape[1:]
    return channels, height, width


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
