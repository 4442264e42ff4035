"""How a participant is started: Flower's SuperNode with TLS, the node's key and its own bounds.

Nothing is started without the operator's acceptance of the config in the ledger.
"""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

from fedpdm.config import ConfigError, config_digest
from fedpdm.config.plugins import DIRECTORY_VARIABLE
from fedpdm.deployment.acceptance import acceptance_of
from fedpdm.deployment.certificates import read_node_certificate
from fedpdm.deployment.classes import settle_classes
from fedpdm.deployment.code_digest import code_digest
from fedpdm.deployment.invitation import read_invitation
from fedpdm.deployment.node import NodeSettings, split_address
from fedpdm.deployment.policy import check_config
from fedpdm.engines.deployed.guard import ALLOWED_VARIABLE, guarded_command, write_commands
from fedpdm.engines.flowercli import flower_environment, tool
from fedpdm.engines.supervision import NodeCommand
from fedpdm.engines.warm import write_command
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.files import StoreError, write_atomic

__all__ = ["prepare_node"]


def prepare_node(settings: NodeSettings) -> NodeCommand:
    """Check what must hold before anything is started, and write what the SuperNode reads.

    `ConfigError` or `StoreError`, one line, for a certificate that is not valid, bounds that the
    config breaks, a config that the operator has not accepted, or other classes than accepted.
    """
    split_address(settings.coordinator)
    certificate = read_node_certificate(settings.certificate)
    certificate.check_time(datetime.datetime.now(datetime.UTC))
    invitation = read_invitation(settings.invitation)
    config = invitation.config
    policy = settings.load_policy()
    check_config(policy, config)
    if not settings.data.exists():
        raise ConfigError(f"data: {settings.data} does not exist")
    root = settings.store_of(certificate.client_id)
    store = ReleaseStore(root)
    store.check_traces()
    ledger = store.ledger()
    if ledger.client_id not in (None, certificate.client_id):
        raise StoreError(
            f"{root}: is the store of client {ledger.client_id}, not {certificate.client_id}"
        )
    if (accepted := acceptance_of(ledger, config)) is None:
        raise ConfigError(
            f"{settings.invitation}: its privacy statement (config {config_digest(config)[:16]}...)"
            f" is not accepted in {ledger.path}; read it with fedpdm node check, then add --accept"
        )
    settle_classes(invitation, accepted, given=settings.classes, root=settings.data)
    home = root / ".flower"
    write_atomic(home / "ca.crt", certificate.authority_pem.encode())
    node: dict[str, Any] = {
        "partition-id": certificate.client_id,
        "num-partitions": config.partition.num_clients,
        "data-dir": str(settings.data),
        "store-dir": str(root),
        "raw-metrics": policy.allow_raw_metrics,
        "allow-new-release": policy.allow_new_release,
        "test-images": policy.test_images,
        "require-acceptance": True,
        "installed-code": code_digest(),
        "policy-file": str(settings.policy or ""),
    }
    text = "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in node.items()
    )
    write_atomic(home / "node.toml", text.encode())
    write_commands(home / "commands")
    write_command(home / "commands", directory=home / "warm", otherwise=guarded_command())
    empty = home / "empty"
    empty.mkdir(exist_ok=True)
    environment = flower_environment(home)
    environment["PATH"] = f"{home / 'commands'}{os.pathsep}{environment['PATH']}"
    environment["PYTHONSAFEPATH"] = "1"
    environment[DIRECTORY_VARIABLE] = str(empty)  # a config names installed code alone
    environment[ALLOWED_VARIABLE] = " ".join(policy.code)
    return NodeCommand(
        client_id=certificate.client_id,
        command=(
            tool("flower-supernode"), "--grpc-rere",
            "--root-certificates", str(home / "ca.crt"),
            "--superlink", settings.coordinator,
            "--auth-supernode-private-key", str(certificate.key),
            "--node-config", str(home / "node.toml"),
            "--isolation", "subprocess",
        ),
        environment=environment,
        cwd=empty,
        lock=root / ".node-lock",
        warm=home / "warm",
    )  # fmt: skip
