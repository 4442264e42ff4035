"""The coordinator's side of a deployed federation: Flower's SuperLink, with TLS and known nodes.

Everything about it lies in one state directory:

    federation.json   addresses, certificates, names of the nodes' keys, runs and their directories
    superlink.pid     process id and start time
    superlink.log     Flower's own output
    state.db          Flower's database: registered keys, runs
    ledgers.json      marks that participants showed of their ledgers (`strategies.ledgers`)
    home/             Flower's home: the connection of its command line
    empty/            where Flower's processes start, so that they import nothing from there

SuperNodes reach it by gRPC over TLS (Fleet API) and prove that they hold a registered key. Runs are
submitted and keys registered at the control address, over HTTPS without a password: keep it on
loopback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import ssl
import subprocess
import time
from pathlib import Path

import psutil

from fedpdm.config import ConfigError
from fedpdm.config.strict import StrictError, parse_json, read_text
from fedpdm.deployment.registered import FILE, client_of_key
from fedpdm.engines.deployed.control import CONNECTION, MARKER, Control, Node, without_colour
from fedpdm.engines.flowercli import RunFailed, end_processes, tool
from fedpdm.engines.superlink_settings import (
    SuperLinkSettings,
    answers,
    check_certificates,
    check_free,
    connection_config,
    split_address,
)
from fedpdm.storage.files import locked, write_atomic
from fedpdm.text import json_text, line

__all__ = ["SuperLink"]

READY_SECONDS = 120.0
_PUBLIC_KEY = re.compile(r"(ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/=]+( .*)?")


class SuperLink(Control):
    """The SuperLink of one state directory, running or not."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.log = self.state / "superlink.log"
        self._settings = self.state / FILE
        self._pid = self.state / "superlink.pid"

    # What is known.

    def known(self) -> bool:
        """Whether it was ever started here."""
        return self._settings.exists()

    def settings(self) -> SuperLinkSettings:
        """What `start` was told; `ConfigError` if it never was."""
        if not self.known():
            raise ConfigError(
                f"{self.state}: holds no federation (federation.json is missing); start it first"
            )
        try:
            return SuperLinkSettings(**parse_json(read_text(self._settings)))
        except (StrictError, TypeError) as error:
            raise ConfigError(f"{self._settings}: cannot be read: {error}") from None

    def _save(self, settings: SuperLinkSettings) -> None:
        text = json_text(dataclasses.asdict(settings)) + "\n"
        write_atomic(self._settings, text.encode())

    def note_run(self, run_id: str, out: Path) -> None:
        """Remember where a run keeps its results."""
        with locked(self.state / ".lock"):
            known = self.settings()
            self._save(dataclasses.replace(known, runs={**known.runs, run_id: str(out)}))

    def process(self) -> psutil.Process | None:
        """The running SuperLink, or None; another process that has got its id does not count."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            record = json.loads(self._pid.read_text(encoding="utf-8"))
            process = psutil.Process(int(record["pid"]))
            same = abs(process.create_time() - float(record["started"])) < 1.0
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def require_running(self) -> psutil.Process:
        """The running SuperLink; `ConfigError` if there is none."""
        self.settings()
        process = self.process()
        if process is None:
            raise ConfigError(
                f"{self.state}: the SuperLink is not running; fedpdm federation start --state "
                f"{self.state} starts it"
            )
        return process

    # Its processes.

    def start(self, settings: SuperLinkSettings) -> psutil.Process:
        """Start it and wait until it answers over TLS.

        Keys registered before, and the list of runs, are kept; runs that were going on when it
        last ended are not taken up by Flower: `fedpdm federation run --resume` does that.

        Raises:
            ConfigError: it runs already, a port is taken, or a certificate cannot be used.
            RunFailed: it ended at once; the error has its last line.
        """
        (self.state / "empty").mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        with locked(self.state / ".lock"):
            if (running := self.process()) is not None:
                raise ConfigError(f"{self.state}: the SuperLink runs already, as {running.pid}")
            self._end_marked()
            fleet = split_address(settings.fleet, what="--fleet")
            control = split_address(settings.control, what="--control")
            context = check_certificates(settings)
            for what, address in (("--fleet", fleet), ("--control", control)):
                check_free(what, address)
            if self.known():
                known = self.settings()
                settings = dataclasses.replace(settings, nodes=known.nodes, runs=known.runs)
            self._save(settings)
            write_atomic(
                self.home / "config.toml", connection_config(settings, CONNECTION).encode()
            )
            process = self._launch(settings, fleet, control)
            try:
                self._await(process, control, context)
            except BaseException:
                self._end_marked()
                self._pid.unlink(missing_ok=True)
                raise
            return psutil.Process(process.pid)

    def _launch(
        self, settings: SuperLinkSettings, fleet: tuple[str, int], control: tuple[str, int]
    ) -> subprocess.Popen[bytes]:
        command = [
            tool("flower-superlink"),
            "--ssl-ca-certfile", settings.ca,
            "--ssl-certfile", settings.certificate,
            "--ssl-keyfile", settings.key,
            "--enable-supernode-auth",
            "--fleet-api-address", settings.fleet,
            "--host", control[0], "--port", str(control[1]),
            "--isolation", "subprocess",
            "--database", str(self.state / "state.db"),
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.state / "empty",
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = psutil.Process(process.pid).create_time()
        write_atomic(
            self._pid, json_text({"pid": process.pid, "started": started}, indent=None).encode()
        )
        return process

    def _await(
        self, process: subprocess.Popen[bytes], control: tuple[str, int], context: ssl.SSLContext
    ) -> None:
        fleet = split_address(self.settings().fleet, what="--fleet")
        deadline = time.monotonic() + READY_SECONDS
        for address, name in ((control, control[0]), (fleet, None)):
            while not answers(address, context, name=name):
                if process.poll() is not None:
                    raise RunFailed(f"the SuperLink ended at once: {self.last_line()}")
                if time.monotonic() > deadline:
                    raise RunFailed(f"the SuperLink does not answer: {self.last_line()}")
                time.sleep(0.2)

    def stop(self) -> int:
        """End the SuperLink and everything that it started; returns how many processes."""
        self.settings()
        with locked(self.state / ".lock"):
            found = self._end_marked()
            self._pid.unlink(missing_ok=True)
            return found

    def _end_marked(self) -> int:
        """End every process that was started for this state directory."""
        mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid not in mine and process.environ().get(MARKER) == str(self.state):
                    found.append(process)
        return end_processes(found)

    def last_line(self) -> str:
        """The last line of Flower's output, for errors."""
        text = self.log.read_bytes().decode(errors="replace") if self.log.exists() else ""
        lines = [each.strip() for each in without_colour(text).split("\n") if each.strip()]
        return f"{line(lines[-1], limit=300) if lines else 'it printed nothing'} ({self.log})"

    # Its nodes.

    def register(self, key: Path) -> str | None:
        """Let the holder of this key (its public half, OpenSSH format) join; returns Flower's node
        id, None where it was registered before. The file's name says which client the key is."""
        self.require_running()
        if client_of_key(key.stem) is None:
            raise ConfigError(
                f"{key}: must be named node-N.pub or node-N-WORDS.pub, N the client whose key it is"
            )
        try:
            text = read_text(key).strip()
        except StrictError as error:
            raise ConfigError(f"{key}: {error}") from None
        if not _PUBLIC_KEY.fullmatch(text):
            raise ConfigError(
                f"{key}: must be an OpenSSH public key on a NIST curve (ssh-keygen -t ecdsa -b 384)"
            )
        try:
            node_id = str(self.ask("supernode", "register", str(key.absolute()))["node-id"])
        except RunFailed as error:
            if "already" in str(error).lower():
                return None
            raise
        with locked(self.state / ".lock"):
            known = self.settings()
            self._save(dataclasses.replace(known, nodes={**known.nodes, node_id: key.stem}))
        return node_id

    def unregister(self, name: str) -> str:
        """Turn away the node whose key has this name (or this node id); returns its node id."""
        self.require_running()
        found = [i for i, known in self.settings().nodes.items() if name in (i, known)]
        present = {node.node_id for node in self.nodes()}
        found = [node_id for node_id in found if node_id in present]
        if not found:
            raise ConfigError(f"--remove-node: no registered node is called {name!r}")
        for node_id in found:
            self.ask("supernode", "unregister", node_id)
        return ", ".join(found)

    def nodes(self) -> list[Node]:
        """All registered nodes, in the order of their registration."""
        return self.list_nodes(self.settings().nodes)
