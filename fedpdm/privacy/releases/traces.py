"""A store that lost its memory: what earlier runs left beside a ledger that does not know them."""

from __future__ import annotations

from pathlib import Path

from fedpdm.privacy.ledger import START, Ledger
from fedpdm.storage.client_store import release_traces
from fedpdm.storage.files import StoreError

__all__ = ["check_traces"]


def check_traces(root: Path, ledger: Ledger) -> None:
    """`StoreError` if a run in the store `root` was answered with a ledger that is not this one.

    Whatever the config of that run: rounds, models, samples, statements and acceptances are traces.
    """
    known = {START, *(record.chain for record in ledger.records)}
    for folder in (root, *sorted((root / "runs").glob("*"))):
        traces = release_traces(folder)
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
