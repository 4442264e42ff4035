"""The state of a coordinator's federation: nodes, runs, rounds, bytes, losses."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError
from fedpdm.engines.deployed.coordinator import run_progress
from fedpdm.engines.superlink import SuperLink
from fedpdm.reporting.shared_words import shared_words
from fedpdm.text import line

__all__ = ["describe", "status_of"]


def status_of(superlink: SuperLink) -> dict[str, Any]:
    """Plain values: `running`, `pid`, `up_seconds`, addresses, `nodes`, `runs` (oldest first).

    A run has Flower's `status`, `bytes_total` over the network, its directory `out`, and
    `progress` from there. Of a SuperLink that is not running the nodes and Flower's status are not
    known.
    """
    settings = superlink.settings()
    process = superlink.process()
    status: dict[str, Any] = {
        "state": str(superlink.state),
        "running": process is not None,
        "pid": process.pid if process else None,
        "up_seconds": time.time() - process.create_time() if process else None,
        "fleet": settings.fleet,
        "control": settings.control,
        "nodes": [],
        "runs": [],
    }
    known = {run_id: {"run_id": run_id, "status": "unknown"} for run_id in settings.runs}
    if process is not None:
        status["nodes"] = [dataclasses.asdict(node) for node in superlink.nodes()]
        known |= {run.run_id: dataclasses.asdict(run) for run in superlink.runs()}
    for run_id, run in known.items():
        out = settings.runs.get(run_id)
        status["runs"].append({**run, "out": out, "progress": _progress(out)})
    return status


def _progress(out: str | None) -> dict[str, Any] | None:
    if out is None:
        return None
    try:
        return dataclasses.asdict(run_progress(Path(out)))
    except (ConfigError, OSError, ValueError, KeyError):
        return None  # not begun, or removed


def describe(status: dict[str, Any]) -> str:
    """The same for people."""
    if status["running"]:
        first = f"SuperLink {status['pid']} up {_duration(status['up_seconds'])}"
    else:
        first = "SuperLink not running"
    lines = [f"{first}; nodes at {status['fleet']}, control at {status['control']}"]
    nodes = status["nodes"]
    if status["running"]:
        online = sum(node["status"] == "online" for node in nodes)
        lines.append(f"nodes: {online} of {len(nodes)} online")
    for node in nodes:
        since = f" for {_duration(node['online_seconds'])}" if node["status"] == "online" else ""
        lines.append(f"  {line(node['name']):<16} {line(node['status'])}{since}")
    lines.append(f"runs: {len(status['runs'])}")
    for run in status["runs"]:
        where = run["out"] or "directory unknown"
        lines.append(f"  {line(run['run_id'])}  {line(run['status'])}  {line(where)}")
        if (progress := run["progress"]) is not None:
            lines.append(f"    {_rounds(progress)}")
            lines += [f"    failed: {line(problem)}" for problem in progress["failed"]]
    return "\n".join(lines)


def _rounds(progress: dict[str, Any]) -> str:
    parts = [f"round {progress['rounds_done']} of {progress['rounds']}"]
    parts += shared_words(progress)
    parts.append(
        f"{progress['bytes_down'] / 1e6:.1f} MB down, {progress['bytes_up'] / 1e6:.1f} MB up"
    )
    if progress["finished"]:
        parts.append(f"finished in {_duration(progress['seconds'])}")
    elif progress["rounds_done"]:
        pace = progress["seconds"] / progress["rounds_done"]
        left = pace * (progress["rounds"] - progress["rounds_done"])
        parts.append(f"about {_duration(left)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h"
