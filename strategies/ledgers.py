"""What participants have shown of their ledgers: they may only grow.

A participant whose store was set back, from a backup for instance, would noise again what it had
released since. Its ledger cannot tell; the coordinator can. It keeps, from run to run, the marks
that each participant showed (`fedpdm.privacy.ledger`): random numbers, one for each record.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedpdm.storage.files import StoreError, locked, read_json, write_atomic
from fedpdm.text import json_text

__all__ = ["SeenLedgers"]

MARK = 16  # digits of a record's mark
MOST = 1 << 20  # digits that are kept of a client
_MARKS = re.compile(r"(?:[0-9a-f]{16})*")


class SeenLedgers:
    """Marks by client id, in the file `path`; without one nothing is kept and nothing noticed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def check(self, client_id: int, marks: object) -> str | None:
        """Remember what a client shows now; a line if it does not continue what it showed before.

        `StoreError` if the file cannot be read or written.
        """
        if self._path is None:
            return None
        if not (isinstance(marks, str) and len(marks) <= MOST and _MARKS.fullmatch(marks)):
            marks = ""  # as good as none
        with locked(self._path.with_suffix(".lock")):
            seen = read_json(self._path) if self._path.exists() else {}
            before = seen.get(str(client_id), "")
            if not isinstance(before, str):
                raise StoreError(f"{self._path}: {client_id}: must be marks, got {before!r}")
            if not marks.startswith(before):
                return self._line(before, marks)
            if marks != before:
                text = json_text({**seen, str(client_id): marks}) + "\n"
                write_atomic(self._path, text.encode())
        return None

    def _line(self, before: str, now: str) -> str:
        records, were = len(now) // MARK, len(before) // MARK
        changed = (
            f"has {records} records where {were} were seen"
            if before.startswith(now)
            else "is not the one that was seen before"
        )
        return (
            f"its ledger {changed}: its store was set back or replaced, and would noise images "
            f"once more that it has released; it must be restored (seen before: {self._path})"
        )
