"""A finished run that goes on for more rounds, and runs that differ in one key."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fedpdm
from fedpdm.config import ConfigError, RunConfig, config_from_mapping, config_to_yaml, run_digest
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.continuing import continued, overridden, schedule_lines
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import called
from tests.support.federations import small_config
from tests.support.made_once import made_once

CONFIG = small_config(
    run={"rounds": 2},
    data={"max_images": 120},
    partition={"num_clients": 2},
    coarse={"decay": "constant", "steps_per_round": 2},
    fine={"decay": "constant", "steps_per_round": 2},
    evaluation={"num_images": 4, "every": 1},
)


def finish(folder: Path) -> None:
    run_in_process(CONFIG, folder / "out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "going-on", finish) / "out"


def resumed(*words: Any) -> tuple[Any, ...]:
    return ("run", "--resume", "--engine", "inprocess", *words)


def test_a_finished_run_goes_on_as_one_of_more_rounds(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a constant learning rate the schedule is the same, and so are the weights."""
    out = shutil.copytree(finished, tmp_path / "out")
    before = RunDirectory(out)
    first, labels = before.load_shared(), run_digest(before.config())
    heads = [ReleaseStore(before.client_path(k)).ledger().head for k in (0, 1)]
    done = called(capsys, *resumed("--out", out, "--set", "run.rounds=3"))
    assert done.code == 0, done.err
    assert "begun with 2 rounds, and goes on to 3" in done.out
    assert "fine learning rate: constant over all 3 rounds, " in done.out
    run = RunDirectory(out)
    config = run.config()
    assert (config.run.rounds, config.run.begun_with) == (3, 2)
    assert run_digest(config) == labels  # so that its files are still its own
    whole = small_config(**_sections(CONFIG, rounds=3))
    run_in_process(whole, tmp_path / "whole")
    expected = RunDirectory(tmp_path / "whole")
    for name, tensor in expected.load_shared().items():
        assert torch.equal(run.load_shared()[name], tensor), name
    for client in (0, 1):
        stores = [ClientStore(each.client_path(client)) for each in (run, expected)]
        a, b = (store.load_state(3, "fine") for store in stores)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    # Nothing is noised once more, and nothing is lost.
    assert [ReleaseStore(run.client_path(k)).ledger().head for k in (0, 1)] == heads
    history = run.read_json("metrics.json")
    assert [each["round"] for each in history["rounds"]] == [1, 2, 3]
    assert history["earlier"][0]["round"] == 2
    assert history["earlier"][0]["clients"] == before_final(finished)
    assert history["final"]["clients"] != before_final(finished)
    kept = RunDirectory(out).root / "earlier" / "000002"
    assert {p.name for p in kept.iterdir()} >= {"coarse.safetensors", "metrics.json", "privacy.txt"}
    assert all(torch.equal(first[n], t) for n, t in RunDirectory(finished).load_shared().items())
    # It can be shown, exported, and go on once more.
    assert called(capsys, "show", out).code == 0
    assert called(capsys, "export", out, "--out", tmp_path / "pipeline").code == 0
    again = called(capsys, *resumed("--out", out, "--set", "run.rounds=4", "--dry-run"))
    assert again.code == 0, again.err
    assert "begun with 2 rounds, and goes on to 4" in again.out


def _sections(config: RunConfig, *, rounds: int) -> dict[str, dict[str, Any]]:
    plain = dataclasses.asdict(config)
    plain.pop("name")
    plain["run"]["rounds"] = rounds
    return plain


def before_final(root: Path) -> Any:
    return RunDirectory(root).read_json("metrics.json")["final"]["clients"]


def test_what_was_interrupted_while_it_went_on_is_not_finished(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    run = RunDirectory(out)
    config = overridden(run.config(), ["run.rounds=3"])
    run.open(config, resume=True)  # and then the power was cut
    assert not (out / "coarse.safetensors").exists()
    done = called(capsys, "export", out, "--out", tmp_path / "pipeline")
    assert (done.code, "has not finished" in done.err) == (2, True)
    for words in (resumed("--out", out), resumed("--out", out, "--set", "run.rounds=3")):
        done = called(capsys, *words, "--dry-run")
        assert done.code == 0, done.err
    assert called(capsys, *resumed("--out", out)).code == 0
    assert RunDirectory(out).is_finished()
    done = called(capsys, *resumed("--out", out))
    assert "this run has finished; nothing to resume, but for more rounds" in done.err


def test_what_cannot_go_on_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    for setting, message in (
        (
            "privacy.epsilon=3",
            "--set privacy.epsilon: a resumed run keeps its config",
        ),
        ("run.rounds=1", "run.rounds: must be at least the 2 that the run has, got 1"),
        ("run.rounds=2", "this run has finished; nothing to resume"),
        ("run.rounds=many", "run.rounds: must be"),
    ):
        done = called(capsys, *resumed("--out", finished, "--set", setting))
        assert done.code == 2
        assert message in done.err
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    dp_sgd = config_from_mapping({"coarse": {"images": "dp_sgd", "class_balance": 0}})
    with pytest.raises(ConfigError, match="DP-SGD has noise for the 10 rounds"):
        overridden(dp_sgd, ["run.rounds=20"])
    deployed = config_from_mapping({"run": {"simulation": False}})
    with pytest.raises(ConfigError, match="a deployed run keeps it; its nodes accepted"):
        overridden(deployed, ["run.rounds=20"])
    for wrong in ({"begun_with": 10}, {"begun_with": 5, "simulation": False}):
        with pytest.raises(ConfigError, match=r"run\.begun_with: must be"):
            config_from_mapping({"run": wrong})


def test_the_experiment_file_with_more_rounds_is_the_same_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(config_to_yaml(CONFIG))
    words = resumed(tmp_path / "small.yaml", "--out", finished, "--dry-run")
    done = called(capsys, *words, "--set", "run.rounds=5")
    assert done.code == 0, done.err
    assert "begun with 2 rounds, and goes on to 5" in done.out
    done = called(capsys, *words, "--set", "run.rounds=5", "--set", "privacy.epsilon=3")
    assert done.code == 2
    assert "holds a run of another config (run.rounds, privacy.epsilon)" in done.err


def test_the_schedule_is_stated() -> None:
    known = config_from_mapping({"run": {"rounds": 10}, "fine": {"lr": 1e-3, "warmup_steps": 1}})
    config = overridden(known, ["run.rounds=20"])
    assert continued(known, known) == known
    assert schedule_lines(known) == []
    first, coarse, fine = schedule_lines(config)
    assert first == "the run was begun with 10 rounds, and goes on to 20"
    assert coarse.startswith("coarse learning rate: cosine over all 20 rounds")
    # Half of the way: half of the rate.
    assert fine == (
        "fine learning rate: cosine over all 20 rounds, 0.0005 in round 11, 0 at the end "
        "(at most 0.001)"
    )
    assert "in round 16" in schedule_lines(config, rounds_done=15)[2]


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = small_config(
        run={"rounds": 1}, data={"max_images": 120}, partition={"num_clients": 2},
        coarse={"steps_per_round": 1}, fine={"steps_per_round": 1}, sampling={"num_steps": 2},
        evaluation={"num_images": 4},
    )  # fmt: skip
    (tmp_path / "small.yaml").write_text(config_to_yaml(small))
    out = tmp_path / "sweep"
    words = ("run", tmp_path / "small.yaml", "--engine", "inprocess", "--out", out,
             "--sweep", "privacy.epsilon=3,10")  # fmt: skip
    done = called(capsys, *words)
    assert done.code == 0, done.err
    for value, t0 in (("3", 783), ("10", 642)):
        run = RunDirectory(out / f"privacy.epsilon={value}")
        assert run.is_finished()
        assert run.config().privacy.epsilon == float(value)
        assert run.statement()["t0"] == t0
    table = (out / "sweep.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:1] == "|"}
    cells = [float(cell) for cell in lines["epsilon"].split("|")[2:-1]]
    assert cells == pytest.approx([3.0, 10.0], rel=0.02)
    assert any(name.startswith("distance, ") for name in lines)
    assert "privacy.epsilon = 3" in done.out
    with Image.open(out / "sweep.png") as picture:
        assert min(picture.size) > 300
    # Once more: nothing is trained again.
    stamp = (out / "privacy.epsilon=3" / "log.txt").read_bytes()
    assert called(capsys, *words).code == 2
    done = called(capsys, *words, "--resume", "--json")
    assert done.code == 0, done.err
    assert (out / "privacy.epsilon=3" / "log.txt").read_bytes() == stamp
    facts = json.loads(done.out)
    assert [run["value"] for run in facts["results"]] == ["3", "10"]
    assert facts["results"][0]["distances"].keys() == facts["results"][1]["distances"].keys()
    for each in facts["results"]:  # not the loss that hardly moves
        assert each["losses"].keys() == {"fine models, training"}
        assert each["knows"].keys() <= {"held-out images", "training images"}
        assert all(abs(value) <= 100.0 for value in each["knows"].values())
    # A further value joins those that are there.
    more = [*words[:-1], "privacy.epsilon=3,30", "--resume", "--dry-run"]
    done = called(capsys, *more)
    assert done.code == 0, done.err
    assert "privacy.epsilon=3  finished before" in done.out
    assert "privacy.epsilon=30  release: " in done.out
    assert not (out / "privacy.epsilon=30").exists()


def test_bad_sweeps_train_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(config_to_yaml(CONFIG))
    words = ("run", tmp_path / "small.yaml", "--engine", "inprocess", "--out", tmp_path / "out")
    for sweep, message in (
        ("privacy.epsilon", "--sweep: must have the form KEY=VALUE,VALUE,..., got"),
        ("privacy.epsilon=3", "--sweep: must have 2 to 64 values, each once, got"),
        ("privacy.epsilon=3,3", "--sweep: must have 2 to 64 values, each once, got"),
        ("privacy.epsilon=3,3.0", "--sweep: privacy.epsilon=3.0 is a value that is there already"),
        ("privacy.epsilon=3,0", "privacy.epsilon: must be greater than 0"),
        ("privacy.epsilom=3,10", "privacy.epsilom: unknown key; did you mean epsilon?"),
    ):
        done = called(capsys, *words, "--sweep", sweep)
        assert done.code == 2
        assert message in done.err, done.err
    done = called(capsys, *words, "--sweep", "run.seed=1,2", "--set", "run.seed=3")
    assert "--sweep: run.seed is given by --set too" in done.err
    done = called(capsys, "run", "--resume", "--out", tmp_path / "out", "--sweep", "run.seed=1,2")
    assert "--sweep: give the experiment file, with --resume too" in done.err
    assert not (tmp_path / "out").exists()


def test_the_library_goes_on_too(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    more = small_config(**_sections(CONFIG, rounds=3))
    run = fedpdm.run(more, out, resume=True)
    assert run.config().run.begun_with == 2
    assert len(run.read_json("metrics.json")["rounds"]) == 3
