"""What a node's owner has after a run: show, sample, export and report on the node's own store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedpdm.config import config_digest
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.publishing.export import load_pipeline
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.files import read_tensors
from fedpdm.storage.node_run import NodeRun, open_run
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import called
from tests.support.deployments import CLASSES, Federation, deployment
from tests.support.made_once import made_once

EPSILON_LINE = "1 release of 40 images, all runs of this node together: epsilon 9.9"


def finish(root: Path) -> None:
    deployment(root).run()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed federation of two clients after its run; `vault-0` and `vault-1` are the stores.

    Nobody writes here but beside them.
    """
    return made_once(tmp_path_factory, "own-store", finish)


def run_folder(root: Path, client: int) -> Path:
    (folder,) = (root / f"vault-{client}" / "runs").iterdir()
    return folder


def test_the_store_keeps_what_its_owner_goes_on_from(root: Path) -> None:
    server = RunDirectory(root / "server")
    shared = server.load_shared()
    for client in (0, 1):
        run = open_run(root / f"vault-{client}")
        assert isinstance(run, NodeRun)
        assert (run.root, run.client_id) == (run_folder(root, client), client)
        assert config_digest(run.config()) == config_digest(server.config())
        kept = run.load_shared()
        assert kept.keys() == shared.keys()
        assert all(torch.equal(kept[name], value) for name, value in shared.items())
        _, metadata = read_tensors(run.root / "coarse.safetensors")
        assert "operating-system entropy" in metadata["noise_source"]
        statement = run.statement()
        ledger = ReleaseStore(root / f"vault-{client}").ledger()
        assert statement["ledger_heads"] == {str(client): ledger.head}
        assert statement["epsilon_distribution"] == [[statement["epsilon"], 40]]
        assert not statement["simulation"]
        assert run.facts()["class_names"] == [*sorted(CLASSES)]
        assert run.facts()["clients"] == [
            {"client_id": client, "num_images": 40, "per_class": [20, 20]}
        ]
        history = run.read_json("metrics.json")
        assert [each["round"] for each in history["rounds"]] == [1, 2]
        for each in history["rounds"]:  # its own loss on raw images, which the server does not get
            assert each["fine_loss"] > 0 < each["coarse_loss"]
        own = server.read_json("metrics.json")["rounds"][-1]["clients"][client]
        assert "fine_loss" not in own
        for name in ("coarse_loss", "coarse_known"):
            assert own[name] == history["rounds"][-1][name]
        for name in ("heldout_coarse_loss", "heldout_coarse_known"):
            assert history["final"][name] == history["final"]["clients"][0][name]
        with Image.open(run.root / "samples.png") as picture:
            assert min(picture.size) > 50


def test_show(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = called(capsys, "show", root / "vault-1")
    assert done.code == 0, done.err
    for words in (
        "Node of client 1", "2 of 2 rounds", "Own images: 40; benign 20, malignant 20",
        "locally differentially private", EPSILON_LINE, "as private as the images",
    ):  # fmt: skip
        assert words in " ".join(done.out.split()), words
    facts = json.loads(called(capsys, "show", root / "vault-1", "--json").out)
    assert facts["privacy"]["epsilon"] == pytest.approx(9.956, abs=1e-3)
    assert "final" in facts["metrics"]
    assert called(capsys, "show", run_folder(root, 1)).out == done.out


def test_sample_and_export(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--num", 4, "--steps", 2, "--label", "malignant", "--label", "benign")
    grids = []
    for name, source in (("store", root / "vault-1"), ("export", tmp_path / "pipeline")):
        if name == "export":
            done = called(capsys, "export", root / "vault-1", "--out", source)
            assert done.code == 0, done.err
            assert f"pipeline of client 1 written to {source}" in done.out
        done = called(capsys, "sample", source, *few, "--out", tmp_path / f"{name}.png")
        assert done.code == 0, done.err
        grids.append((tmp_path / f"{name}.png").read_bytes())
    assert grids[0] == grids[1]  # the same models, with or without an export between
    pipeline = load_pipeline(tmp_path / "pipeline")
    assert pipeline.config["id2label"] == {"0": "benign", "1": "malignant"}
    fine = NodeRun(run_folder(root, 1)).store.load_state(2, "fine")
    saved = dict(pipeline.fine_unet.named_parameters())
    assert all(
        torch.equal(saved[n.removeprefix("ema.")], t) for n, t in fine.items() if "ema." in n
    )
    card = (tmp_path / "pipeline" / "README.md").read_text()
    head = ReleaseStore(root / "vault-1").ledger().head
    assert f"head `{head}`" in card
    assert "This is a **simulation**" not in card


def test_report(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    done = called(capsys, "report", root / "vault-0", "--out", page)
    assert done.code == 0, done.err
    html = page.read_text()
    for words in (
        "deployment, at the node of client 0", "What images have spent, by the ledger", "benign",
        "the coarse model works", "the fine model works", "is as private as",
        "<td>1</td><td>40</td><td>9.956</td>",
    ):  # fmt: skip
        assert words in html, words
    assert str(root) not in html


def test_others_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("export", root / "vault-0", "--client", 1, "--out", tmp_path / "out"),
         "clients/1: client 1 has no fine model there; clients that have one: 0"),
        (("sample", root / "vault-0", "--label", "kitten", "--out", tmp_path / "a.png"),
         "label must be in [-1, 1] or the name of a class of client 0 of small (0 benign, 1 "
         "malignant), got kitten"),
        (("show", root / "hospital-0"), "is not a run directory (config.yaml is missing)"),
    ):  # fmt: skip
        done = called(capsys, *words)
        assert done.code == 2
        assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_store_of_an_earlier_version_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has models and no config: nothing is guessed."""
    store = shutil.copytree(root / "vault-0", tmp_path / "vault")
    folder = store / "runs" / run_folder(root, 0).name
    for name in ("config.yaml", "node.json", "coarse.safetensors", "statement.json"):
        (folder / name).unlink()
    done = called(capsys, "show", store)
    assert done.code == 2
    assert "its 1 runs are of an earlier version, which kept neither config nor" in done.err


def test_one_of_several_runs_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(root / "vault-0", tmp_path / "vault")
    folder = store / "runs" / run_folder(root, 0).name
    other = shutil.copytree(folder, store / "runs" / "0123456789abcdef")
    done = called(capsys, "show", store)
    assert done.code == 2
    assert "holds 2 runs, name one of them: runs/0123456789abcdef (small), runs/" in done.err
    history = json.loads((other / "metrics.json").read_text())
    for name in ("final", "file_sha256", "file_label"):
        history.pop(name, None)
    (other / "metrics.json").write_text(json.dumps(history))
    assert open_run(store).root == folder  # of the two, the one that has finished
    assert called(capsys, "show", other).code == 0
    assert "it has not finished" in called(capsys, "show", other).out
    done = called(capsys, "export", other, "--out", tmp_path / "out")
    assert done.code == 0, done.err  # what was sent last is there


def test_a_run_that_goes_on_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation: Federation = deployment(tmp_path)
    federation.run(rounds=1)
    run = NodeRun(run_folder(tmp_path, 0))
    assert not run.is_finished()
    assert run.config() == run_config_of(federation.run_config)
    done = called(capsys, "export", tmp_path / "vault-0", "--out", tmp_path / "out")
    assert done.code == 2
    assert "this run has not finished (coarse.safetensors is missing)" in done.err
    shown = called(capsys, "show", tmp_path / "vault-0").out
    assert "1 of 2 rounds; it has not finished" in shown


def test_what_cannot_be_kept_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server gets the same answer; the owner is told."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(NodeRun, "begin", fail)
    federation = deployment(tmp_path)
    sent = federation.ask(0, "train", {"round": 1, "phase": "coarse"})
    assert "error" not in sent.metrics
    assert sent.payload
    assert b"no space" not in sent.data
    assert "client 0 notes for its owner: OSError: no space left" in capsys.readouterr().err
    assert np.isfinite(sent.metrics["coarse_loss"])
