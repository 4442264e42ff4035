"""`fedpdm export --push-to-hub`: what the Hub's own library is handed, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import get_token

import fedpdm.publishing.hub as hub
from tests.support.command_line import called
from tests.support.fake_runs import FakeRun

NAME = "clinic/digits"


class Hub:
    """Takes the place of the three calls of `HfApi`, with their own signatures."""

    def __init__(self, *, private: bool = True, fails: str = "") -> None:
        self.asked: list[str] = []
        self.private, self.fails = private, fails
        self.folder: dict[str, bytes] = {}
        self.card = ""
        self.made: dict[str, Any] = {}

    def _call(self, name: str) -> None:
        self.asked.append(name)
        if name == self.fails:
            raise ConnectionError("the network\nis down")

    def create_repo(self, _: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        self._call("create_repo")
        self.made = {"repo_id": repo_id, **options}
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def repo_info(self, _: HfApi, repo_id: str, **options: Any) -> Any:
        self._call("repo_info")
        assert (repo_id, options) == (NAME, {"repo_type": "model"})
        return type("Info", (), {"private": self.private})

    def upload_folder(self, _: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        self._call("upload_folder")
        assert (repo_id, options["repo_type"]) == (NAME, "model")
        assert options["commit_message"]
        files = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.folder = {str(p.relative_to(folder_path)): p.read_bytes() for p in files}
        self.card = ModelCard.load(Path(folder_path) / "README.md").text


def stand_in(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Hub:
    """A `Hub` in the place of the real one, and a token."""
    made = Hub(**options)
    for name in ("create_repo", "repo_info", "upload_folder"):
        call = getattr(made, name)
        monkeypatch.setattr(HfApi, name, lambda self, *a, _call=call, **k: _call(self, *a, **k))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_not_a_token")
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub") / "run"
    return FakeRun(root, coarse={"preset": "nano"}, fine={"preset": "nano"}).run.root


def test_the_folder_and_its_card_are_handed_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = stand_in(monkeypatch)
    out = tmp_path / "pipeline"
    done = called(capsys, "export", run, "--client", 2, "--out", out, "--push-to-hub", NAME)
    assert done.code == 0, done.err
    assert there.asked == ["create_repo", "repo_info", "upload_folder"]
    assert there.made == {
        "repo_id": NAME, "private": True, "repo_type": "model", "exist_ok": True,
    }  # fmt: skip
    here = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert there.folder == here
    assert {"README.md", "privacy.json", "model_index.json", "pipeline.py",
            "fine_unet/diffusion_pytorch_model.safetensors"} <= here.keys()  # fmt: skip
    assert "# fake: personalised diffusion model of client 2" in there.card
    assert "locally differentially private" in there.card
    assert f"pushed to https://huggingface.co/{NAME} (private)" in done.out
    # What was exported before is pushed as it is, with what its owner has added.
    card = (out / "README.md").read_text().replace("---\n", "---\nlicense: mit\n", 1)
    (out / "README.md").write_text(card)
    there = stand_in(monkeypatch, private=False)
    done = called(capsys, "export", out, "--push-to-hub", NAME, "--public", "--json")
    assert done.code == 0, done.err
    assert there.made["private"] is False
    assert b"license: mit" in there.folder["README.md"]
    facts = {"out": str(out), "hub": f"https://huggingface.co/{NAME}", "public": True}
    assert json.loads(done.out) == facts


def test_no_folder_is_needed_and_none_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = stand_in(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = called(capsys, "export", run, "--push-to-hub", NAME)
    assert done.code == 0, done.err
    assert "README.md" in there.folder
    assert [*tmp_path.iterdir()] == []
    assert done.out.startswith("pipeline of client 0\npushed to ")


def test_what_goes_wrong_is_one_line_and_loses_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, call in enumerate(("create_repo", "repo_info", "upload_folder")):
        there = stand_in(monkeypatch, fails=call)
        out = tmp_path / f"pipeline{number}"
        done = called(capsys, "export", run, "--out", out, "--push-to-hub", NAME)
        assert done.code == 1
        first = done.err.splitlines()[0]
        assert first == (
            f"fedpdm: --push-to-hub: {NAME}: the network is down; it is in {out}, and can be "
            "pushed again from there"
        )
        assert there.asked[-1] == call
        assert (out / "README.md").exists()


def test_a_public_repository_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is there may be public, whatever is asked for."""
    there = stand_in(monkeypatch, private=False)
    done = called(capsys, "export", run, "--out", tmp_path / "p", "--push-to-hub", NAME)
    assert done.code == 2
    assert f"{NAME} is public, and the fine model was trained on raw images" in done.err
    assert there.asked == ["create_repo", "repo_info"]


def test_bad_input_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = stand_in(monkeypatch)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model_index.json").write_text("{}")
    out = tmp_path / "out"
    for words, message in (
        ((run, "--out", out, "--push-to-hub", "a/b/c"), "--push-to-hub: Repo id must be in"),
        ((run, "--out", out, "--push-to-hub", "two words"), "--push-to-hub: Repo id must"),
        ((run, "--out", out, "--public"), "--public: is of --push-to-hub, which is not given"),
        ((run,), "--out: give a directory to make, or --push-to-hub NAME"),
        ((tmp_path / "exported", "--out", out, "--push-to-hub", NAME),
         "exported is exported already, and only pushed"),
        ((tmp_path / "exported", "--push-to-hub", NAME),
         "is not an exported pipeline (README.md is missing)"),
    ):  # fmt: skip
        done = called(capsys, "export", *words)
        assert done.code == 2
        assert message in done.err, done.err
    monkeypatch.setattr(hub, "get_token", lambda: None)
    done = called(capsys, "export", run, "--out", out, "--push-to-hub", NAME)
    assert done.code == 2
    assert f"{NAME}: nobody has logged in; hf auth login, or set HF_TOKEN" in done.err
    assert there.asked == []
    assert not out.exists()
    assert hub.HfApi is HfApi  # the calls are the library's own
    assert callable(get_token)
