"""A file per finished job: its settings and its result, complete or absent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpdm.jobs.running import Kept
from fedpdm.storage.files import StoreError, read_json, write_atomic
from fedpdm.text import json_text

__all__ = ["JobFiles", "NamedJob", "settings_digest"]


class NamedJob(Protocol):
    """A job with a name of its own, and JSON that decides its result."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class JobFiles:
    """A `Shelf` that is a folder; results are JSON objects with the given entry, at least.

    A result counts if its settings are those of the job. Two jobs in a folder differ in their
    names by more than upper case and marks.
    """

    def __init__(self, folder: Path, *, entry: str) -> None:
        self._folder = folder
        self._entry = entry

    def find(self, job: NamedJob) -> Kept | None:
        """See `Shelf`."""
        path = self._path(job)
        try:
            kept = read_json(path) if path.exists() else {}
        except StoreError:
            return None  # damaged: do it again
        usable = kept.get("digest") == settings_digest(job.settings) and "seconds" in kept
        if not usable or self._entry not in kept.get("result", {}):
            return None
        return Kept(result=kept["result"], seconds=kept["seconds"])

    def keep(self, job: NamedJob, result: Any, seconds: float) -> None:
        """See `Shelf`; `StoreError` if the file cannot be written."""
        record = {
            "digest": settings_digest(job.settings),
            "name": job.name,
            "settings": dict(job.settings),
            "seconds": seconds,
            "result": result,
        }
        write_atomic(self._path(job), (json_text(record, indent=None) + "\n").encode())

    def _path(self, job: NamedJob) -> Path:
        return self._folder / (re.sub(r"[^a-z0-9_-]+", "-", job.name.lower()) + ".json")
