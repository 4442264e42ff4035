"""A participant's settings: three values, and where other files are if not beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedpdm.config import ConfigError
from fedpdm.deployment.classes import Pairs
from fedpdm.deployment.policy import NodePolicy, load_policy

__all__ = ["NodeSettings", "default_store", "split_address"]

INVITATION = "invitation.json"
POLICY = "policy.yaml"


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """`coordinator` is HOST:PORT, `certificate` the node's PEM file with its key beside it, `data`
    its images. `invitation` lies beside the certificate and `policy` beside the data where nothing
    else is said; `policy` is None where there is no such file, and then only the accepted statement
    bounds epsilon and t0. `store` None: `default_store`. `classes` says what classes are called
    here."""

    coordinator: str
    certificate: Path
    data: Path
    invitation: Path
    policy: Path | None
    store: Path | None
    classes: Pairs = ()

    @classmethod
    def of(
        cls,
        coordinator: str,
        certificate: Path,
        data: Path,
        *,
        invitation: Path | None = None,
        policy: Path | None = None,
        store: Path | None = None,
        classes: Pairs = (),
    ) -> NodeSettings:
        """Absolute paths, with what was not said filled in."""
        certificate, data = certificate.expanduser().absolute(), data.expanduser().absolute()
        beside = data.parent / POLICY
        if policy is None and os.path.lexists(beside):  # a dangling link is a policy that is lost
            policy = beside
        return cls(
            coordinator=coordinator,
            certificate=certificate,
            data=data,
            invitation=(invitation or certificate.parent / INVITATION).expanduser().absolute(),
            policy=policy.expanduser().absolute() if policy else None,
            store=store.expanduser().absolute() if store else None,
            classes=classes,
        )

    def load_policy(self) -> NodePolicy:
        """The node's bounds. Without a file they allow neither raw metrics nor new releases; the
        accepted statement decides everything else."""
        return load_policy(self.policy) if self.policy else NodePolicy()

    def bounds(self) -> str:
        """Which policy holds, or that there is none and what that means."""
        if self.policy:
            return f"policy {self.policy}"
        return f"no {POLICY} in {self.data.parent}: NO BOUNDS on epsilon and t0"

    def store_of(self, client_id: int) -> Path:
        """Where client `client_id` keeps its ledger, releases and fine model."""
        return self.store or default_store(client_id)


def default_store(client_id: int) -> Path:
    """A service's own state directory (systemd's `STATE_DIRECTORY`), else one of the user's."""
    if given := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given) / f"node-{client_id}"
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base).absolute() / "fedpdm" / f"node-{client_id}"


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 address in brackets; `ConfigError` otherwise."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    known = bare and port.isdecimal() and 1 <= int(port) <= 65535
    if not known or (":" in bare) != bracketed or any(c in bare for c in "[]/ "):
        raise ConfigError(f"coordinator: must be HOST:PORT, port in [1, 65535], got {address!r}")
    return bare, int(port)
