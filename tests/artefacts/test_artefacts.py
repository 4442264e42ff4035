"""Files that earlier code wrote still open, and give what they gave.

`artefacts.tar.xz` and `expected.json` were written by `make_artefacts.py` with the code of
2026-11-30, before modules moved between packages. Numbers that depend on the order of float32 sums
are held to the last bit on a machine like the one that made them, and closely elsewhere.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file

import fedpdm
from fedpdm.cli import main
from tests.artefacts.make_artefacts import (
    ARCHIVE,
    EXPECTED,
    EXPERIMENTS,
    RUNS,
    TOY_SETTINGS,
    array_digest,
    draw,
    machine,
    make_certificates,
    release_again,
    resolved,
    weights_digest,
)

HERE = Path(__file__).parent
WANTED: dict[str, Any] = json.loads((HERE / EXPECTED).read_text())
SURROUNDINGS = {"clock", "coordinator", "versions"}
"""Checks of a node that say nothing about its files: here no coordinator answers."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What earlier code wrote; tests change copies."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(HERE / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of whoever runs the tests; copies of runs, which are large, are not kept."""
    for name in ("FEDPDM_DATA", "FEDPDM_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def called(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """Standard output of `fedpdm ARGUMENTS`, which ends with this exit code."""
    capsys.readouterr()
    ended = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert ended == code, printed.err
    return printed.out


def told(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> Any:
    """The JSON that `fedpdm ARGUMENTS --json` prints."""
    return json.loads(called(capsys, *arguments, "--json", code=code))


def assert_has(found: Any, wanted: Any, where: str = "") -> None:
    """All that is wanted is there and equal; there may be more keys."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict), where
        assert wanted.keys() <= found.keys(), f"{where}: lacks {wanted.keys() - found.keys()}"
        for name, value in wanted.items():
            assert_has(found[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(found, list), where
        assert len(found) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_has(found[index], value, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12), where
    else:
        assert found == wanted, where


def new_defaults(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Keys of a run's config that there were not, with their defaults, by section."""
    known = {entry["key"] for entry in WANTED["keys"]}
    found: dict[str, dict[str, Any]] = {}
    for entry in told(capsys, "config"):
        section, _, name = entry["key"].partition(".")
        if entry["key"] not in known:
            found.setdefault(section, {})[name] = entry["default"]
    return found


def like_then() -> bool:
    """Whether float32 sums come out as where the artefacts were made."""
    return machine() == WANTED["machine"]


def assert_samples(pipeline: Any, old: Path) -> None:
    """Images with a fixed seed are those that the old pipeline drew with the old code."""
    images = draw(pipeline)
    if like_then():
        assert array_digest(images) == WANTED["samples"]
    recorded = np.load(old / "samples.npy").astype(float)
    assert recorded.std() > 10
    assert np.abs(images - recorded).max() <= 2


# Runs.


@pytest.mark.slow
def test_a_finished_run_is_shown_with_its_numbers(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_has(told(capsys, "show", old / "finished"), WANTED["show"])
    words = called(capsys, "show", old / "finished")
    assert f"{WANTED['show']['privacy']['epsilon']:.4g}" in words


def test_a_finished_run_is_not_resumed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = old / "finished"
    assert main(["run", "--resume", "--engine", "inprocess", "--out", str(run)]) == 2
    assert "this run has finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interrupted", "interrupted-server"])
def test_an_interrupted_run_ends_with_the_same_weights(
    name: str, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(old / name, run)
    assert not (run / "coarse.safetensors").exists()
    before = told(capsys, "ledger", run)
    said = called(capsys, "run", "--resume", "--engine", "inprocess", "--out", run)
    assert "round 2/2" in said
    assert "resumed after round 1 of 2" in said
    if like_then():
        assert weights_digest(run / "coarse.safetensors") == WANTED["weights"][name]
    other = old / {"interrupted": "finished", "interrupted-server": "server-result"}[name]
    wanted = load_file(other / "coarse.safetensors")
    found = load_file(run / "coarse.safetensors")
    assert wanted.keys() == found.keys()
    differs = np.concatenate([(wanted[key] != found[key]).ravel() for key in wanted])
    assert differs.mean() < 0.01  # weights are a few steps from 0; all differ after another start
    assert told(capsys, "ledger", run) == before, "something was released once more"


@pytest.mark.slow
def test_one_page_about_a_finished_run(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    called(capsys, "report", old / "finished", "--out", page)
    text = page.read_text()
    assert "tiny" in text
    assert f"{WANTED['show']['privacy']['epsilon']:.4g}" in text
    assert "data:image/" in text


# Ledgers and releases.


def test_ledgers_of_a_run_check_out(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "ledger", old / "finished")
    assert_has(found, WANTED["ledgers"])
    for client, ledger in enumerate(WANTED["ledgers"]):
        store = old / "finished" / "clients" / str(client)
        words = called(capsys, "ledger", store, "--head", ledger["head"])
        assert ledger["head"] in words
        spent = fedpdm.account(store, delta=ledger["delta"])
        assert spent.largest == pytest.approx(ledger["epsilon_max"], rel=1e-9)
        assert spent.images == ledger["images"]


def test_a_node_hands_out_its_old_release(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node, wanted = tmp_path / "node", WANTED["node"]
    shutil.copytree(old / "node", node)
    assert_has(told(capsys, "ledger", node / "vault"), [wanted["ledger"]])
    assert [r["kind"] for r in wanted["ledger"]["records"]] == ["opened", "accepted", "release"]
    released = release_again(node)
    assert array_digest(released.x_tilde.numpy()) == wanted["release"]
    assert not released.seeded
    (after,) = told(capsys, "ledger", node / "vault")
    assert after["head"] == wanted["ledger"]["head"], "the images were noised once more"


def test_a_node_reads_its_invitation_policy_and_acceptance(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = tmp_path / "node"
    shutil.copytree(old / "node", node)
    (node / "vault").chmod(0o700)  # as a node keeps it
    made = make_certificates(tmp_path / "certificates")
    report = told(
        capsys, "node", "check", "--coordinator", "127.0.0.1:1", "--timeout", "1",
        "--certificate", made / "node" / "node-0.crt", "--data", node / "hospital.npz",
        "--invitation", node / "invitation.json", "--store", node / "vault",
        code=2,
    )  # fmt: skip
    checks = {check["name"]: check for check in report["checks"]}
    failed = {name: check["detail"] for name, check in checks.items() if not check["ok"]}
    assert "coordinator" in failed
    assert failed.keys() <= SURROUNDINGS, failed
    assert checks["invitation"]["detail"].startswith("clinic: npz, 2 clients, 2 rounds")
    assert "max_epsilon 12" in checks["policy"]["detail"]
    assert "1 releases" in checks["store"]["detail"]
    epsilon = WANTED["node"]["ledger"]["epsilon_max"]
    assert f"epsilon {epsilon:.4g} in all" in checks["bounds"]["detail"]  # nothing is added to it
    assert report["statement"]["epsilon"] == pytest.approx(epsilon, rel=1e-9)
    # What was accepted is one config with all its keys: with a new key it has to be accepted anew.
    assert report["accepted"] or new_defaults(capsys)


# Pipelines.


def test_an_old_pipeline_loads_and_draws_the_same(old: Path) -> None:
    assert_samples(fedpdm.load_pipeline(old / "pipeline"), old)


def with_its_code(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True
    )


@pytest.mark.slow
def test_an_old_pipeline_loads_with_the_code_in_it(old: Path) -> None:
    assert_samples(with_its_code(old / "pipeline"), old)


@pytest.mark.slow
def test_a_fresh_export_of_an_old_run_draws_the_same(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fresh"
    called(capsys, "export", old / "finished", "--client", 0, "--out", out)
    assert_samples(fedpdm.load_pipeline(out), old)
    assert (out / "pfdm_sampling.py").exists()
    assert not (old / "pipeline" / "pfdm_sampling.py").exists()
    for folder in (out, old / "pipeline", out):  # in one process, each with its own code
        assert_samples(with_its_code(folder), old)
    for role in ("coarse_unet", "fine_unet"):
        name = f"{role}/diffusion_pytorch_model.safetensors"
        assert weights_digest(out / name) == weights_digest(old / "pipeline" / name)
    called(capsys, "sample", old / "pipeline", "--num", 10, "--steps", 2, "--out", "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0


# Configs and results.


@pytest.mark.parametrize("name", RUNS)
def test_an_experiment_resolves_to_the_same_keys(name: str) -> None:
    assert_has(resolved(name), WANTED["experiments"][name], name)


def test_keys_keep_their_names_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted, arguments in (
        (WANTED["keys"], ["config"]),
        (WANTED["toy"]["keys"], ["toy", "--keys"]),
    ):
        found = {entry["key"]: entry["default"] for entry in told(capsys, *arguments)}
        assert_has(found, {entry["key"]: entry["default"] for entry in wanted})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colored-mnist", "cifar10", "celeba"])
def test_results_of_an_experiment_count_as_done(
    name: str, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each cell of each profile is known again by its config, which the result holds."""
    cells = json.loads((old / "cells.json").read_text())[name]
    result = json.loads((old / "result.json").read_text())
    for profile, methods in cells.items():
        folder = tmp_path / "results" / f"{name}-{profile}"
        folder.mkdir(parents=True)
        for method, config in methods.items():
            own = {"suite": name, "profile": profile, "method": method, "config": config}
            (folder / f"{method}-seed0.json").write_text(json.dumps(result | own))
        capsys.readouterr()
        arguments = ["experiment", str(EXPERIMENTS / f"{name}.yaml"), "--profile", profile]
        code = main([*arguments, "--seeds", "0", "--results", "results", "--runs", "runs"])
        printed = capsys.readouterr()
        assert f"{len(methods)} cells, {len(methods)} done before" in printed.out, printed.out
        assert code == 0, printed.err


def test_an_old_result_is_read_into_the_table(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "colored-mnist-cpu"
    folder.mkdir(parents=True)
    shutil.copy(old / "result.json", folder / "ours-seed0.json")
    arguments = ["experiment", EXPERIMENTS / "colored-mnist.yaml", "--profile", "cpu", "--table"]
    facts = told(capsys, *arguments, "--results", "results")
    assert facts["results"] == [json.loads((old / "result.json").read_text())]
    table = called(capsys, *arguments, "--results", "results")
    (row,) = [line for line in table.splitlines() if line.startswith("ours (server-trained)")]
    distances = ("8.63", "22.82")  # client 0's; all clients have the same columns
    assert len(facts["results"][0]["clients"]) == 1
    assert all(number in row for number in distances), row


@pytest.mark.slow
def test_an_old_toy_run_goes_on(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(old / "toy", tmp_path / "toy")
    settings = [part for setting in TOY_SETTINGS for part in ("--set", setting)]
    arguments = ["toy", EXPERIMENTS / "gmm.yaml", "--resume", "--jobs", 1, "--out", "toy"]
    report = told(capsys, *arguments, *settings)
    assert report["contradictions"] == []
    before = json.loads((old / "toy" / "results.json").read_text())
    after = json.loads((tmp_path / "toy" / "results.json").read_text())
    assert len(before["rows"]) == WANTED["toy"]["rows"] > 0
    assert_has(after, before)
    cells = [(folder / "toy" / "cells.jsonl").read_text() for folder in (old, tmp_path)]
    assert cells[0] == cells[1], "cells were computed once more"


def test_arithmetic_is_that_of_one_thread() -> None:
    assert torch.get_num_threads() == 1
