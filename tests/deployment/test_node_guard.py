"""Flower's own builder, installer and loader with changed code: what a node executes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedpdm.deployment.code_digest import PACKAGES, code_root

SCRIPT = """
import hashlib, sys
from pathlib import Path
home = Path(sys.argv[1])
if sys.argv[2] == "guarded":
    from fedpdm.engines.deployed.guard import InstalledCode
    sys.meta_path.insert(0, InstalledCode(home))
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
bundle = next(home.glob("*.fab")).read_bytes()
install_from_fab(bundle, skip_prompt=True)
load = get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
load("fedpdm/fedpdm", "0.1.0", hashlib.sha256(bundle).hexdigest())
"""


@pytest.mark.slow
def test_flower_loads_changed_code_and_a_guarded_node_refuses_it(tmp_path: Path) -> None:
    app, home = tmp_path / "app", tmp_path / "home"
    home.mkdir()
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(code_root() / name, app / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(code_root() / name, app)
    shutil.copytree(code_root() / "experiments", app / "experiments")
    trace = tmp_path / "trace"
    with open(app / "clients" / "client_app.py", "a") as file:
        file.write(f"\nopen({str(trace)!r}, 'w').close()\n")
    environment = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    environment["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run(
        [flwr, "build", "--app", app], cwd=home, env=environment, check=True, capture_output=True
    )

    def load(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", SCRIPT, str(home), how]
        return subprocess.run(
            command, cwd=home, env=environment, check=False, capture_output=True, text=True
        )

    guarded = load("guarded")
    assert guarded.returncode != 0
    assert "BundleRefused: code: the shipped bundle's digest is" in guarded.stderr
    assert not trace.exists()
    assert load("plain").returncode == 0  # the planted change does run where nobody looks
    assert trace.exists()
