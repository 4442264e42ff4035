"""`fedpdm certificates`: an authority, and what it signs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpdm.commands.groups import add_group
from fedpdm.commands.terminal import Parser, tell

__all__ = ["add_certificates_parser"]

DESCRIPTION = """\
Make the certificates of a deployed federation (docs/deployment.md). Nothing is overwritten; keys
get mode 0600. Keep ca.key away from the machine that runs the coordinator.
"""


def add_certificates_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    actions = add_group(
        commands,
        "certificates",
        summary="make the CA, server and node certificates of a deployed federation",
        description=DESCRIPTION,
    )

    ca = actions.add_parser("ca", help="make the authority: ca.crt and ca.key")
    ca.add_argument("--out", type=Path, required=True, metavar="DIR")
    ca.add_argument("--name", default="fedpdm federation")
    ca.add_argument("--days", type=int, default=3650)
    ca.set_defaults(action=_ca)

    signing = Parser(add_help=False)
    signing.add_argument("--ca", type=Path, required=True, metavar="DIR", help="of ca.crt, ca.key")
    signing.add_argument("--out", type=Path, required=True, metavar="DIR")
    signing.add_argument("--days", type=int, default=365)

    server = actions.add_parser(
        "server", parents=[signing], help="make the coordinator's server.pem and server.key"
    )
    server.add_argument(
        "--name", action="append", required=True, dest="names",
        help="host name or IP address by which nodes reach it (repeatable)",
    )  # fmt: skip
    server.set_defaults(action=_server)

    node = actions.add_parser(
        "node", parents=[signing], help="make node-N.crt, .key and .pub on one machine"
    )
    node.add_argument("--client", type=int, required=True, metavar="N")
    node.set_defaults(action=_node)

    request = actions.add_parser(
        "request", help="at a node: make node-N.key and a request; the key never leaves"
    )
    request.add_argument("--client", type=int, required=True, metavar="N")
    request.add_argument("--out", type=Path, required=True, metavar="DIR")
    request.set_defaults(action=_request)

    sign = actions.add_parser(
        "sign", parents=[signing], help="make node-N.crt and .pub from a node's request"
    )
    sign.add_argument("request", type=Path, metavar="node-N.csr")
    sign.add_argument("--client", type=int, required=True, metavar="N")
    sign.set_defaults(action=_sign)


def _ca(options: argparse.Namespace) -> None:
    from fedpdm.deployment.certificates import make_authority

    made = make_authority(options.out, name=options.name, days=options.days)
    key = made.with_suffix(".key")
    tell(
        options,
        f"{made}: valid for {options.days} days; {key} signs: keep it offline",
        {"certificate": str(made), "key": str(key), "days": options.days},
    )


def _server(options: argparse.Namespace) -> None:
    from fedpdm.deployment.certificates import make_server

    made = make_server(options.ca, options.out, names=options.names, days=options.days)
    tell(
        options,
        f"{made}: for {', '.join(options.names)}, valid for {options.days} days",
        {"certificate": str(made), "key": str(made.with_suffix(".key")), "names": options.names,
         "days": options.days},
    )  # fmt: skip


def _node(options: argparse.Namespace) -> None:
    from fedpdm.deployment.certificates import make_node

    made = make_node(options.ca, options.out, client_id=options.client, days=options.days)
    key = made.with_suffix(".key")
    what = f"carry it and {key.name} to the node in secret"
    _tell_node(options, made, what, {"key": str(key)})


def _request(options: argparse.Namespace) -> None:
    from fedpdm.deployment.certificates import make_request

    made = make_request(options.out, client_id=options.client)
    key = made.with_suffix(".key")
    tell(
        options,
        f"{made}: send it to the coordinator; {key.name} stays here",
        {"request": str(made), "key": str(key), "client": options.client},
    )


def _sign(options: argparse.Namespace) -> None:
    from fedpdm.deployment.certificates import sign_request

    made = sign_request(
        options.ca, options.request, options.out, client_id=options.client, days=options.days
    )
    _tell_node(options, made, "send it back", {})


def _tell_node(
    options: argparse.Namespace, made: Path, what: str, facts: Mapping[str, Any]
) -> None:
    """A node's certificate was made: what is to be done with it and its public key."""
    public = made.with_suffix(".pub")
    tell(
        options,
        f"{made}: of client {options.client}, valid for {options.days} days; {what}, register "
        f"{public.name}",
        {"certificate": str(made), "public_key": str(public), "client": options.client,
         "days": options.days, **facts},
    )  # fmt: skip
