"""The ledger only grows, and whatever is done to its file is noticed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpdm.privacy.events import implied_event
from fedpdm.privacy.ledger import START, Ledger, ReleaseRecord, append, read_ledger, release_fields
from fedpdm.storage.files import StoreError
from tests.support.disk_faults import files, full_disk
from tests.support.release_toys import DELTA, epsilon_of, multiplier, settings

Fields = dict[str, Any]


def release_record(number: int, **changes: Any) -> ReleaseRecord:
    parameters = settings(**changes)
    return ReleaseRecord(
        release=number,
        sha256=f"{number:064x}",
        images=10 * number,
        image_shape=(1, 4, 4),
        parameters=parameters,
        event=implied_event(parameters),
        epsilon=epsilon_of([multiplier(**changes)]),
        delta=DELTA,
        noise_source="a source",
        seeded=False,
        at="",
    )


def make_ledger(path: Path) -> Ledger:
    ledger = append(read_ledger(path), "opened", {"client_id": 3})
    ledger = append(ledger, "release", release_fields(release_record(1)))
    return append(ledger, "release", release_fields(release_record(2, t0=700)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def data(path: Path) -> bytes:
    """A ledger of three records, which lies at `path`."""
    make_ledger(path)
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    """The one line with which these bytes are refused as a ledger."""
    path.write_bytes(data)
    try:
        read_ledger(path)
    except StoreError as error:
        line = str(error)
    else:
        raise AssertionError(f"accepted: {data!r}")
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 250
    return line


def forge(bodies: list[Fields], title: str | None = None) -> bytes:
    """A whole new ledger of these records, every checksum right, by the format's description."""
    title = title or (
        "# fedpdm privacy ledger, version 1: one record per line, each with the SHA-256 of all "
        "before it; never edit"
    )
    chain, lines = hashlib.sha256(title.encode()).hexdigest(), [title]
    for body in bodies:
        text = json.dumps(body)
        chain = hashlib.sha256(f"{chain}\n{text}".encode()).hexdigest()
        lines.append(f'{text[:-1]}, "chain": "{chain}"}}')
    return "\n".join([*lines, f"# end: {len(bodies)} records, chain {chain}", ""]).encode()


def bodies_of(data: bytes) -> list[Fields]:
    """The records of a ledger's file without their checksums."""
    records = [json.loads(line) for line in data.decode().split("\n")[1:-2]]
    return [{k: v for k, v in record.items() if k != "chain"} for record in records]


# --- Writing and reading --------------------------------------------------------------------


def test_no_file_is_an_empty_ledger(path: Path) -> None:
    ledger = read_ledger(path)
    assert (ledger.records, ledger.releases(), ledger.client_id) == ((), (), None)
    assert ledger.head == START
    assert not path.exists()


def test_records_come_back(path: Path) -> None:
    made = make_ledger(path)
    got = read_ledger(path)
    assert got == made
    assert [(record.number, record.kind) for record in got.records] == [
        (1, "opened"),
        (2, "release"),
        (3, "release"),
    ]
    assert got.client_id == 3
    first, second = got.releases()
    at = got.records[1].at
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", at)
    wanted = release_record(1)
    assert first.parameters == wanted.parameters
    assert vars(first) == {**vars(wanted), "at": at}
    assert (first.file, second.file) == ("000001.safetensors", "000002.safetensors")
    assert second.parameters.t0 == 700
    assert second.epsilon == pytest.approx(epsilon_of([multiplier(t0=700)]), rel=1e-7)


def test_the_file_is_as_described(data: bytes) -> None:
    """The format's description, worked out again here, gives the same bytes."""
    assert forge(bodies_of(data)) == data
    lines = data.decode().splitlines()
    assert lines[0].startswith("# fedpdm privacy ledger, version 1")
    assert lines[-1] == f"# end: 3 records, chain {json.loads(lines[-2])['chain']}"
    body = bodies_of(data)[1]
    assert body["images"] == 10
    assert body["parameters"]["t0"] == 675
    assert body["epsilon"] == pytest.approx(epsilon_of([multiplier()]), rel=1e-7)


def test_it_only_grows(path: Path) -> None:
    ledger, heads = read_ledger(path), {START}
    for number in range(1, 6):
        old = path.read_bytes() if number > 1 else b""
        kept = old[: old.rindex(b"# end")] if old else b""
        ledger = append(ledger, "opened" if number == 1 else "note", {"client_id": 3, "n": number})
        assert path.read_bytes().startswith(kept)
        assert len(read_ledger(path).records) == number
        assert ledger.head not in heads
        heads.add(ledger.head)
    assert files(path.parent) == {"ledger.jsonl"}


def test_strings_may_hold_anything(path: Path) -> None:
    """Also what some programs take for the end of a line."""
    odd = {"client_id": 3, "text": 'a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x00h"}\\ é 🙂 \ud800'}
    append(append(read_ledger(path), "opened", odd), "note", {"more": odd})
    got = read_ledger(path)
    assert got.records[0].fields == odd
    assert got.records[1].fields == {"more": odd}
    assert path.read_bytes().isascii()
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(path: Path, data: bytes, value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append(read_ledger(path), "note", {"epsilon": value})
    assert path.read_bytes() == data


def test_a_full_disk_leaves_the_old_ledger(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = read_ledger(path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match=r"ledger\.jsonl: cannot be written: no space left"):
        append(ledger, "note", {})
    assert path.read_bytes() == data
    assert files(path.parent) == {"ledger.jsonl"}


# --- Tampering ------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_changed_byte_is_noticed(path: Path, data: bytes) -> None:
    for position, old in enumerate(data):
        for new in {old ^ 1, old ^ 0x20, old ^ 0x80, ord("\n")} - {old}:
            assert refused(path, data[:position] + bytes([new]) + data[position + 1 :])


@pytest.mark.slow
def test_every_byte_more_or_less_is_noticed(path: Path, data: bytes) -> None:
    for position in range(len(data) + 1):
        for added in b"\n 0,":
            assert refused(path, data[:position] + bytes([added]) + data[position:])
        if position < len(data):
            assert refused(path, data[:position] + data[position + 1 :])


def test_a_cut_anywhere_is_noticed(path: Path, data: bytes) -> None:
    for length in range(len(data)):
        assert refused(path, data[:length])
        assert refused(path, data[length + 1 :])


def test_every_line_counts(path: Path, data: bytes) -> None:
    lines = data.split(b"\n")[:-1]
    for at in range(len(lines)):
        assert refused(path, b"\n".join(lines[:at] + lines[at + 1 :]) + b"\n")
        assert refused(path, b"\n".join(lines[: at + 1] + lines[at:]) + b"\n")
        for other in range(at):
            swapped = list(lines)
            swapped[at], swapped[other] = swapped[other], swapped[at]
            assert refused(path, b"\n".join(swapped) + b"\n")
        for inserted in (b"", b"# a remark", b"{}", b'{"record": 2}', lines[2]):
            assert refused(path, b"\n".join([*lines[:at], inserted, *lines[at:]]) + b"\n")


def test_an_older_ledger_under_a_newer_end_is_noticed(path: Path, data: bytes) -> None:
    lines = data.split(b"\n")
    older = b"\n".join([*lines[:3], *lines[4:]])
    assert "was cut or edited: it holds 2 records" in refused(path, older)
    # Only the head, kept elsewhere, gives away one that was shortened with its end.
    path.write_bytes(forge(bodies_of(data)[:2]))
    assert read_ledger(path).head == json.loads(lines[2])["chain"]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda record: json.dumps(record, separators=(",", ":")),
        lambda record: json.dumps(record, sort_keys=True),
        lambda record: json.dumps(record, indent=1).replace("\n", ""),
        lambda record: json.dumps(record) + " ",
        lambda record: json.dumps(record).replace("1e-05", "0.00001"),
        lambda record: json.dumps(record).replace("675", "675.0"),
        lambda record: json.dumps(record).replace('"t0": 675', '"t0": 1, "t0": 675'),
        lambda record: json.dumps(record).replace("a source", "\\u0061 source"),
    ],
)
def test_the_same_record_in_other_words_is_noticed(
    path: Path, data: bytes, rewrite: Callable[[Fields], str]
) -> None:
    lines = data.decode().split("\n")
    record = json.loads(lines[2])
    assert json.dumps(record) == lines[2]
    other = rewrite(record)
    assert json.loads(other) == record
    assert other != lines[2]
    lines[2] = other
    assert "line 3: record was edited, moved or damaged" in refused(path, "\n".join(lines).encode())


# --- Fuzz -----------------------------------------------------------------------------------


def test_random_bytes_are_refused(path: Path, data: bytes) -> None:
    random_bytes = random.Random(0)
    title, *_ = data.split(b"\n")
    for length in (0, 1, 2, 7, 64, 500, 5000):
        for _ in range(40):
            noise = random_bytes.randbytes(length)
            text = bytes(random_bytes.choice(b'{}[]",:0123456789.eE+-tfn\\u \n#') for _ in noise)
            for content in (noise, text):
                assert refused(path, content)
                assert refused(path, title + b"\n" + content)
                assert refused(path, title + b"\n" + content + b"\n# end: 1 records, chain 0\n")


@pytest.mark.slow
def test_random_splices_are_refused(path: Path, data: bytes) -> None:
    chance = random.Random(1)
    for _ in range(2000):
        start, end = sorted(chance.choices(range(len(data) + 1), k=2))
        at = chance.randrange(len(data) + 1)
        spliced = data[:at] + data[start:end] + data[at + chance.randrange(40) :]
        if spliced != data:
            assert refused(path, spliced)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"record": ' + b"9" * 10_000 + b"}",
        b'{"record": 1e999, "kind": "opened", "at": "", "client_id": 3, "chain": ""}',
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b"{}",
        b'{"record": [], "kind": {}, "at": 1, "chain": null}',
        b'{"record": 1, "kind": "opened", "at": "", "client_id": 3, "chain": "\\ud800"}',
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\x00",
        b"",
    ],
)
def test_strange_lines_are_refused(path: Path, data: bytes, line: bytes) -> None:
    lines = data.split(b"\n")
    for at in (1, 2, 3):
        assert refused(path, b"\n".join([*lines[:at], line, *lines[at + 1 :]]))
        assert refused(path, b"\n".join([*lines[:at], line, *lines[at:]]))


def test_deep_nesting_under_a_right_checksum_is_refused(path: Path, data: bytes) -> None:
    bodies = bodies_of(data)
    text = json.dumps(bodies[0])[:-1] + ', "deep": ' + "[" * 50_000 + "]" * 50_000 + "}"
    chain = hashlib.sha256(f"{START}\n{text}".encode()).hexdigest()
    lines = [data.decode().split("\n")[0], f'{text[:-1]}, "chain": "{chain}"}}']
    lines += [f"# end: 1 records, chain {chain}", ""]
    assert "line 2: record cannot be read" in refused(path, "\n".join(lines).encode())


def test_other_encodings_are_refused(path: Path, data: bytes) -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert refused(path, data.decode().encode(encoding))
    assert refused(path, data.replace(b"\n", b"\r\n"))
    assert refused(path, data.replace(b"\n", b"\r"))


def test_a_directory_in_its_place_is_refused(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match=r"ledger\.jsonl: cannot be read: Is a directory"):
        read_ledger(path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"ledger\.jsonl: cannot be read: Not a directory"):
        read_ledger(tmp_path / "file" / "ledger.jsonl")


def test_a_ledger_without_records_is_one(tmp_path: Path) -> None:
    empty = Ledger(path=tmp_path / "ledger.jsonl")
    empty.path.write_text(empty.text())
    assert read_ledger(empty.path) == empty
