"""`fedpdm federation`: the coordinator of a deployed federation."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.groups import add_group
from fedpdm.commands.resolving import DEPLOYED_OVERRIDES, add_run_arguments, resolve_run
from fedpdm.commands.show import tell_run
from fedpdm.commands.terminal import Parser, complain, progress_aside, show, tell
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.config import RunConfig
    from fedpdm.engines.superlink import SuperLink
    from fedpdm.engines.superlink_settings import SuperLinkSettings

__all__ = ["add_federation_parser"]

FILES = ("ca.crt", "server.pem", "server.key")  # in the folder of certificates

DESCRIPTION = """\
The coordinator's side of a deployed federation (docs/deployment.md). Nodes join over gRPC with TLS
and prove that they hold a registered key. Exit codes: 0 done, 1 the run or the SuperLink failed,
2 bad input, 130 interrupted. After a failure, an interruption or a restart of this machine,
`federation start` and `federation run --resume` go on from the last finished round.
"""


def add_federation_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    actions = add_group(
        commands,
        "federation",
        summary="coordinate a deployed federation: start, run, status, stop",
        description=DESCRIPTION,
    )
    shared = Parser(add_help=False)
    shared.add_argument(
        "--state", type=Path, default=Path("federation"), metavar="DIR",
        help="the coordinator's directory; default: federation",
    )  # fmt: skip

    start = actions.add_parser("start", parents=[shared], help="start the SuperLink, register keys")
    start.add_argument(
        "--fleet", metavar="HOST:PORT", help="where nodes join (gRPC); default: 0.0.0.0:9092"
    )
    start.add_argument(
        "--control", metavar="HOST:PORT",
        help="where runs are submitted, which execute code on the nodes: keep it on loopback; "
        "default: 127.0.0.1:8000",
    )  # fmt: skip
    start.add_argument(
        "--certificates", type=Path, metavar="DIR",
        help="holds ca.crt, server.pem and server.key; default: DIR of --state, certificates/",
    )  # fmt: skip
    start.add_argument(
        "--node-keys", type=Path, metavar="DIR",
        help="register every node-N.pub here, client N's key; a running federation learns new ones",
    )  # fmt: skip
    start.add_argument(
        "--remove-node", action="append", default=[], metavar="NAME",
        help="turn this node away from now on (repeatable)",
    )  # fmt: skip
    start.add_argument(
        "--foreground", action="store_true", help="stay until it ends (for service managers)"
    )
    start.set_defaults(action=_start)

    run = actions.add_parser("run", parents=[shared], help="submit a run, follow it to its end")
    add_run_arguments(run, overrides=DEPLOYED_OVERRIDES, dry_run="check everything, submit nothing")
    run.set_defaults(action=_run)

    status = actions.add_parser("status", parents=[shared], help="nodes, runs and rounds")
    status.set_defaults(action=_status)

    stop = actions.add_parser("stop", parents=[shared], help="end the SuperLink and all runs")
    stop.add_argument("--run", metavar="ID", help="end this run only; the SuperLink goes on")
    stop.set_defaults(action=_stop)


def _superlink(options: argparse.Namespace) -> SuperLink:
    from fedpdm.engines.superlink import SuperLink

    return SuperLink(options.state)


def _start(options: argparse.Namespace) -> int:
    superlink = _superlink(options)
    with progress_aside(options):
        facts = _start_superlink(options, superlink)
    if options.json:
        print(json_text(facts), flush=True)
    if options.foreground:
        with progress_aside(options):
            return _stay(superlink)
    return 0


def _start_superlink(options: argparse.Namespace, superlink: SuperLink) -> dict[str, Any]:
    """Start it if it does not run, register and remove nodes; what --json tells."""
    from fedpdm.config import ConfigError

    keys = sorted(options.node_keys.glob("*.pub")) if options.node_keys else []
    if options.node_keys and not keys:
        raise ConfigError(f"--node-keys: {options.node_keys} holds no *.pub")
    process = superlink.process()
    if process is None:
        process = superlink.start(_settings(options, superlink))
        settings = superlink.settings()
        print(
            f"SuperLink {process.pid}: nodes join at {settings.fleet} (gRPC, TLS, registered "
            f"keys), runs are submitted at {settings.control}",
            flush=True,
        )
    elif options.fleet or options.control or options.certificates or options.foreground:
        raise ConfigError(f"{superlink.state}: the SuperLink runs already, as {process.pid}")
    registered: dict[str, str | None] = {}
    for key in keys:
        node_id = superlink.register(key)
        registered[key.stem] = node_id
        show(f"node {key.stem}: " + (f"registered as {node_id}" if node_id else "known"))
    removed = {}
    for name in options.remove_node:
        removed[name] = superlink.unregister(name)
        show(f"node {name}: removed ({removed[name]})")
    sys.stdout.flush()
    settings = superlink.settings()
    return {
        "pid": process.pid,
        "fleet": settings.fleet,
        "control": settings.control,
        "registered": registered,
        "removed": removed,
    }


def _settings(options: argparse.Namespace, superlink: SuperLink) -> SuperLinkSettings:
    """What was given, then what it was started with before, then the defaults."""
    from fedpdm.engines.superlink_settings import SuperLinkSettings

    before = superlink.settings() if superlink.known() else None
    if before is not None and options.certificates is None:
        ca, certificate, key = before.ca, before.certificate, before.key
    else:
        folder = (options.certificates or superlink.state / "certificates").absolute()
        ca, certificate, key = (str(folder / name) for name in FILES)
    return SuperLinkSettings(
        fleet=options.fleet or (before.fleet if before else "0.0.0.0:9092"),
        control=options.control or (before.control if before else "127.0.0.1:8000"),
        ca=ca,
        certificate=certificate,
        key=key,
    )


def _stay(superlink: SuperLink) -> int:
    """Wait until the SuperLink ends or this process is told to: 1 in the first case."""
    _interrupt_on_terminate()
    try:
        while superlink.process() is not None:
            time.sleep(1.0)
    except KeyboardInterrupt:
        print(f"{superlink.stop()} processes ended")
        return 0
    complain(f"the SuperLink has ended: {superlink.last_line()}")
    return 1


def _interrupt_on_terminate() -> None:
    """Let SIGTERM end this process as Ctrl-C does, and Ctrl-C also where a shell ignores it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


def _run(options: argparse.Namespace) -> int:
    if options.experiment is not None:
        options.overrides = [*options.overrides, "run.simulation=false"]
    config, out = resolve_run(options)
    with progress_aside(options):
        _submit(options, config, out)
    if options.json:
        tell_run(options, out)
    return 0


def _submit(options: argparse.Namespace, config: RunConfig, out: Path) -> None:
    """Check the run and, unless only that was asked for, follow it to its end."""
    from fedpdm.engines.deployed.coordinator import run_deployed
    from fedpdm.engines.deployed.preflight import check_deployed_run

    superlink = _superlink(options)
    superlink.require_running()
    for line in check_deployed_run(config, out, resume=options.resume):
        show(line)
    if options.dry_run:
        return
    _interrupt_on_terminate()
    run_deployed(config, out, superlink=superlink, resume=options.resume, say=show)


def _status(options: argparse.Namespace) -> int:
    from fedpdm.engines.deployed.status import describe, status_of

    status = status_of(_superlink(options))
    show(json_text(status) if options.json else describe(status))
    return 0 if status["running"] else 1


def _stop(options: argparse.Namespace) -> None:
    superlink = _superlink(options)
    if options.run:
        superlink.require_running()
        superlink.ask("stop", options.run)
        tell(options, f"run {options.run} is told to stop", {"run": options.run})
    else:
        ended = superlink.stop()
        tell(options, f"{ended} processes ended", {"ended": ended})
