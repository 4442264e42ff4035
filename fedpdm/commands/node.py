"""`fedpdm node`: a participant of a deployed federation."""

from __future__ import annotations

import argparse
import getpass
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.groups import add_group
from fedpdm.commands.resolving import DEPLOYED_OVERRIDES, add_overrides
from fedpdm.commands.terminal import Parser, progress_aside, show, tell
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.deployment.node import NodeReport, NodeSettings

__all__ = ["add_node_parser"]

DESCRIPTION = """\
A participant's side of a deployed federation (docs/deployment.md). A participant needs three
values: the coordinator's address, its certificate (with the key and invitation.json beside it) and
its data folder. `check` looks at everything and prints one line each; `check --accept` records that
the operator accepts the privacy statement; `start` joins. Exit codes: 0 fine, 2 something is not.
"""
LONGEST_WAIT = 3600.0  # seconds
VARIABLES = {
    "coordinator": "FEDPDM_COORDINATOR",
    "certificate": "FEDPDM_CERTIFICATE",
    "data": "FEDPDM_NODE_DATA",
}


def add_node_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    actions = add_group(
        commands,
        "node",
        summary="take part in a deployed federation: check, start, invite, digest",
        description=DESCRIPTION,
    )
    shared = Parser(add_help=False)
    shared.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the coordinator is (FEDPDM_COORDINATOR)"
    )
    shared.add_argument(
        "--certificate", metavar="FILE",
        help="node-N.crt, with node-N.key beside it (FEDPDM_CERTIFICATE)",
    )  # fmt: skip
    shared.add_argument("--data", metavar="DIR", help="this node's images (FEDPDM_NODE_DATA)")
    shared.add_argument(
        "--invitation", type=Path, metavar="FILE",
        help="the coordinator's; default: invitation.json beside the certificate",
    )  # fmt: skip
    shared.add_argument(
        "--policy", type=Path, metavar="FILE",
        help="this node's own bounds; default: policy.yaml beside the data folder, if it is there",
    )  # fmt: skip
    shared.add_argument(
        "--store", type=Path, metavar="DIR",
        help="ledger, releases and fine model; default: a state directory of this user or service",
    )  # fmt: skip
    shared.add_argument(
        "--classes", action="append", default=[], metavar="NAME=OWN,...",
        help="what the federation's classes are called here, kept when accepted; NAME= for one "
        "that is not here, =OWN for one whose images are left out",
    )  # fmt: skip

    check = actions.add_parser("check", parents=[shared], help="look at everything before joining")
    check.add_argument(
        "--accept", action="store_true", help="accept the privacy statement, in the ledger"
    )
    check.add_argument(
        "--timeout", type=float, default=10.0, help="seconds to wait for the coordinator"
    )
    check.set_defaults(action=_check)

    start = actions.add_parser("start", parents=[shared], help="join, until told to stop")
    start.add_argument("--port", type=int, help="of the node's own interface on loopback")
    start.set_defaults(action=_start)

    invite = actions.add_parser(
        "invite", help="at the coordinator: write invitation.json for the participants"
    )
    invite.add_argument("experiment", type=Path, help="YAML file")
    add_overrides(invite, DEPLOYED_OVERRIDES)
    invite.add_argument("--out", type=Path, required=True, help="file to write")
    invite.set_defaults(action=_invite)

    digest = actions.add_parser("digest", help="the digest of the installed code, for policies")
    digest.set_defaults(action=_digest)


def _settings(options: argparse.Namespace) -> NodeSettings:
    from fedpdm.deployment.classes import parse_classes
    from fedpdm.deployment.node import NodeSettings

    values = {}
    for name, variable in VARIABLES.items():
        value = getattr(options, name) or os.environ.get(variable)
        if not value:
            raise ValueError(f"--{name}: is missing (or set {variable})")
        values[name] = value
    return NodeSettings.of(
        values["coordinator"],
        Path(values["certificate"]),
        Path(values["data"]),
        invitation=options.invitation,
        policy=options.policy,
        store=options.store,
        classes=parse_classes(options.classes),
    )


def _check(options: argparse.Namespace) -> int:
    from fedpdm.deployment.node import check_node

    if not 0.0 < options.timeout <= LONGEST_WAIT:
        raise ValueError(f"--timeout: must be in (0, {LONGEST_WAIT:g}], got {options.timeout}")
    report = check_node(_settings(options), timeout=options.timeout)
    accepted = None
    if options.accept and report.ok:
        accepted = _accept(report)
    if options.json:
        print(json_text(_as_json(report)))
    else:
        for check in report.checks:
            show(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<11}  {check.detail}")
        if report.text:
            show(f"\n{report.text}")
        show(_last_line(report, asked=options.accept, accepted=accepted))
    return 0 if report.ok else 2


def _accept(report: NodeReport) -> str:
    """Record the operator's acceptance in the ledger, and the statement beside it."""
    from fedpdm.deployment.acceptance import accept
    from fedpdm.deployment.code_digest import code_digest
    from fedpdm.deployment.node.statement import images_sha256
    from fedpdm.storage.files import write_atomic

    assert report.store is not None
    assert report.statement is not None
    assert report.invitation is not None
    assert report.certificate is not None
    assert report.images is not None
    record = accept(
        report.store,
        report.invitation.config,
        report.statement,
        client_id=report.certificate.client_id,
        by=getpass.getuser(),
        code=code_digest(),
        images_sha256=images_sha256(report.images),
        classes=report.classes.pairs if report.classes is not None else None,
    )
    folder = report.store.root / "accepted"
    write_atomic(folder / f"{record.number:06d}.txt", report.text.encode())
    numbers = json_text(report.statement) + "\n"
    write_atomic(folder / f"{record.number:06d}.json", numbers.encode())
    report.accepted = True
    return f"record {record.number} of {report.store.ledger().path}"


def _last_line(report: NodeReport, *, asked: bool, accepted: str | None) -> str:
    failed = [check.name for check in report.checks if not check.ok]
    if failed:
        refused = "; nothing was accepted" if asked else ""
        return f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}{refused}"
    if accepted:
        return f"all checks are fine; accepted: {accepted}"
    if report.accepted:
        return "all checks are fine, the statement is accepted: fedpdm node start"
    return "all checks are fine; if you accept the statement above, add --accept"


def _as_json(report: NodeReport) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "accepted": report.accepted,
        "checks": [asdict(check) for check in report.checks],
        "statement": report.statement,
        "counts": report.counts() if report.images is not None else None,
    }


def _start(options: argparse.Namespace) -> int:
    from fedpdm.engines.deployed.node import prepare_node
    from fedpdm.engines.supervision import run_node

    settings = _settings(options)
    node = prepare_node(settings)
    store = node.lock.parent
    tell(
        options,
        f"node {node.client_id}: joins {settings.coordinator} with {settings.data}; store {store}; "
        f"{settings.bounds()}",
        {"client": node.client_id, "coordinator": settings.coordinator, "data": str(settings.data),
         "store": str(store), "policy": str(settings.policy) if settings.policy else None},
    )  # fmt: skip
    if options.quiet:
        node = replace(node, environment={**node.environment, "FLWR_LOG_LEVEL": "ERROR"})
    with progress_aside(options):
        return run_node(node, port=options.port)


def _invite(options: argparse.Namespace) -> None:
    from fedpdm.config import load_config
    from fedpdm.deployment.invitation import make_invitation
    from fedpdm.deployment.policy import NodePolicy, objections
    from fedpdm.storage.files import write_atomic

    config = load_config(options.experiment, [*options.overrides, "run.simulation=false"])
    write_atomic(options.out.absolute(), make_invitation(config).encode())
    refused = objections(NodePolicy(), config)
    lines = [f"{options.out}: give it to every participant, beside its certificate"]
    lines += [f"WARNING: a node without a policy of its own refuses {each}" for each in refused]
    tell(options, "\n".join(lines), {"out": str(options.out), "refused": refused})


def _digest(options: argparse.Namespace) -> None:
    from fedpdm.deployment.code_digest import code_digest

    digest = code_digest()
    tell(options, digest, {"code": digest})
