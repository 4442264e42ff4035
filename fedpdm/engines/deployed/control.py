"""Questions to a coordinator's SuperLink, asked with Flower's own command line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.engines.flowercli import RunFailed, flower_environment, tool
from fedpdm.setup.flower_config import FEDERATION_VARIABLE
from fedpdm.text import line

__all__ = ["CONNECTION", "MARKER", "Control", "FlowerRun", "Node", "without_colour"]

MARKER = FEDERATION_VARIABLE  # of every process that was started for a state directory
CONNECTION = "coordinator"  # its name in Flower's config


def without_colour(text: str) -> str:
    """Flower's output as plain text."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A registered SuperNode: `status` is online, offline or registered (never seen)."""

    node_id: str
    name: str
    status: str
    online_seconds: float


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """What Flower says of a run: `status` as in `finished:completed`, and the bytes that the server
    app sent and received."""

    run_id: str
    status: str
    details: str
    seconds: float
    bytes_total: int
    submitted: str

    @property
    def finished(self) -> bool:
        return self.status.startswith("finished")


class Control:
    """Flower's command line for the SuperLink of one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self.home = self.state / "home"

    def environment(self) -> dict[str, str]:
        """For the SuperLink and for Flower's commands that talk to it."""
        return flower_environment(self.home) | {MARKER: str(self.state)}

    def ask(self, *arguments: str, timeout: float = 120.0) -> dict[str, Any]:
        """The JSON that `flwr ARGUMENTS coordinator --format json` prints.

        `RunFailed` with Flower's line if it says no, or nothing that can be read.
        """
        try:
            answer = self.call(*arguments, CONNECTION, "--format", "json", timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"flwr {arguments[0]}: no answer in {timeout:.0f} s") from None
        text = without_colour(answer.stdout + answer.stderr).strip()
        try:
            result: dict[str, Any] = json.loads(answer.stdout)
        except ValueError:
            raise RunFailed(f"flwr {arguments[0]}: {line(text[-300:]) or 'no answer'}") from None
        if not result.get("success", True):
            raise RunFailed(f"flwr {arguments[0]}: {line(result.get('error-message', text))}")
        return result

    def call(self, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run Flower's command line against this SuperLink."""
        return subprocess.run(
            [tool("flwr"), *arguments],
            cwd=self.state / "empty",
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def list_nodes(self, names: Mapping[str, str]) -> list[Node]:
        """All registered nodes with their keys' names, in the order of their registration."""
        return [
            Node(
                node_id=str(node["node-id"]),
                name=names.get(str(node["node-id"]), str(node["node-id"])),
                status=str(node["status"]),
                online_seconds=float(node["online-elapsed"]),
            )
            for node in self.ask("supernode", "list")["nodes"]
            if node["status"] != "unregistered"
        ]

    def runs(self) -> list[FlowerRun]:
        """All runs, the oldest first."""
        runs = [
            FlowerRun(
                run_id=str(run["run-id"]),
                status=str(run["status"]),
                details=str(run.get("status-details") or ""),
                seconds=float(run["elapsed"]),
                bytes_total=int(run["network-traffic"]["total-bytes"]),
                submitted=str(run["pending-at"]),
            )
            for run in self.ask("list")["runs"]
        ]
        return sorted(runs, key=lambda run: run.submitted)
