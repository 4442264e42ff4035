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
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

import fedpdm
from fedpdm.config import ConfigError, RunConfig, config_to_json

__all__ = ["RunFailed", "run_with_flower", "stop_processes"]

MARKER = "FEDPDM_FLOWER_HOME"
PACKAGES = ("fedpdm", "strategies", "clients")


class RunFailed(RuntimeError):
    """The run did not finish; one line that says why and where to look."""


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
        num_cpus: processors for Ray; default: all of this machine.
        verbose: show Flower's and Ray's own lines too (they are in `flower.log` either way).

    Raises:
        RunFailed: the run did not finish.
        ConfigError: the port is taken.
    """
    out = out.absolute()
    home = out / ".flower"
    empty = home / "empty"
    chosen_port = _port(port)
    empty.mkdir(parents=True, exist_ok=True)
    run_config = home / "run-config.toml"
    run_config.write_text(
        "\n".join(
            (
                f"resolved-config = {json.dumps(config_to_json(config))}",
                f"run-dir = {json.dumps(str(out))}",
                f"resume = {'true' if resume else 'false'}",
                f"release-dir = {json.dumps(str(releases.absolute()) if releases else '')}",
                f"allow-new-release = {'true' if allow_new_release else 'false'}",
            )
        )
        + "\n",
        encoding="utf-8",
    )
    cpus = num_cpus or os.cpu_count() or 1
    per_client = max(1, config.run.threads)
    gpus = _gpu_share(config, max(1, cpus // per_client))
    command = [
        _tool("flwr"), "run", str(_app_directory(home)), "local", "--stream",
        "--run-config", str(run_config),
        "--federation-config",
        f"num-supernodes={config.partition.num_clients} "
        f"client-resources-num-cpus={per_client} "
        f"client-resources-num-gpus={gpus} init-args-num-cpus={max(cpus, per_client)}",
    ]  # fmt: skip
    environment = _environment(home, chosen_port)
    try:
        _stream(command, environment, empty, out / "flower.log", verbose=verbose)
        outcome = _outcome(environment, empty)
    finally:
        stop_processes(home)
    if outcome != "finished:completed":
        raise RunFailed(
            f"the run ended as {outcome!r}: {_last_error(out / 'flower.log')} "
            f"(all output: {out / 'flower.log'}); --resume continues it"
        )


def stop_processes(home: Path | None = None) -> int:
    """End every process that a run started: of one Flower home, or of all. Returns how many."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marked = process.environ().get(MARKER)
            if process.pid in mine or marked is None:
                continue
            if home is None or marked == str(home):
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=8)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return len(found)


def _tool(name: str) -> str:
    """A console script beside this Python, else on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RunFailed(f"{name} is not installed: pip install 'flwr[simulation]==1.39.0'")
    return found


def _environment(home: Path, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {
        MARKER: str(home),
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    return environment


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
    """Share of a GPU per client, so that as many clients as actors fit; 0 on the CPU."""
    if config.run.device == "cpu":
        return 0.0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    clients = min(num_actors, config.partition.num_clients)
    return round(min(1.0, count / clients), 3) if count else 0.0


def _app_directory(home: Path) -> Path:
    """The Flower app: the checkout, or a copy of the installed packages with a project file."""
    root = Path(fedpdm.__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    if project.exists() and "[tool.flwr.app]" in project.read_text(encoding="utf-8"):
        return root
    app = home / "app"
    shutil.rmtree(app, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(root / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    return app


_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedpdm"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["fedpdm", "strategies", "clients"]
[tool.flwr.app]
publisher = "fedpdm"
fab-include = ["fedpdm/**/*.py", "strategies/**/*.py", "clients/**/*.py"]
[tool.flwr.app.components]
serverapp = "strategies.server_app:app"
clientapp = "clients.client_app:app"
[tool.flwr.app.config]
experiment = "digits"
set = ""
num-clients = 2
run-dir = ""
resume = false
release-dir = ""
allow-new-release = false
resolved-config = ""
"""


def _stream(
    command: list[str], environment: Mapping[str, str], cwd: Path, log: Path, *, verbose: bool
) -> None:
    """Run `flwr run`, copy all its output to `log`, show what concerns the user."""
    with (
        open(log, "a", encoding="utf-8") as record,
        subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                record.write(line)
                record.flush()
                for shown in [line.rstrip("\n")] if verbose else _shown(line):
                    print(shown, flush=True)
        except KeyboardInterrupt:
            process.terminate()
            raise


def _shown(line: str) -> Iterator[str]:
    """The part of a line of `flwr run --stream` that concerns the user, if any.

    Flower's own log lines start with a coloured level, Ray's with the worker's name.
    """
    text = _COLOUR.sub("", line).rstrip()
    if text.startswith(("ERROR", "CRITICAL")):
        yield text
    elif match := _OURS.search(text):
        yield text[match.start() :]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OURS = re.compile(
    r"(?<!\S)(round \d+(/\d+| fit| evaluate)|client \d+ round \d+|resumed after round)\b.*"
)


def _outcome(environment: Mapping[str, str], cwd: Path) -> str:
    """Flower's own word on how the run ended: `finished:completed` if it did well."""
    answer = subprocess.run(
        [_tool("flwr"), "list", "local", "--format", "json"],
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
        return f"unknown ({' '.join((answer.stdout + answer.stderr).split())[-200:]})"


def _last_error(log: Path) -> str:
    """The last line of the log that looks like the cause."""
    causes = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if "Error" in line or "Failure" in line
    ]
    return causes[-1][:400] if causes else "no error was printed"
