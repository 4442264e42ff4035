"""The ledger: what a client has released, one checksummed line per event, append-only.

    # fedpdm privacy ledger, version 1: ...
    {"record": 1, "kind": "opened", "at": "2026-11-24T09:00:00Z", "mark": ..., "chain": "5f..."}
    {"record": 2, "kind": "release", "images": 361, "parameters": {...}, ..., "chain": "a0..."}
    # end: 2 records, chain a0...

A record's `mark` is a random number. A client shows its marks to the coordinator, who so notices a
ledger that was cut or replaced: they say nothing else (a chain is computed from digests of images,
so whoever has one could test a guess). Records of earlier versions have none.

A record's `chain` is the SHA-256 of the chain before it and of the record itself, so that no line
can be changed, removed, added or moved without notice; the last line gives away a file that was
cut. Whoever can write to the disk could recompute the whole chain: the head printed by `fedpdm
ledger`, kept elsewhere, shows that too. Every write makes the old lines appear again unchanged
with one more, atomically.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.mechanism import (
    IMAGES,
    mechanism_field,
    parameter_fields,
    recorded_event,
    recorded_mechanism,
)
from fedpdm.privacy.types import Parameters, PrivacyEvent
from fedpdm.storage.files import StoreError, write_atomic

__all__ = ["Ledger", "Record", "ReleaseRecord", "append", "read_ledger", "release_fields"]

TITLE = (
    "# fedpdm privacy ledger, version 1: one record per line, each with the SHA-256 of all before "
    "it; never edit"
)
START = hashlib.sha256(TITLE.encode()).hexdigest()
NO_MARK = "0" * 16  # of records of earlier versions
_MARK = re.compile(r"(?:[0-9a-f]{16})?")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line: its number from 1, what kind of event, when (UTC), further fields, its chain; and a
    random number of 16 hexadecimal digits, or none."""

    number: int
    kind: str
    at: str
    fields: Mapping[str, Any]
    chain: str
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class ReleaseRecord:
    """A record of kind `release`: `images` images were released once, as release `release`.

    `image_shape` is theirs, `preparation` what had been done to them since they came in (None in
    records of versions that did not say), `sha256` is that of the file, `epsilon` what one image
    paid for this release at `delta`.
    """

    release: int
    sha256: str
    images: int
    image_shape: tuple[int, int, int]
    parameters: Parameters
    event: PrivacyEvent
    epsilon: float
    delta: float
    noise_source: str
    seeded: bool
    at: str
    preparation: Mapping[str, Any] | None = None

    @property
    def file(self) -> str:
        """Name of its file in the store's `releases/`."""
        return f"{self.release:06d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All records of a client's store, in order."""

    path: Path
    records: tuple[Record, ...] = ()

    @property
    def head(self) -> str:
        """The chain after the last record."""
        return self.records[-1].chain if self.records else START

    @property
    def marks(self) -> str:
        """The random numbers of all records, 16 digits each."""
        return "".join(record.mark or NO_MARK for record in self.records)

    @property
    def client_id(self) -> int | None:
        """Whose store this is; None for a new one."""
        return int(self.records[0].fields["client_id"]) if self.records else None

    def releases(self) -> tuple[ReleaseRecord, ...]:
        """The releases, in order, each checked; `StoreError` for one that contradicts itself."""
        return self._releases

    @functools.cached_property
    def _releases(self) -> tuple[ReleaseRecord, ...]:
        return tuple(
            _release_record(self.path, record)
            for record in self.records
            if record.kind == "release"
        )

    def text(self) -> str:
        """The file's content."""
        lines = [TITLE, *(_line(record) for record in self.records)]
        return "\n".join([*lines, _end(self)]) + "\n"


def _body(record: Record) -> str:
    named = {"record": record.number, "kind": record.kind, "at": record.at}
    mark = {"mark": record.mark} if record.mark else {}
    return json.dumps({**named, **mark, **record.fields}, allow_nan=False)


def _line(record: Record) -> str:
    return f'{_body(record)[:-1]}, "chain": "{record.chain}"}}'


def _end(ledger: Ledger) -> str:
    return f"# end: {len(ledger.records)} records, chain {ledger.head}"


def _chain(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()


def append(ledger: Ledger, kind: str, fields: Mapping[str, Any]) -> Ledger:
    """The ledger with one more record, on disk when this returns."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    record = Record(
        number=len(ledger.records) + 1,
        kind=kind,
        at=now,
        fields=fields,
        chain="",
        mark=secrets.token_hex(8),
    )
    record = dataclasses.replace(record, chain=_chain(ledger.head, _body(record)))
    longer = dataclasses.replace(ledger, records=(*ledger.records, record))
    write_atomic(ledger.path, longer.text().encode())
    return longer


def read_ledger(path: Path) -> Ledger:
    """The ledger in a file, every record checked; empty if there is no file.

    `StoreError` with the line at fault if it was edited, cut or damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Ledger(path=path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: ledger is damaged: {error}") from None
    if lines[0] != TITLE:
        raise StoreError(f"{path}: line 1: is not the title of a ledger of version 1")
    if len(lines) < 3 or lines[-1] or not lines[-2].startswith("# end: "):
        raise StoreError(f"{path}: ledger was cut: its last line is missing")
    ledger = Ledger(path=path)
    for number, line in enumerate(lines[1:-2], 1):
        record = _parse(path, number, line, before=ledger.head)
        ledger = dataclasses.replace(ledger, records=(*ledger.records, record))
    if lines[-2] != _end(ledger):
        raise StoreError(
            f"{path}: ledger was cut or edited: it holds {len(ledger.records)} records, its last "
            f"line says {lines[-2][2:40]!r}"
        )
    if ledger.records and ledger.records[0].kind != "opened":
        raise StoreError(f"{path}: line 2: a ledger begins with a record of kind opened")
    ledger.releases()
    return ledger


def _parse(path: Path, number: int, line: str, *, before: str) -> Record:
    where = f"{path}: line {number + 1}"
    try:
        fields = json.loads(line)
        record = Record(
            number=fields.pop("record"),
            kind=fields.pop("kind"),
            at=fields.pop("at"),
            chain=fields.pop("chain"),
            mark=fields.pop("mark", ""),
            fields=fields,
        )
        body = _body(record)
        known = _line(record) == line and _MARK.fullmatch(record.mark) is not None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:100]
        raise StoreError(f"{where}: record cannot be read: {problem}") from None
    if not known or record.number != number or record.chain != _chain(before, body):
        raise StoreError(f"{where}: record was edited, moved or damaged: its checksum is wrong")
    if record.kind == "opened" and type(fields.get("client_id")) is not int:
        raise StoreError(f"{where}: record opened has no client_id")
    return record


def release_fields(record: ReleaseRecord) -> dict[str, Any]:
    """The fields of a ledger record for a release."""
    prepared = record.preparation
    return {
        "release": record.release,
        "file": record.file,
        "sha256": record.sha256,
        "images": record.images,
        "image_shape": list(record.image_shape),
        **({} if prepared is None else {"preparation": dict(prepared)}),
        **mechanism_field(record.parameters),
        "parameters": parameter_fields(record.parameters),
        **dataclasses.asdict(record.event),
        "epsilon": record.epsilon,
        "delta": record.delta,
        "noise_source": record.noise_source,
        "seeded": record.seeded,
    }


def _release_record(path: Path, record: Record) -> ReleaseRecord:
    """A release read back; its numbers must follow from its parameters."""
    fields = record.fields
    try:
        mechanism = recorded_mechanism(fields.get("mechanism", IMAGES))
        parameters = mechanism.parameters(**fields["parameters"])
        made = ReleaseRecord(
            release=int(fields["release"]),
            sha256=str(fields["sha256"]),
            images=int(fields["images"]),
            image_shape=tuple(fields["image_shape"]),
            parameters=parameters,
            event=recorded_event(parameters, fields),
            epsilon=float(fields["epsilon"]),
            delta=float(fields["delta"]),
            noise_source=str(fields["noise_source"]),
            seeded=bool(fields["seeded"]),
            at=record.at,
            preparation=fields.get("preparation"),
        )
        spent = epsilon_spent([made.event], delta=made.delta)
        sound = (
            math.isclose(spent, made.epsilon, rel_tol=1e-6)
            and len(made.image_shape) == 3
            and min(made.images, *made.image_shape) >= 1
            and json.dumps(release_fields(made)) == json.dumps(dict(fields))  # types too
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        problem = " ".join(str(error).split())[:200]
        raise StoreError(f"{path}: record {record.number}: {problem}") from None
    if not sound:
        raise StoreError(f"{path}: record {record.number}: its numbers contradict each other")
    return made
