"""The bounds that a node's operator sets; the client app checks them for every message.

The node config names the policy file and says whether the operator's acceptance is needed; both
are on the node's disk, where no coordinator writes. A refusal is one line.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.failures import Refusal
from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet
from fedpdm.deployment.acceptance import acceptance_of
from fedpdm.deployment.code_digest import code_digest
from fedpdm.deployment.policy import (
    NodePolicy,
    PolicyError,
    check_code,
    check_config,
    check_total,
    load_policy,
)
from fedpdm.privacy.releases import ReleaseRequest, ReleaseStore

__all__ = ["check_release", "check_run", "flag", "node_policy"]


def node_policy(node_config: Mapping[str, Any]) -> NodePolicy | None:
    """The policy that the node config names (`policy-file`), or None."""
    path = str(node_config.get("policy-file", ""))
    return load_policy(Path(path)) if path else None


def check_run(
    policy: NodePolicy | None,
    config: RunConfig,
    store: ReleaseStore,
    *,
    node_config: Mapping[str, Any],
) -> None:
    """`Refusal` if the run's config asks for more than the policy allows, the code that runs is
    not the installed one (`installed-code`) or one that the policy names, or the operator did not
    accept exactly this config and that is needed (`require-acceptance`).

    Without a policy, too, code that the config names is not imported, and images alone released."""
    client_id = int(node_config["partition-id"])
    try:
        check_code(policy or NodePolicy(), config)
        if policy is not None:
            check_config(policy, config)
    except PolicyError as error:
        raise Refusal(f"{error} (client {client_id})") from None
    allowed = {*(policy.code if policy else ()), str(node_config.get("installed-code", ""))} - {""}
    if allowed and code_digest() not in allowed:
        raise Refusal(f"code: its digest is not one that this node allows (client {client_id})")
    if flag(node_config, "require-acceptance") and acceptance_of(store.ledger(), config) is None:
        raise Refusal(
            "the operator of this node has not accepted the privacy statement of this config; "
            f"fedpdm node check --accept (client {client_id})"
        )


def check_release(
    policy: NodePolicy | None, store: ReleaseStore, images: ImageSet, request: ReleaseRequest
) -> None:
    """`Refusal` if an image would have spent more than the policy allows, all releases together.

    How much it has spent is for the node's owner alone: the line does not say it.
    """
    if policy is None or policy.max_epsilon is None:
        return
    asked = dataclasses.replace(request, delta=policy.delta)
    total = max(store.preview(images, asked).epsilon_after, store.spent(delta=policy.delta).largest)
    try:
        check_total(policy, total)
    except PolicyError as error:
        print(f"client {request.client_id}: {error}", file=sys.stderr, flush=True)
        raise Refusal(
            "privacy.epsilon: with earlier releases an image would spend more than this node "
            f"allows in all (client {request.client_id})"
        ) from None


def flag(node_config: Mapping[str, Any], key: str) -> bool:
    """A yes or no of the node's own config, false where it says nothing."""
    value = node_config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"node config: {key} must be true or false, got {value!r}")
    return value
