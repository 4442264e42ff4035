"""Submit a run to a deployed federation, follow it, and learn how it really ended.

Flower's command line returns 0 whatever happens, and its SuperLink gives up the runs that were
going on when it ended. The server app writes its lines, and a checkpoint after each round, to the
run directory on this machine. This module follows that directory, and resumes from it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedpdm.config import ConfigError, RunConfig
from fedpdm.engines.causes import last_error
from fedpdm.engines.deployed.control import CONNECTION, FlowerRun, Node, without_colour
from fedpdm.engines.flowercli import (
    RunFailed,
    app_directory,
    end_processes,
    write_run_config,
)
from fedpdm.engines.superlink import SuperLink
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import line, visible

__all__ = ["LogTail", "RunProgress", "node_lines", "run_deployed", "run_progress"]

POLL_SECONDS = 0.5
ASK_SECONDS = 20.0  # between questions to Flower, each of which starts its command line
SERVER_SECONDS = 10.0  # in which the server app of a run is started
HURRY_SECONDS, CHANGE_SECONDS = 3.0, 12.0  # for a while after something has changed


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """What a run directory says of its run: `failed` are the failures of the last round."""

    rounds_done: int
    rounds: int
    coarse_loss: float | None
    coarse_known: float | None
    heldout_coarse_loss: float | None
    heldout_coarse_known: float | None
    bytes_down: int
    bytes_up: int
    seconds: float
    failed: tuple[str, ...]
    finished: bool


def run_progress(out: Path) -> RunProgress:
    """Read it from `config.yaml` and `metrics.json`; `ConfigError` where there is no run."""
    run = RunDirectory(out)
    total = run.config().run.rounds
    try:
        history: dict[str, Any] = run.read_json("metrics.json")
    except ConfigError:  # before the first round
        history = {"rounds": []}
    rounds = history["rounds"]
    last = rounds[-1] if rounds else {}
    return RunProgress(
        rounds_done=len(rounds),
        rounds=total,
        coarse_loss=last.get("coarse_loss"),
        coarse_known=last.get("coarse_known"),
        heldout_coarse_loss=last.get("heldout_coarse_loss"),
        heldout_coarse_known=last.get("heldout_coarse_known"),
        bytes_down=sum(record["bytes_down"] for record in rounds),
        bytes_up=sum(record["bytes_up"] for record in rounds),
        seconds=sum(record["seconds"] for record in rounds),
        failed=tuple(last.get("failed", ())),
        finished="final" in history,
    )


class LogTail:
    """New lines of a run's `log.txt`, without the time that each begins with."""

    def __init__(self, out: Path) -> None:
        self._path = out / "log.txt"
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._rest = ""

    def lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path, encoding="utf-8", errors="replace", newline="\n") as file:
            file.seek(self._offset)
            text = self._rest + file.read()
            self._offset = file.tell()
        *whole, self._rest = text.split("\n")
        return [visible(_TIME.sub("", each)) for each in whole]


_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def node_lines(before: Sequence[Node], now: Sequence[Node]) -> list[str]:
    """What has changed: a line for each node that came or went, and how many are there."""
    known = {node.node_id: node.status for node in before}
    lines = []
    for node in now:
        was = known.get(node.node_id)
        if node.status == "online" != was:
            lines.append(line(f"node {node.name} is online"))
        elif was == "online" != node.status:
            lines.append(line(f"node {node.name} is {node.status}"))
    if lines:
        online = sum(node.status == "online" for node in now)
        lines.append(f"nodes: {online} of {len(now)} online")
    return lines


def run_deployed(
    config: RunConfig,
    out: Path,
    *,
    superlink: SuperLink,
    resume: bool,
    say: Callable[[str], None],
) -> None:
    """Run a federation on the nodes of this SuperLink; blocks until it has really ended.

    Args:
        config: with `run.simulation` off; out: the run directory, on this machine.
        resume: continue the run in `out` from its checkpoint.
        say: shows a line: rounds as they finish, nodes that come and go.

    Raises:
        RunFailed: it failed, was stopped, or the SuperLink ended; one line that says why.
        KeyboardInterrupt: after the run was told to stop.
    """
    superlink.require_running()
    _refuse_second_run(superlink, out)
    _end_servers(superlink)
    tail = LogTail(out)
    run_id = _submit(superlink, config, out, resume=resume)
    try:
        run = _follow(superlink, run_id, tail, say)
    except KeyboardInterrupt:
        with contextlib.suppress(RunFailed):
            superlink.ask("stop", run_id)
        raise
    finally:
        _keep_log(superlink, run_id, out / "flower.log")
    if run.status != "finished:completed":
        raise RunFailed(
            f"the run ended as {run.status!r}: {last_error(out / 'flower.log')} "
            f"(all output: {out / 'flower.log'}); --resume continues it"
        )


def _refuse_second_run(superlink: SuperLink, out: Path) -> None:
    """`ConfigError` while another run is going on: nodes work on one at a time, and two servers
    may not write one directory.

    After a restart of the SuperLink, Flower still lists a run as running although its server app
    died with the old SuperLink. Such a run is stopped.
    """
    for run in superlink.runs():
        if run.finished:
            continue
        if not _has_server(superlink):
            with contextlib.suppress(RunFailed):  # it may have ended just now
                superlink.ask("stop", run.run_id)
            continue
        where = superlink.settings().runs.get(run.run_id, "unknown")
        raise ConfigError(
            f"{out}: run {run.run_id} ({where}) is {run.status}; wait for it or end it with "
            f"fedpdm federation stop --run {run.run_id} --state {superlink.state}"
        )


def _has_server(superlink: SuperLink) -> bool:
    """Whether a server app runs, or comes up within some seconds."""
    deadline = time.monotonic() + SERVER_SECONDS
    while not _server_apps(superlink):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _end_servers(superlink: SuperLink) -> None:
    """Wait until the server apps of finished runs end, and end those that do not: two server apps
    must not write one run directory."""
    deadline = time.monotonic() + 30.0
    while servers := _server_apps(superlink):
        if time.monotonic() > deadline:
            end_processes(servers)
            return
        time.sleep(POLL_SECONDS)


def _server_apps(superlink: SuperLink) -> list[psutil.Process]:
    process, found = superlink.process(), []
    for child in process.children(recursive=True) if process else ():
        with contextlib.suppress(psutil.Error):
            if any(part.endswith("flwr-serverapp") for part in child.cmdline()):
                found.append(child)
    return found


def _submit(superlink: SuperLink, config: RunConfig, out: Path, *, resume: bool) -> str:
    out.mkdir(parents=True, exist_ok=True)
    run_config = superlink.home / "run-config.toml"
    write_run_config(run_config, config, out, resume=resume)
    app = app_directory(superlink.home)
    answer = superlink.call(
        "run", str(app), CONNECTION, "--run-config", str(run_config), "--format", "json"
    )
    try:
        run_id = str(json.loads(answer.stdout)["run-id"])
    except (ValueError, KeyError):
        why = line((answer.stdout + answer.stderr)[-300:])
        raise RunFailed(f"the SuperLink did not take the run: {why}") from None
    superlink.note_run(run_id, out)
    return run_id


def _follow(
    superlink: SuperLink, run_id: str, tail: LogTail, say: Callable[[str], None]
) -> FlowerRun:
    """Show what happens until the run has ended; returns Flower's final status.

    Flower is asked when one of the SuperLink's processes came or went (the server app's does when
    the run ends), and now and then.
    """
    nodes: list[Node] = []
    children: set[int] = set()
    changed_at = time.monotonic()
    asked_at = 0.0
    while True:
        for each in tail.lines():
            say(each)
        process = superlink.process()
        if process is None:
            raise RunFailed(
                "the SuperLink has ended; after fedpdm federation start, the run goes on from its "
                f"last finished round with fedpdm federation run --resume (see {superlink.log})"
            )
        with contextlib.suppress(psutil.Error):
            now = {child.pid for child in process.children(recursive=True)}
            if now != children:
                children, changed_at = now, time.monotonic()
        hurry = time.monotonic() - changed_at < CHANGE_SECONDS
        if time.monotonic() - asked_at > (HURRY_SECONDS if hurry else ASK_SECONDS):
            # The SuperLink may end in between: that is found out above.
            with contextlib.suppress(RunFailed):
                run = next(run for run in superlink.runs() if run.run_id == run_id)
                if run.finished:
                    for each in tail.lines():
                        say(each)
                    return run
                present = superlink.nodes()
                for each in node_lines(nodes, present):
                    say(each)
                nodes = present
            asked_at = time.monotonic()
        time.sleep(POLL_SECONDS)


def _keep_log(superlink: SuperLink, run_id: str, path: Path) -> None:
    """Append what the server app printed, tracebacks included, to the run's `flower.log`."""
    if superlink.process() is None:
        return
    with contextlib.suppress(Exception):
        text = superlink.call("log", run_id, CONNECTION, "--show", timeout=60).stdout
        with open(path, "a", encoding="utf-8") as log:
            log.write(visible(without_colour(text)))
