"""`fedpdm toy`: what it writes and prints, resuming, refusals; its figures."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpdm.cli import main
from fedpdm.config import (
    ConfigError,
    ToyConfig,
    config_reference,
    load_toy_config,
    toy_config_from_mapping,
)
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.jobs.processes import interruptions_blocked
from fedpdm.reporting.pictures import Panel, Series, draw_panels
from fedpdm.toy.plan import covering_norm, nearest_t0, plan
from fedpdm.toy.report import contradictions
from tests.support.command_line import without_advice

ROOT = Path(__file__).parents[2]
SMALL = [
    "release.num_steps=100", "measure.replicates=16", "measure.samples=50",
    "measure.trained_replicates=2", "measure.training_steps=20", "federation.total=200",
    "sweep.sigma2=[0.5, 5]", "sweep.minority=[5, 10, 20]", "sweep.total=[100, 200, 400]",
    "sweep.clients=[2, 4]", "sweep.dim=[1]", "sweep.epsilon=[30]", "sweep.epsilon_dim=2",
]  # fmt: skip


def small(out: Path, *more: str) -> list[str]:
    sets = [part for each in SMALL for part in ("--set", each)]
    return ["toy", "--out", str(out), "--jobs", "1", *sets, *more]


@pytest.mark.slow
def test_a_small_experiment_and_its_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(small(tmp_path, "--json")) == 0
    first = capsys.readouterr()
    report = json.loads(first.out)
    assert set(report["slopes"]) == {"1/n", "1/N"}
    assert report["contradictions"] == []
    assert "s left" in first.err
    for name in ("samples", "gain-sigma2", "gain-epsilon", "rates", "directions"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) >= 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not empty
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    results = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(results["rows"]) > 30
    assert {row["method"] for row in table} == {"alone", "pfdm", "central", "coarse"}
    assert {row["fit"] for row in table} == {"closed", "linear", "mlp"}
    assert float(table[0]["w2"]) == results["rows"][0]["w2"]
    # Interrupted: half of the cells, the last cut off, are taken up again to the same results.
    lines = (tmp_path / "cells.jsonl").read_text().splitlines(keepends=True)
    kept = len(lines) // 2
    (tmp_path / "cells.jsonl").write_text("".join(lines[:kept]) + lines[kept][:40])
    monkeypatch.setattr("fedpdm.toy.report.draw_figures", lambda *_, **__: [])  # as before
    assert main(small(tmp_path, "--json", "--resume")) == 0
    second = capsys.readouterr()
    assert f"toy: {kept} of {len(lines)} cells are there already" in second.err
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert json.loads(second.out) == report


def test_planted_contradictions_are_reported() -> None:
    row = {
        "sweep": "sigma2", "x": 1.0, "class": "minority", "sampler": "flow", "method": "pfdm",
        "fit": "closed", "replicates": 64, "w2": 0.10, "w2_high": 0.12, "theory_w2": 0.13,
        "ratio": 0.5, "ratio_high": 0.51, "theory_ratio": 0.51,
    }  # fmt: skip
    assert contradictions([row]) == []
    assert len(contradictions([{**row, "theory_w2": 0.16}])) == 1
    assert "ratio 0.5, theory 0.6" in contradictions([{**row, "theory_ratio": 0.6}])[0]
    assert contradictions([{**row, "theory_ratio": 0.6, "fit": "mlp"}]) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("release.sigma=1", "release.sigma: unknown key; did you mean sigma2?"),
        ("sweep.sigma2=3", "sweep.sigma2: must be a list, got 3"),
        ("sweep.sigma2=[1, -2]", "sweep.sigma2[1]: must be greater than 0, got -2.0"),
        ("sweep.dim=[1.5]", "sweep.dim[0]: must be int, got 1.5"),
        ("release.sigma2=1e9", "sigma2 must be in ["),
        ("federation.total=30", "num_all must leave a point for each majority client, got 30"),
        ("sweep.epsilon=[0.001]", "sweep.epsilon 0.001: "),
        ("name=../gmm", "name: must be 1 to 128 letters, digits"),
        ("mixture.classes=1", "mixture.classes: must be at least 2, got 1"),
    ],
)
def test_bad_settings_are_one_line(
    override: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["toy", "--out", str(tmp_path / "out"), "--set", override]) == 2
    error = without_advice(capsys.readouterr().err)
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_jobs_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--jobs", "0"]) == 2
    assert without_advice(capsys.readouterr().err) == "fedpdm: --jobs: must be at least 1, got 0\n"


def test_the_experiment_file_is_the_default_experiment() -> None:
    config = load_toy_config(ROOT / "experiments" / "gmm.yaml")
    assert config == toy_config_from_mapping({"name": "gmm"})
    assert {cell.sweep for cell in plan(config)} == {
        "methods", "sigma2", "minority", "total", "clients", "dim", "epsilon"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be read"):
        load_toy_config(ROOT / "experiments" / "missing.yaml")


def test_keys_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--keys"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == config_reference(ToyConfig)
    assert printed in (ROOT / "docs" / "toy.md").read_text()


def test_nearest_t0_and_covering_norm() -> None:
    schedule = make_schedule("linear")
    t0 = nearest_t0(schedule, 1.0)
    around = [abs(np.log(schedule.noise_to_signal(t))) for t in (t0 - 1, t0, t0 + 1)]
    assert min(around) == around[1]
    rng = np.random.default_rng(0)
    for v in (np.ones(16), np.array([10.0, 1.0, 0.1])):
        x = rng.normal(size=(20_000, len(v))) * np.sqrt(v)
        x[:, 0] += 2.0
        outside = (np.linalg.norm(x, axis=1) > covering_norm(2.0, v.tolist())).mean()
        assert outside < 0.005


def series(count: int) -> list[Series]:
    x = np.array([1.0, 10.0])
    return [
        Series(name=str(i), x=x, y=x, low=x * 0.9, high=x * 1.1, curve_x=x, curve_y=x)
        for i in range(count)
    ]


def panel(count: int) -> Panel:
    return Panel(title="a", x_label="x", y_label="y", series=series(count))


@pytest.mark.slow
def test_panels_are_the_same_bytes_again(tmp_path: Path) -> None:
    paths = [draw_panels(tmp_path / n, [panel(2)] * 4, title="t", note="n") for n in ("a", "b")]
    for first, second in zip(*paths, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]


def test_too_many_panels_or_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="panels must be 1 to 4, got 0"):
        draw_panels(tmp_path / "a", [], title="t", note="n")
    with pytest.raises(ValueError, match="a panel takes 4 series, got 5"):
        draw_panels(tmp_path / "a", [panel(5)], title="t", note="n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["processes start", "cells are finished"])
def test_an_interruption_ends_it_and_loses_nothing(tmp_path: Path, moment: str) -> None:
    """Ctrl-C reaches every process of a terminal: while they start, and while they work."""
    command = [sys.executable, "-m", "fedpdm.cli", *small(tmp_path), "--jobs", "2"]
    command += ["--set", "measure.training_steps=100"]  # long enough to be caught at it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finished = tmp_path / "cells.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # Made just before the processes; has a line for each cell that is done.
        if finished.exists() and (moment == "processes start" or finished.stat().st_size):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, printed = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    # A process that had hardly begun may complain after it.
    assert any("interrupted" in line for line in printed.splitlines()), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "results.json").exists()


def test_an_interruption_while_processes_start_is_raised_afterwards() -> None:
    """Neither lost nor raised in between, where it would leave processes half started."""
    exits = []
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"

    def interrupted_start() -> None:
        with interruptions_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            exits.append(subprocess.run([sys.executable, "-c", interrupt], check=False).returncode)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted_start()
    assert exits == [0]
    assert signal.getsignal(signal.SIGINT) is handler
