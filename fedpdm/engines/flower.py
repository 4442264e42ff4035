"""Drive `flwr run` for one run: own Flower home, neutral directory, real exit code, no leftovers.

Flower's command line returns 0 even when the server raised, leaves its local SuperLink running,
and lets simulated clients import code from the directory where that SuperLink was first started.
This module therefore starts it from an empty directory under the run directory, with a Flower home
and port of its own, asks Flower for the run's real outcome, and ends every process it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from fedpdm.config import ConfigError, RunConfig
from fedpdm.deployment.code_digest import code_root
from fedpdm.engines.causes import last_error
from fedpdm.engines.flowercli import (
    RunFailed,
    app_directory,
    end_processes,
    flower_environment,
    stream,
    tool,
    write_run_config,
)
from fedpdm.processors import available
from fedpdm.storage.holding import held
from fedpdm.text import line

__all__ = ["RunFailed", "run_with_flower", "stop_processes"]

MARKER = "FEDPDM_FLOWER_HOME"
CHECKOUT = "FEDPDM_CHECKOUT"  # the code that started a process
MOST_ON_A_GPU = 8
SLOW_START = b"Failed to start local SuperLink within"  # Flower waits for 15 seconds, no longer
STARTS = 4
LONGEST_PLACE = 20  # of a directory in which Ray's files are, in bytes


def run_with_flower(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    releases: Path | None = None,
    allow_new_release: bool = False,
    port: int | None = None,
    num_cpus: int | None = None,
    verbose: bool = False,
) -> None:
    """Run a federation in Ray simulation through `flwr run`; blocks, streams progress.

    Args:
        config: the resolved configuration; out: the run directory.
        resume: continue the run in `out`.
        releases: where clients keep their releases; default: in the run directory.
        allow_new_release: let clients noise released images once more.
        port: of the local SuperLink's HTTP interface on loopback; default: a free one.
        num_cpus: processors for Ray; default: all that this process may use.
        verbose: show Flower's and Ray's own lines too (they are in `flower.log` either way).

    Raises:
        RunFailed: the run did not finish.
        ConfigError: the port is taken, or another process works in the run directory.
    """
    out = out.absolute()
    home = out / ".flower"
    empty, run_config = home / "empty", home / "run-config.toml"
    chosen_port = _port(port)
    cpus = num_cpus or available()
    per_client = max(1, config.run.threads)
    gpus = _gpu_share(config, max(1, cpus // per_client))
    command = [
        tool("flwr"), "run", str(app_directory(home)), "local", "--stream",
        "--run-config", str(run_config),
        "--federation-config",
        f"num-supernodes={config.partition.num_clients} "
        f"client-resources-num-cpus={per_client} "
        f"client-resources-num-gpus={gpus} init-args-num-cpus={max(cpus, per_client)}",
    ]  # fmt: skip
    environment = _environment(home, chosen_port)
    with held(out), _short_directory() as sockets, contextlib.ExitStack() as ends:
        environment.setdefault("RAY_TMPDIR", sockets)
        empty.mkdir(parents=True, exist_ok=True)
        write_run_config(
            run_config,
            config,
            out,
            resume=resume,
            releases=releases,
            allow_new_release=allow_new_release,
        )
        ends.callback(stop_processes, home)
        log = out / "flower.log"
        for start in range(1, STARTS + 1):
            before = log.stat().st_size if log.exists() else 0
            stream(command, environment, empty, log, verbose=verbose)
            if start == STARTS or SLOW_START not in log.read_bytes()[before:]:
                break
            print("Flower's SuperLink was slow to start; once more", flush=True)
        outcome = _outcome(environment, empty)
    if outcome != "finished:completed":
        superlink = home / "local-superlink" / "superlink.log"
        raise RunFailed(
            f"the run ended as {outcome!r}: {last_error(out / 'flower.log', superlink)} "
            f"(all output: {out / 'flower.log'}); --resume continues it"
        )


@contextlib.contextmanager
def _short_directory() -> Iterator[str]:
    """A directory for Ray's files of this run; its sockets' paths fit into 107 bytes."""
    given = tempfile.gettempdir()
    places = [given] if len(os.fsencode(given)) <= LONGEST_PLACE else []
    for place in (*places, "/tmp", "/dev/shm", "/var/tmp"):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="fedpdm-", dir=place)
            break
    else:
        raise ConfigError(
            f"TMPDIR: must be at most {LONGEST_PLACE} bytes long for Ray's sockets, got {given!r}, "
            "and /tmp cannot be written"
        )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stop_processes(home: Path | None = None, *, every: bool = False) -> tuple[int, int]:
    """End the processes that runs of this checkout (or installation) started: of one Flower home,
    or of all its runs. Those of other checkouts are left alone unless `every` is asked for.

    Returns how many were ended, and how many of other checkouts go on.
    """
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found, others = [], 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            marked = environment.get(MARKER)
            if process.pid in mine or marked is None:
                continue
            ours = every or environment.get(CHECKOUT) == str(code_root())
            if marked == str(home) or (home is None and ours):
                found.append(process)
            elif home is None:
                others += 1
    return end_processes(found), others


def _environment(home: Path, port: int) -> dict[str, str]:
    return flower_environment(home) | {
        MARKER: str(home),
        CHECKOUT: str(code_root()),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "RAY_DEDUP_LOGS": "0",
    }


def _port(wanted: int | None) -> int:
    """A port on loopback: the wanted one, which must be free, or any free one."""
    if wanted is not None and not 1 <= wanted <= 65535:
        raise ConfigError(f"--port: must be in [1, 65535], got {wanted}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError:
            raise ConfigError(f"--port: {wanted} is in use on 127.0.0.1; choose another") from None
        port: int = probe.getsockname()[1]
        return port


def _gpu_share(config: RunConfig, num_actors: int) -> float:
    """Share of a GPU per client, so that as many clients as actors fit, at most `MOST_ON_A_GPU`
    side by side: each has a CUDA context and models of its own. 0 on the CPU."""
    if config.run.device == "cpu":
        return 0.0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    clients = min(num_actors, config.partition.num_clients, count * MOST_ON_A_GPU)
    return round(min(1.0, count / clients), 3) if count else 0.0


def _outcome(environment: Mapping[str, str], cwd: Path) -> str:
    """How the run ended, by Flower's own record: `finished:completed` if it succeeded."""
    answer = subprocess.run(
        [tool("flwr"), "list", "local", "--format", "json"],
        cwd=cwd,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        runs = json.loads(answer.stdout)["runs"]
        return str(max(runs, key=lambda run: str(run["pending-at"]))["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return f"unknown ({line((answer.stdout + answer.stderr)[-200:])})"
