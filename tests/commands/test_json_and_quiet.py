"""`--json` and `--quiet`, on every command: JSON alone on standard output; nothing but errors."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedpdm.cli import _parser
from fedpdm.commands.terminal import RESULTS, WITHOUT, walk_commands
from fedpdm.config import config_from_mapping, config_to_yaml
from tests.support.command_line import CONFIG, call, forget_surroundings
from tests.support.federations import small_config
from tests.support.real_nodes import free_port, make_certificates, make_node_key

LEAVES = {
    name: command
    for name, command in walk_commands(_parser())
    if not any(isinstance(action, argparse._SubParsersAction) for action in command._actions)
}
# What is called here, in a folder with a finished run in `run`, a folder of certificates in `ca`
# and so on (`workplace`).
CALLS = {
    "run": "run small.yaml --engine inprocess --out {new}",
    "show": "show run",
    "export": "export run --out {new}",
    "sample": "sample pipeline --label 3 --num 2 --steps 2 --out {new}.png",
    "config": "config",
    "privacy": "privacy --epsilon 10 --clip-norm 10",
    "ledger": "ledger run",
    "report": "report run --no-film --out {new}.html",
    "toy": "toy --keys",
    "attack linkage": "attack linkage --data digits --pairs 50 --seed 1 --seeded 1",
    "attack audit": "attack audit --canaries 60 --shape 1x8x8 --seed 1 --seeded 1",
    "certificates ca": "certificates ca --out {new}",
    "certificates server": "certificates server --ca ca --name host.example --out {new}",
    "certificates node": "certificates node --ca ca --client 0 --out {new}",
    "certificates request": "certificates request --client 1 --out {new}",
    "certificates sign": "certificates sign request/node-2.csr --ca ca --client 2 --out {new}",
    "node invite": "node invite small.yaml --out {new}.json",
    "node digest": "node digest",
}  # fmt: skip
# Commands that say no and still print JSON.
REFUSALS = {
    "attack controls": (
        "attack controls --images 12 --steps 5 --attacks loss --samples 10 --out {new}",
        1,
    ),
    "node check": ("node check --coordinator 127.0.0.1:1 --certificate a.crt --data b", 2),
}
# JSON of these is read in another test.
ELSEWHERE = {
    "experiment": "test_experiment_command",
    "evaluate": "test_terminal",
    "tables": "test_results",
    "attack models": "test_attack_runs",
    **dict.fromkeys(("federation start", "federation status", "federation stop"), "below"),
    "federation run": "test_deployed",
    "node start": "test_deployed",
}
# Never called in a test.
NOT_CALLED = {"stop": "ends every run of this machine, whoever started it"}


@pytest.fixture(scope="module")
def workplace(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    (folder / "small.yaml").write_text(config_to_yaml(CONFIG))
    shutil.copytree(finished_run, folder / "run")
    assert call("export", folder / "run", "--out", folder / "pipeline", "--quiet") == 0
    assert call("certificates", "ca", "--out", folder / "ca", "--quiet") == 0
    request = ("certificates", "request", "--client", 2, "--out", folder / "request", "--quiet")
    assert call(*request) == 0
    return folder


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_every_command_has_it_or_says_why_not(option: str) -> None:
    reasons = WITHOUT[option]
    missing = {name for name, each in LEAVES.items() if option not in each._option_string_actions}
    assert missing == reasons.keys()
    assert all(reasons.values())
    assert len(LEAVES) > 25


def test_every_command_is_called_somewhere() -> None:
    named = [*CALLS, *REFUSALS, *ELSEWHERE, *NOT_CALLED, *WITHOUT["--json"]]
    assert sorted(named) == sorted(LEAVES)
    assert not set(NOT_CALLED) & {*CALLS, *REFUSALS}


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch, workplace)
    return workplace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", [*CALLS, *REFUSALS])
def test_json_alone_on_standard_output(
    name: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, code = REFUSALS.get(name) or (CALLS[name], 0)
    capsys.readouterr()
    assert call(*words.format(new=tmp_path / "json").split(), "--json") == code
    printed = capsys.readouterr()
    assert json.loads(printed.out), printed.out
    assert printed.out.rstrip().endswith(("}", "]"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", [*CALLS, *REFUSALS])
def test_quiet_prints_nothing(
    name: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, code = REFUSALS.get(name) or (CALLS[name], 0)
    capsys.readouterr()
    assert call(*words.format(new=tmp_path / "quiet").split(), "--quiet") == code
    printed = capsys.readouterr()
    assert printed.err == ""
    assert (printed.out != "") is (name in RESULTS)  # their results are what was asked for


@pytest.mark.slow
def test_what_the_json_says(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: Any) -> Any:
        capsys.readouterr()
        assert call(*words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    keys = {each["key"]: each for each in told("config")}
    assert keys["privacy.clip_norm"]["default"] == config_from_mapping({}).privacy.clip_norm
    assert keys["coarse.images"]["choices"] == ["released", "raw", "dp_sgd"]
    made = told("certificates", "node", "--ca", "ca", "--client", 5, "--out", tmp_path / "five")
    for name in ("certificate", "key", "public_key"):
        assert Path(made[name]).is_file()
    checked = told("run", "small.yaml", "--dry-run", "--out", tmp_path / "dry")
    assert checked == {"run": str(tmp_path / "dry"), "dry_run": True}


@pytest.mark.flower
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_superlink_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one: started, asked and ended."""
    config = small_config(run={"simulation": False}, data={"max_images": None})
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    make_node_key(tmp_path / "keys" / "node-0-north")
    certificates = make_certificates(tmp_path / "certificates")

    def told(action: str, *words: Any) -> Any:
        capsys.readouterr()
        assert call("federation", action, *words, "--state", tmp_path / "state", "--json") == 0
        return json.loads(capsys.readouterr().out)

    fleet, control = (f"127.0.0.1:{free_port()}" for _ in range(2))
    places = ("--fleet", fleet, "--control", control, "--certificates", certificates)
    try:
        started = told("start", *places, "--node-keys", tmp_path / "keys")
        assert (started["fleet"], started["control"]) == (fleet, control)
        assert started["registered"].keys() == {"node-0-north"}
        assert started["registered"]["node-0-north"].isdecimal()
        assert told("status")["running"] is True
        out = tmp_path / "out"
        checked = told("run", tmp_path / "run.yaml", "--dry-run", "--out", out)
        assert checked == {"run": str(out), "dry_run": True}
    finally:
        ended = told("stop")["ended"]
    assert ended >= 1
