"""Attacks one after the other, each kept as a file as soon as it is done.

`results/<name>.json` holds an attack's settings, figures and the scores its curve is drawn from. A
rerun does again only what is not there with the same settings; what a crash or an interruption
leaves is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.progress import count_progress
from fedpdm.storage.files import StoreError, read_json, write_atomic

__all__ = ["Count", "Work", "WorkDone", "run_works", "work_digest"]

Count = Callable[[int, int], None]  # (done, in all)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attack on one target.

    `settings` is JSON and decides the result, with the seed and digests of models and images in it.
    `attack` does the work and returns JSON: `headline`, a line; whatever else it found; and, kept
    out of the summary of all attacks, `curve`: scores of `members` and `non_members`.
    """

    name: str
    group: str
    target: str
    settings: Mapping[str, Any]
    attack: Callable[[Count], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WorkDone:
    """A result; `reused` says that it was there already."""

    work: Work
    result: dict[str, Any]
    seconds: float
    reused: bool


def work_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def run_works(works: Sequence[Work], folder: Path, *, say: Say) -> list[WorkDone]:
    """Do what is not done; results in the order of `works`.

    `say` hears a line for each, with about how long the rest will take.
    """
    paths = [folder / "results" / _file_name(work) for work in works]
    kept = [
        _known(path, work_digest(work.settings)) for work, path in zip(works, paths, strict=True)
    ]
    done: list[WorkDone] = []
    spent = 0.0
    for number, (work, path, known) in enumerate(zip(works, paths, kept, strict=True), 1):
        reused = known is not None
        if known is None:
            started = time.perf_counter()
            result = work.attack(count_progress(f"[{number}/{len(works)}] {work.name}", "image"))
            seconds = time.perf_counter() - started
            known = {
                "digest": work_digest(work.settings),
                "name": work.name,
                "settings": dict(work.settings),
                "seconds": seconds,
                "result": result,
            }
            write_atomic(path, (json.dumps(known) + "\n").encode())
        spent += known["seconds"]  # a kept one tells as much of how long an attack takes
        left = kept[number:].count(None) * spent / number
        rest = f", about {left:.0f} s left" if left >= 1.0 else ""
        again = " (kept from before)" if reused else ""
        say(f"[{number}/{len(works)}] {work.name}: {known['result']['headline']}{again}{rest}")
        done.append(
            WorkDone(work=work, result=known["result"], seconds=known["seconds"], reused=reused)
        )
    return done


def _file_name(work: Work) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", work.name.lower()) + ".json"


def _known(path: Path, digest: str) -> dict[str, Any] | None:
    """What is kept, if it is whole and of these settings."""
    try:
        kept = read_json(path) if path.exists() else {}
    except StoreError:
        return None  # damaged: do it again
    usable = kept.get("digest") == digest and "headline" in kept.get("result", {})
    return kept if usable and "seconds" in kept else None
