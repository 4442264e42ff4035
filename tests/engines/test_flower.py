"""Real `flwr run` in Ray simulation: same weights as in process, real exit codes, no leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fedpdm.cli import main
from fedpdm.config import RunConfig, config_to_yaml
from fedpdm.engines.flower import CHECKOUT, MARKER, stop_processes
from fedpdm.engines.inprocess import run_in_process
from fedpdm.processors import available
from fedpdm.storage.client_store import read_tensors
from tests.support.command_line import without_advice
from tests.support.federations import small_config

pytestmark = [pytest.mark.flower, pytest.mark.slow]


def command(tmp_path: Path, config: RunConfig, out: Path) -> list[str]:
    experiment = tmp_path / "small.yaml"
    experiment.write_text(config_to_yaml(config))
    return [sys.executable, "-m", "fedpdm.cli", "run", str(experiment), "--out", str(out)]


def leftovers(out: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(out / ".flower"):
                found.append(f"{process.pid} {process.name()}")
        except (psutil.Error, OSError):
            continue
    return found


def test_failed_run_has_exit_code_1_and_names_the_client(tmp_path: Path) -> None:
    config = small_config(
        run={"threads": available()},  # one actor: a second one would start in vain
        fine={"lr": 1e30, "grad_clip": 1e30, "steps_per_round": 40},
    )
    out = tmp_path / "out"
    done = subprocess.run(command(tmp_path, config, out), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert without_advice(done.stderr).count("\n") == 1
    assert "loss is nan at step" in done.stderr
    assert "client" in done.stderr
    assert leftovers(out) == []


def test_a_run_is_killed_and_resumed_and_has_the_weights_of_one_in_process(tmp_path: Path) -> None:
    """Bit for bit, from its first round on; also behind a proxy where nobody answers, and with a
    TMPDIR too long for Ray's sockets."""
    config = small_config(fine={"steps_per_round": 60, "checkpoint_every": 5})
    out, reference = tmp_path / "out", tmp_path / "reference"
    temporary = tmp_path / ("t" * 82)
    temporary.mkdir()
    surroundings = {**os.environ, "TMPDIR": str(temporary)}
    surroundings |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    process = subprocess.Popen(
        command(tmp_path, config, out), env=surroundings,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 900  # on a loaded machine
    while not list(out.glob("clients/*/partial/fine.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no client trains"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in [int(entry.split()[0]) for entry in leftovers(out)]:
        try:
            os.kill(pid, signal.SIGKILL)  # as a power cut would: nothing gets to clean up
        except ProcessLookupError:
            continue
    released = {p: p.read_bytes() for p in out.glob("clients/*/releases/*.safetensors")}
    assert released
    assert not (out / "metrics.json").exists()  # the first round was not over
    done = subprocess.run(
        [*command(tmp_path, config, out), "--resume"],
        capture_output=True, text=True, env=surroundings,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1/2" in done.stdout
    assert "round 2/2" in done.stdout
    assert "locally differentially private" in " ".join(done.stdout.split())
    assert leftovers(out) == []
    assert all(path.read_bytes() == data for path, data in released.items())
    run_in_process(config, reference)
    for name in (
        "coarse.safetensors", "clients/0/releases/000001.safetensors",
        "clients/2/rounds/000002/fine.safetensors",
    ):  # fmt: skip
        first, second = read_tensors(out / name)[0], read_tensors(reference / name)[0]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    metrics = [
        json.loads((root / "metrics.json").read_text())["final"]["clients"]
        for root in (out, reference)
    ]
    for ours, theirs in zip(*metrics, strict=True):  # numpy's BLAS has other thread counts there
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_stop_ends_processes_of_one_home_only(tmp_path: Path) -> None:
    environment = {**os.environ, MARKER: str(tmp_path / "a")}
    mine = subprocess.Popen(["sleep", "999"], env=environment)
    other = subprocess.Popen(["sleep", "999"], env={**os.environ, MARKER: str(tmp_path / "b")})
    try:
        assert stop_processes(tmp_path / "a") == (1, 0)
        assert mine.poll() is not None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_stop_leaves_other_checkouts_alone_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of versions that did not mark their checkout count as others, too."""
    marks = {"mine": str(tmp_path / "here"), "other": str(tmp_path / "there"), "old": None}
    monkeypatch.setattr("fedpdm.engines.flower.code_root", lambda: tmp_path / "here")
    sleeping = {}
    for name, mark in marks.items():
        environment = {**os.environ, MARKER: str(tmp_path / name / ".flower")}
        environment |= {CHECKOUT: mark} if mark else {}
        sleeping[name] = subprocess.Popen(["sleep", "999"], env=environment)
    ours = [psutil.Process(process.pid) for process in sleeping.values()]
    monkeypatch.setattr(psutil, "process_iter", lambda: ours)
    try:
        assert main(["stop", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"ended": 1, "others": 2}
        assert [process.poll() is None for process in sleeping.values()] == [False, True, True]
        assert main(["stop", str(tmp_path / "old")]) == 0
        assert capsys.readouterr().out == "1 processes ended\n"
        assert [process.poll() is None for process in sleeping.values()] == [False, True, False]
        assert main(["stop", "--all"]) == 0
        assert sleeping["other"].poll() is not None
        assert main(["stop", "x", "--all"]) == 2
    finally:
        for process in sleeping.values():
            process.kill()
            process.wait()
