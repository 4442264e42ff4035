"""The command line as people and programs meet it: examples, JSON, quiet, completion, advice."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpdm.cli import _parser
from fedpdm.commands.attack_models import route_attack
from fedpdm.commands.examples import EXAMPLES
from fedpdm.commands.terminal import RESULTS, next_step, quiet, walk_commands
from fedpdm.config import ConfigError, config_to_yaml
from fedpdm.engines import flowercli
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.types import GaussianEvent
from fedpdm.storage.files import StoreError, read_json
from tests.support.cases import every
from tests.support.command_line import CONFIG, call, forget_surroundings, in_process

COMMANDS = dict(walk_commands(_parser()))


# Help.


@pytest.mark.slow
@every("name", COMMANDS)
def test_every_command_shows_examples_that_parse(name: str) -> None:
    """Oracle: the parser itself takes every example, as the command that it is shown for."""
    text = COMMANDS[name].format_help()
    assert "examples:\n" in text
    shown = text.split("examples:\n")[1].splitlines()
    lines = [
        line.split("   ")[0].strip() for line in (x[2:] for x in shown if x[:9] == "  fedpdm ")
    ]
    assert lines
    for line in lines:
        words = route_attack(shlex.split(line.split(" > ")[0])[1:])
        options = _parser().parse_args(words)
        assert options.command.startswith(name), line


def test_no_example_is_of_a_command_that_is_gone() -> None:
    assert EXAMPLES.keys() <= COMMANDS.keys()
    assert {*RESULTS} <= COMMANDS.keys()


def test_no_colours_without_a_terminal(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "PYTHON_COLORS"):
        monkeypatch.setenv(name, "")
    with contextlib.suppress(SystemExit):
        call("--help")
    with contextlib.suppress(SystemExit):
        call("run", "--help")
    assert call("show", finished_run) == 0
    assert call("show", "nowhere") == 2
    said = capfd.readouterr()
    assert "usage: fedpdm run" in said.out
    assert "locally differentially private" in said.out
    assert "Next: " in said.err
    assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize(
    ("terminal", "setting", "kept"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_flowers_colours_are_kept_at_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, setting: str, kept: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", setting)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    line = "\x1b[92mINFO\x1b[0m : started\n"
    assert flowercli.shown_line(line) == (line.rstrip() if kept else "INFO : started")


# Results for programs.


@pytest.mark.slow
def test_run_json_is_show_json_and_all_else_is_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_surroundings(monkeypatch, tmp_path)
    (tmp_path / "small.yaml").write_text(config_to_yaml(CONFIG))
    out = tmp_path / "out"
    assert in_process("small.yaml", "--out", out, "--json") == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert facts["run"] == str(out)
    assert facts["metrics"] == read_json(out / "metrics.json")
    assert facts["privacy"] == read_json(out / "privacy.json")
    assert "round 1/1" in told.err
    assert call("show", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == facts


@pytest.mark.slow
def test_quiet_run_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_surroundings(monkeypatch, tmp_path)
    (tmp_path / "small.yaml").write_text(config_to_yaml(CONFIG))
    assert in_process("small.yaml", "--out", "out", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert "round 1/1" in (tmp_path / "out" / "log.txt").read_text()
    assert in_process("small.yaml", "--out", "out", "--quiet") == 2  # errors are said all the same
    assert "this run has finished; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_export_sample_evaluate_and_ledger_in_json(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, grid = tmp_path / "pipe", tmp_path / "grid.png"
    assert call("export", finished_run, "--out", pipeline, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(pipeline), "client": 0}
    common = ("sample", pipeline, "--num", 2, "--steps", 2, "--label", 3, "--out", grid)
    assert call(*common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num"] == 2
    assert call(*common, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert call("ledger", finished_run, "--json") == 0
    ledgers = json.loads(capsys.readouterr().out)
    event = GaussianEvent(noise_multiplier=ledgers[0]["records"][1]["noise_multiplier"])
    assert ledgers[0]["epsilon_max"] == pytest.approx(epsilon_spent([event], delta=1e-5))


def test_evaluate_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"num_own": 7, "scores": {"majority_recall": 0.25}, "floor": {"majority_recall": 1.0}}
    scores = {"clients": [{"client_id": 3, "groups": {"majority": record},
                           "downstream": {"accuracy": 0.5}}]}  # fmt: skip

    def assess(*_: Any, **__: Any) -> Any:
        print("training a feature network")
        return scores, None

    monkeypatch.setattr("fedpdm.evaluation.assessment.assess_run", assess)
    assert call("evaluate", "run", "--json", "--out", tmp_path / "scores.json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((tmp_path / "scores.json").read_text()) == scores
    assert told.err == "training a feature network\n"
    assert call("evaluate", "run", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert call("evaluate", "run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "training a feature network",
        "client 3 majority, 7 own images",
        "  samples     recall 0.25",
        "  real images recall 1",
        "  accuracy 0.500",
    ]


def test_long_lines_of_scores_keep_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole scores, a part of a line under the other; into a file each line as it is."""
    values = {f"majority_measure_{k}[trained-64]": 0.125 for k in range(12)}
    record = {"num_own": 7, "scores": values, "floor": {}}
    clients = [{"client_id": 3, "groups": {"majority": record}, "downstream": {}}]
    monkeypatch.setattr(
        "fedpdm.evaluation.assessment.assess_run", lambda *_, **__: ({"clients": clients}, None)
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert call("evaluate", "run") == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 200
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert call("evaluate", "run") == 0
    parts = capsys.readouterr().out
    assert max(map(len, parts.splitlines())) <= 80
    assert parts.split() == whole.split()


def test_quiet_silences_the_progress_stream_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (True, False):
        with quiet(argparse.Namespace(command="attack linkage", quiet=asked)):
            print("progress", file=sys.stderr)
            print("result")
        told = capsys.readouterr()
        assert told.out == "result\n"
        assert told.err == ("" if asked else "progress\n")


# Completion.


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("completion", shell) == 0
    script = capsys.readouterr().out
    for word in ("experiment", "certificates", "--allow-new-release", "inprocess"):
        assert word.lstrip("-") in script


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("fedpdm exp", {"experiment", "export"}), ("fedpdm run --eng", {"--engine"}),
     ("fedpdm run --engine ", {"flower", "inprocess"}), ("fedpdm node ch", {"check"})],
)  # fmt: skip
def test_bash_completes(line: str, wanted: set[str], tmp_path: Path, capsys: Any) -> None:
    """Bash itself, with the script and a line."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    assert call("completion", "bash") == 0
    script = capsys.readouterr().out
    words = line.split(" ")
    name = next(
        part.split()[-2] for part in script.splitlines() if part.startswith("complete ")
        and part.endswith("fedpdm")
    )  # fmt: skip
    ask = (
        f"{script}\nCOMP_WORDS=({' '.join(shlex.quote(word) for word in words)})\n"
        f"COMP_CWORD={len(words) - 1}\n{name} fedpdm {shlex.quote(words[-1])} {words[-2]}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    answer = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=False)
    assert {reply.strip() for reply in answer.stdout.splitlines()} == wanted, answer.stderr


# What to do next.


def at_a_terminal(arguments: list[str], folder: Path) -> str:
    """What a person sees."""
    primary, secondary = pty.openpty()
    code = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); from fedpdm.cli import main; " \
           f"sys.exit(main({arguments!r}))"  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=secondary, stdout=secondary,
        stderr=secondary,
    )  # fmt: skip
    os.close(secondary)
    shown = b""
    try:
        while data := os.read(primary, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(primary)
    assert child.wait() == 2
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        (["show", "nowhere"], "Next: fedpdm show --help shows examples"),
        (["run", "small.yaml", "--set", "privacy.epsilon=-1"], "Next: fedpdm config lists every"),
        (["run", "--engine", "grpc"], "Next: fedpdm run --help shows examples"),
    ],
)  # fmt: skip
def test_errors_end_with_what_to_do(
    arguments: list[str],
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At a terminal and in a log, but not where --quiet asks for the error alone."""
    (tmp_path / "small.yaml").write_text("data: {name: digits}\n")
    shown = at_a_terminal(arguments, tmp_path).strip().splitlines()
    assert shown[-1].startswith(step)
    forget_surroundings(monkeypatch, tmp_path)
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # arguments that argparse refuses
        assert call(*arguments) == 2
    logged = capsys.readouterr()
    assert logged.out == ""
    assert logged.err.splitlines()[-1] == shown[-1]


def test_quiet_errors_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", tmp_path / "nowhere", "--quiet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedpdm: ")


def test_each_kind_of_error_has_its_advice() -> None:
    run = argparse.Namespace(command="run", out=Path("runs/x"))
    steps = [
        next_step(error, run)
        for error in (
            RuntimeError("the run ended"), StoreError("s: damaged"), MemoryError(),
            FileNotFoundError(2, "no"), ConfigError("run.rounds: must be"), ValueError("num must"),
            RuntimeError("round 1 fit: client 0: loss is nan at step 7"),
        )
    ]  # fmt: skip
    assert len(set(steps)) == len(steps)
    assert steps[0] == "fedpdm run --resume --out runs/x goes on from the last round"
    assert next_step(ConfigError("--out: is taken"), run) == "fedpdm run --help shows examples"
