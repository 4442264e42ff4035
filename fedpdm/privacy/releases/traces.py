"""A store that lost its memory: what earlier runs left beside a ledger that does not know them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedpdm.privacy.ledger import START, Ledger
from fedpdm.storage.files import StoreError, read_json

__all__ = ["check_traces"]


def check_traces(root: Path, ledger: Ledger) -> None:
    """`StoreError` if a run in the store `root` was answered with a ledger that is not this one.

    Whatever the config of that run: rounds, models, samples, statements and acceptances are traces.
    """
    known = {START, *(record.chain for record in ledger.records)}
    for folder in (root, *sorted((root / "runs").glob("*"))):
        traces = _traces(folder)
        for path, head in traces.items():
            if head and head not in known:
                raise StoreError(
                    f"{path}: was written with a ledger that {ledger.path} does not continue: it "
                    "was cut or replaced, and noising the same images again would be a second "
                    "release; restore it"
                )
        if not ledger.releases() and set(traces.values()) - {START}:
            raise StoreError(
                f"{folder}: images were released in this run, and {ledger.path} knows of none: "
                "noising them again would be a second release; restore it"
            )
    for path in sorted((root / "accepted").glob("[0-9]*.txt")):
        number = int(path.stem) if path.stem.isdecimal() else 0
        kinds = [record.kind for record in ledger.records[:number]]
        if number and (len(kinds) < number or kinds[-1] != "accepted"):
            raise StoreError(
                f"{path}: was accepted in record {number}, which {ledger.path} does not hold: the "
                "ledger was cut or replaced, and noising the same images again would be a second "
                "release; restore it"
            )


def _traces(root: Path) -> dict[Path, str]:
    """What a client's rounds in `root` show of its releases: file -> the head of the ledger then.

    The head is "" where a file does not say it. Nothing of rounds that say that they released
    nothing, as those of a baseline do.
    """
    heads = {}
    for path in (root / "privacy.json", *sorted(root.glob("rounds/[0-9]*/reply.json"))):
        if path.exists():
            with contextlib.suppress(StoreError):  # a damaged file is a trace without a head
                record = read_json(path)
                if "baseline" in record:
                    return {}
                heads[path] = str(record.get("ledger_head") or record.get("ledger") or "")
                continue
            heads[path] = ""
    rest = (root / name for name in ("rounds", "partial", "samples.npz", "classes.json"))
    return heads or {path: "" for path in rest if path.is_file() or any(path.glob("*"))}
