"""How `fedpdm run` ends when it does not end well: exit code and last line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clients.training import LocalTraining
from fedpdm.config import config_to_yaml
from strategies.coarse import CoarseStrategy
from tests.support.command_line import CONFIG, call, forget_surroundings, in_process, without_advice


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch, tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(config_to_yaml(CONFIG))
    return path


@pytest.mark.slow
def test_failed_client_has_exit_code_1_and_a_name(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = LocalTraining.train_fine

    def fail_at_client_1(self: LocalTraining, *arguments: Any) -> Any:
        if self.local.client_id == 1:
            raise FloatingPointError("loss is nan at step 1")
        return train(self, *arguments)

    monkeypatch.setattr(LocalTraining, "train_fine", fail_at_client_1)
    assert in_process(experiment, "--out", tmp_path / "out") == 1
    last = without_advice(capsys.readouterr().err).splitlines()[-1]
    assert last == "fedpdm: round 1 fit: client 1: loss is nan at step 1"
    assert call("show", tmp_path / "out") == 2


@pytest.mark.slow
def test_unexpected_failure_of_a_client_names_it_too(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = LocalTraining.release

    def fail_at_client_0(self: LocalTraining) -> Any:
        if self.local.client_id == 0:
            raise RuntimeError("CUDA error: out of memory")
        return release(self)

    monkeypatch.setattr(LocalTraining, "release", fail_at_client_0)
    assert in_process(experiment, "--out", tmp_path / "out") == 1
    last = without_advice(capsys.readouterr().err).splitlines()[-1]
    assert last == "fedpdm: round 1 fit: client 0: CUDA error: out of memory"


@pytest.mark.slow
def test_diverging_server_training_has_exit_code_1(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("coarse.training=server", "coarse.lr=1e30", "coarse.steps_per_round=30")
    sets = [word for setting in settings for word in ("--set", setting)]
    assert in_process(experiment, "--out", tmp_path / "out", *sets) == 1
    last = without_advice(capsys.readouterr().err).splitlines()[-1]
    assert re.fullmatch(r"fedpdm: server round 1 coarse: loss is (nan|inf) at step \d+", last)


@pytest.mark.slow
def test_interrupted_run_has_exit_code_130_and_resumes(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(CoarseStrategy, "configure_evaluate", interrupt)
        assert in_process(experiment, "--out", out) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; nothing is lost")
    assert in_process("--resume", "--out", out) == 0
    assert "resumed after round 1 of 1" in capsys.readouterr().out
    assert in_process("--resume", "--out", out) == 2  # it has finished


def test_a_bug_is_not_dressed_up(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only foreseen failures become one line; the traceback of a fault in the code stays."""

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("not of ours")

    monkeypatch.setattr("fedpdm.engines.preflight.check_run", fault)
    with pytest.raises(RuntimeError, match="not of ours"):
        in_process(experiment)


def test_a_delta_beyond_one_image_is_pointed_out_before_the_run(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out", "--dry-run")
    assert in_process(experiment, *out) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert in_process(experiment, *out, "--set", "privacy.delta=0.5") == 0
    assert "WARNING: privacy.delta: delta 0.5 is above 1 / " in capsys.readouterr().out
    nothing = ("--set", "coarse.images=raw", "--set", "privacy.delta=0.5")
    assert in_process(experiment, *out, *nothing) == 0  # a baseline that promises nothing
    assert "WARNING" not in capsys.readouterr().out


def test_an_error_cannot_draw_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file says is in its error: one visible line of bounded length."""
    hostile = "ok\u202e\u200b\xa0" + 100_000 * "x"
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{seed: '{hostile}'}}\n")
    assert call("run", path, "--out", tmp_path / "out") == 2
    first = capsys.readouterr().err.split("\n")[0]
    assert first.isprintable()
    assert r"run.seed: must be int, got 'ok\u202e\u200b\xa0xxx" in first
    assert len(first) < 4100
    path.write_text(f"'{hostile[:200]}': 1\n")
    assert call("run", path, "--out", tmp_path / "out") == 2
    first = capsys.readouterr().err.split("\n")[0]
    assert first.startswith(r"fedpdm: ok\u202e\u200b\xa0xxx")
    assert first.isprintable()
