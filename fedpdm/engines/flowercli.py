"""Flower's command line and its processes: what simulated and deployed runs have in common."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from fedpdm.config import RunConfig, config_to_json
from fedpdm.config.plugins import DIRECTORY_VARIABLE
from fedpdm.deployment.code_digest import PACKAGES, code_root
from fedpdm.deployment.proxies import without_proxy_here
from fedpdm.text import visible

__all__ = [
    "RunFailed",
    "app_directory",
    "end_processes",
    "flower_environment",
    "shown_line",
    "stream",
    "tool",
    "write_run_config",
]


class RunFailed(RuntimeError):
    """The run did not finish; one line that says why and where to look."""


def flower_environment(home: Path) -> dict[str, str]:
    """This process's environment for Flower's commands: own home, nothing sent or installed.

    What stays on this machine goes through no proxy. Flower's processes work in other directories;
    code that a config names is found where this one works all the same.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return without_proxy_here(environment) | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        DIRECTORY_VARIABLE: environment.get(DIRECTORY_VARIABLE) or os.getcwd(),
        "PYTHONUNBUFFERED": "1",
    }


def write_run_config(
    path: Path,
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    releases: Path | None = None,
    allow_new_release: bool = False,
) -> None:
    """The flat run config of server and clients (`fedpdm.setup.flower_config`), as TOML."""
    lines = (
        f"resolved-config = {json.dumps(config_to_json(config))}",
        f"run-dir = {json.dumps(str(out))}",
        f"resume = {'true' if resume else 'false'}",
        f"release-dir = {json.dumps(str(releases.absolute()) if releases else '')}",
        f"allow-new-release = {'true' if allow_new_release else 'false'}",
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def end_processes(processes: Sequence[psutil.Process]) -> int:
    """End processes, gently first; returns how many there were."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=8)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return len(processes)


def tool(name: str) -> str:
    """A console script beside this Python, else on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RunFailed(f"{name} is not installed: pip install 'flwr[simulation]==1.39.0'")
    return found


def app_directory(home: Path) -> Path:
    """The Flower app: the checkout, or a copy of the installed packages with a project file."""
    root = code_root()
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


def stream(
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
            for each in process.stdout:
                record.write(visible(_COLOUR.sub("", each)))
                record.flush()
                for shown in [shown_line(each)] if verbose else _shown(each):
                    print(shown, flush=True)
        except KeyboardInterrupt:
            process.terminate()
            raise


def shown_line(raw: str) -> str:
    """A line as it came; without its colours where they are not wanted (no-color.org)."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text, *rest = _COLOUR.split(raw.rstrip("\n"))
    colours = _COLOUR.findall(raw) if coloured else [""] * len(rest)
    pairs = zip(colours, rest, strict=True)
    return visible(text) + "".join(colour + visible(part) for colour, part in pairs)


def _shown(raw: str) -> Iterator[str]:
    """The part of a line of `flwr run --stream` that concerns the user, if any.

    Flower's own log lines start with a coloured level, Ray's with the worker's name.
    """
    text = visible(_COLOUR.sub("", raw).rstrip())
    if text.startswith(("ERROR", "CRITICAL")):
        yield text
    elif match := _OURS.search(text):
        yield text[match.start() :]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OURS = re.compile(
    r"(?<!\S)(round \d+(/\d+| fit| evaluate)|client \d+ round \d+|client \d+ [\w ,]+: \w+ \d+/\d+"
    r"|resumed after round)\b.*"
)
