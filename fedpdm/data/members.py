"""Which images trained a model: the record that a run keeps, so that attacks can be judged.

In simulation every client writes `members.json` in its store when it trains, a server that trains
on raw images (a baseline) writes one for all clients. Images are known by their position in the
run's `train` split (after `data.max_images`) and by the SHA-256 of their pixels. So an attack reads
who held what, and notices if the data are not those that were trained on. Digests
of private images are private: the record stays where the images are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.data import ImageSet
from fedpdm.storage.files import StoreError, read_json, write_atomic
from fedpdm.text import json_text

__all__ = [
    "ImageRecord",
    "MemberRecord",
    "check_members",
    "read_members",
    "record_images",
    "save_members",
]

SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """Images of the split: `indices`, their positions, and `digests`, hexadecimal SHA-256."""

    indices: tuple[int, ...]
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, rows: NDArray[np.int64]) -> ImageRecord:
        """The images at `rows` (k,) of this record, in that order."""
        return ImageRecord(
            indices=tuple(self.indices[row] for row in rows.tolist()),
            digests=tuple(self.digests[row] for row in rows.tolist()),
        )

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 (n,)."""
        return np.array(self.indices, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class MemberRecord:
    """One client's images: `train` is what training draws from, `heldout` what it never sees.

    `trained` says which model was trained on them and in what form: `coarse` on `released`, `raw`
    or (through DP-SGD) `dp_sgd` images, `fine` on `raw` ones.
    """

    client_id: int
    train: ImageRecord
    heldout: ImageRecord
    trained: Mapping[str, str] = field(default_factory=dict)

    def with_model(self, role: str, basis: str) -> MemberRecord:
        """The same images, one model more."""
        return replace(self, trained={**self.trained, role: basis})

    def fields(self) -> dict[str, Any]:
        """Plain data for JSON."""
        images = {
            name: {"indices": list(part.indices), "sha256": list(part.digests)}
            for name, part in (("train", self.train), ("heldout", self.heldout))
        }
        return {
            "client_id": self.client_id,
            "split": SPLIT,
            "trained": dict(self.trained),
            **images,
        }


def record_images(images: ImageSet, indices: NDArray[np.int64]) -> ImageRecord:
    """The record of `images`, whose positions in the split are `indices` (n,)."""
    if len(images) != len(indices):
        raise ValueError(f"indices must be {len(images)}, one per image, got {len(indices)}")
    return ImageRecord(
        indices=tuple(indices.tolist()),
        digests=tuple(bytes(row).hex() for row in images.image_digests()),
    )


def save_members(path: Path, record: MemberRecord) -> None:
    """Write which images train a model; `StoreError` if others trained an earlier round."""
    if path.exists():
        (known,) = read_members(path)
        record = replace(record, trained={**known.trained, **record.trained})
        if known == record:
            return
        if (known.train, known.heldout) != (record.train, record.heldout):
            raise StoreError(
                f"{path}: earlier rounds were trained on other images of client "
                f"{record.client_id}; the data have changed since"
            )
    write_atomic(path, (json_text(record.fields(), indent=None) + "\n").encode())


def read_members(path: Path) -> tuple[MemberRecord, ...]:
    """The records of a file: a client's one, or a server's of all clients.

    `StoreError` if it is missing or damaged.
    """
    if not path.exists():
        raise StoreError(
            f"{path}: is missing; the run did not train this model, has not begun, or is from "
            "before members were recorded: train it anew"
        )
    content = read_json(path)
    try:
        return tuple(_read(fields) for fields in content.get("clients", [content]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: is no record of members: {error}") from None


def _read(fields: Mapping[str, Any]) -> MemberRecord:
    if fields["split"] != SPLIT:
        raise ValueError(f"split must be {SPLIT}, got {fields['split']!r}")
    parts = {}
    for name in ("train", "heldout"):
        indices = tuple(int(index) for index in fields[name]["indices"])
        digests = tuple(str(digest) for digest in fields[name]["sha256"])
        if len(indices) != len(digests) or len(set(indices)) != len(indices):
            raise ValueError(f"{name}: {len(indices)} indices, {len(digests)} digests, or repeats")
        parts[name] = ImageRecord(indices=indices, digests=digests)
    return MemberRecord(
        client_id=int(fields["client_id"]), trained=dict(fields["trained"]), **parts
    )


def check_members(records: Sequence[MemberRecord], images: ImageSet, *, what: str) -> None:
    """`StoreError`, naming `what`, unless every recorded image lies in `images`, the run's split.

    Also refuses an image that is recorded both as trained on and as held out.
    """
    for record in records:
        for name, part in (("train", record.train), ("heldout", record.heldout)):
            if not len(part):
                continue
            outside = [index for index in part.indices if not 0 <= index < len(images)]
            found = () if outside else images.subset(part.positions).image_digests()
            wrong = sum(
                bytes(row).hex() != digest for row, digest in zip(found, part.digests, strict=False)
            )
            if outside or wrong:
                raise StoreError(
                    f"{what}: {len(outside) or wrong} of {len(part)} {name} images of client "
                    f"{record.client_id} are not those of the data set now; the data have changed "
                    "since the run"
                )
        if both := set(record.train.digests) & set(record.heldout.digests):
            raise StoreError(
                f"{what}: {len(both)} images of client {record.client_id} are recorded as trained "
                "on and as held out"
            )
