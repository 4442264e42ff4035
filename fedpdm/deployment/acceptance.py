"""The operator's acceptance of one config's privacy statement, kept in the node's ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedpdm.config import RunConfig, config_digest
from fedpdm.privacy.ledger import Ledger, Record
from fedpdm.privacy.releases import ReleaseStore

__all__ = ["ACCEPTED", "accept", "acceptance_of", "config_digest"]

ACCEPTED = "accepted"


def acceptance_of(ledger: Ledger, config: RunConfig) -> Record | None:
    """The latest record that accepts exactly this config, or None."""
    wanted = config_digest(config)
    found = [r for r in ledger.records if r.kind == ACCEPTED and r.fields.get("config") == wanted]
    return found[-1] if found else None


def accept(
    store: ReleaseStore,
    config: RunConfig,
    statement: Mapping[str, Any],
    *,
    client_id: int,
    by: str,
    code: str,
    images_sha256: str,
    classes: Sequence[tuple[str, str]] | None = None,
) -> Record:
    """Append to the ledger that `by` accepted this statement for this config and code.

    `classes` are the federation's names with the node's own (`fedpdm.deployment.classes`), None
    where none were compared."""
    numbers = json.dumps(statement, sort_keys=True, allow_nan=False)
    fields = {
        "config": config_digest(config),
        "statement": hashlib.sha256(numbers.encode()).hexdigest(),
        "epsilon": statement["epsilon"],
        "delta": statement["delta"],
        "images": statement["images"],
        "images_sha256": images_sha256,
        "code": code,
        "by": by,
    }
    if classes is not None:
        fields["classes"] = [list(pair) for pair in classes]
    return store.note(ACCEPTED, fields, client_id=client_id).records[-1]
