"""Samples as data: what is written, that it goes on where it was, and what is said of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedpdm.publishing.sample_data as data
from fedpdm.data import load_image_set
from fedpdm.publishing.export import export_pipeline, open_source
from fedpdm.publishing.sample_data import SampleSettings, folder_names, sample_files, sample_npz
from fedpdm.publishing.source import Source
from fedpdm.storage.files import StoreError
from tests.support.command_line import called
from tests.support.fake_runs import FakeRun

SMALL = {"coarse": {"preset": "nano"}, "fine": {"preset": "nano"}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    fake = FakeRun(folder / "run", **SMALL)
    return export_pipeline(fake.run, client_id=2, out=folder / "pipeline")


@pytest.fixture
def source(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Drawn four at a time, without progress bars."""
    monkeypatch.setattr(data, "PART", 4)
    opened = open_source(exported)
    monkeypatch.setattr(opened.pipeline, "set_progress_bar_config", lambda **_: None)
    opened.pipeline._progress_bar_config = {"disable": True}
    names = {str(k): f"class {k}" for k in range(10)} | {"3": "benign", "7": "../etc"}
    opened.pipeline.register_to_config(id2label=names)
    return opened


def settings(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"labels": [7, 3], "num_steps": 1, **changes})


def images_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_files_by_class_with_a_table(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert sample_files(source, out, settings=settings(), num=7) == 7
    first = [f"benign/{i:06d}.png" for i in range(3)]
    assert sorted(images_of(out)) == [*first, *(f"class-7/{i:06d}.png" for i in range(4))]
    with open(out / "samples.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[:3] == [
        ["file", "label", "class"],
        ["class-7/000000.png", "7", "../etc"],
        ["benign/000000.png", "3", "benign"],
    ]
    assert len(rows) == 8
    for name in images_of(out):
        with Image.open(out / name) as image:
            assert (image.mode, image.size) == ("RGB", (8, 8))
    read = load_image_set("image_folder", split="train", root=out)  # another program reads it
    assert read.class_names == ("benign", "class-7")
    assert read.images.shape[1:] == (3, 8, 8)


def test_an_interrupted_call_goes_on_to_the_same_images(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_files(source, tmp_path / "whole", settings=settings(), num=10)
    draw, calls = Source.draw, []

    def interrupted(self: Source, labels: Any, **options: Any) -> np.ndarray:
        calls.append(len(labels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, labels, **options)

    monkeypatch.setattr(Source, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_files(source, tmp_path / "cut", settings=settings(), num=10)
    assert len(images_of(tmp_path / "cut")) == 4
    assert (tmp_path / "cut" / "privacy.txt").exists()  # beside whatever is there
    assert sample_files(source, tmp_path / "cut", settings=settings(), num=10) == 6
    assert calls == [4, 4, 4, 2]
    assert images_of(tmp_path / "cut") == images_of(tmp_path / "whole")
    assert sample_files(source, tmp_path / "cut", settings=settings(), num=10) == 0
    (tmp_path / "cut" / "benign" / "000001.png").unlink()
    assert sample_files(source, tmp_path / "cut", settings=settings(), num=10) == 4
    assert images_of(tmp_path / "cut") == images_of(tmp_path / "whole")


def test_more_are_added_to_those_that_are_there(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "data"
    sample_files(source, out, settings=settings(), num=6)
    before = images_of(out)
    assert sample_files(source, out, settings=settings(), num=9) == 3
    after = images_of(out)
    assert len(after) == 9
    assert before.items() <= after.items()
    assert len({*after.values()}) == 9
    with pytest.raises(StoreError, match="num must be at least the 9 of before, got 8"):
        sample_files(source, out, settings=settings(), num=8)


def test_one_file(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "samples.npz"
    assert sample_npz(source, out, settings=settings(), num=6) == 6
    with np.load(out) as file:
        first = dict(file)
    assert first["images"].shape == (6, 8, 8, 3)
    assert first["images"].dtype == np.uint8
    assert first["labels"].tolist() == [7, 3, 7, 3, 7, 3]
    assert first["class_names"][3] == "benign"
    assert json.loads(str(first["sampling"]))["seed"] == 0
    draw = Source.draw

    def interrupted(self: Source, labels: Any, **options: Any) -> np.ndarray:
        if "7 to" not in options["title"]:
            raise KeyboardInterrupt
        return draw(self, labels, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample_npz(source, out, settings=settings(), num=12)
    with np.load(out) as file:  # what was there is whole
        assert len(file["images"]) == 6
    assert sample_npz(source, out, settings=settings(), num=12) == 4  # 6 to 8 were drawn
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "samples.npz", "samples.privacy.json", "samples.privacy.txt",
    ]  # fmt: skip
    with np.load(out) as file:
        assert (file["images"][:6] == first["images"]).all()
    sample_files(source, tmp_path / "files", settings=settings(), num=12 - 6)
    with Image.open(tmp_path / "files" / "benign" / "000002.png") as image:
        assert (np.asarray(image) == first["images"][5]).all()  # the same images in both forms
    assert load_image_set("npz", split="train", root=out).num_classes == 10


def test_what_is_promised_lies_beside(source: Source, tmp_path: Path) -> None:
    for method, covered in (("pfdm", False), ("alone", False), ("coarse", True)):
        out = tmp_path / method
        sample_files(source, out, settings=settings(method=method), num=2)
        record = json.loads((out / "privacy.json").read_text())
        words = (out / "privacy.txt").read_text()
        assert record["covered"] is covered
        assert ("NO GUARANTEE COVERS THESE IMAGES" in words) is not covered
        assert "THIS IS A SIMULATION" in words
        assert f"epsilon = {record['statement']['epsilon']:.4g}" in words


def test_other_settings_are_refused(source: Source, tmp_path: Path) -> None:
    for write, out in ((sample_files, tmp_path / "data"), (sample_npz, tmp_path / "data.npz")):
        write(source, out, settings=settings(), num=2)
        for changes, message in (
            ({"seed": 1}, "holds samples of seed 0, not 1; choose another"),
            ({"labels": [3, 7]}, r"holds samples of labels \[7, 3\], not \[3, 7\]"),
            ({"num_steps": 2}, "holds samples of num_steps 1, not 2"),
        ):
            with pytest.raises(StoreError, match=message):
                write(source, out, settings=settings(**changes), num=2)
        source.pipeline.register_to_config(guidance_scale=3.0)
        with pytest.raises(StoreError, match="holds samples of models others"):
            write(source, out, settings=settings(), num=2)
        source.pipeline.register_to_config(guidance_scale=1.5)


def test_bad_input_leaves_nothing(source: Source, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for out, changes, num, message in (
        ("new", {"labels": [-1]}, 2, "label: -1 is no class"),
        ("new", {"labels": [3, 3]}, 2, "label: each class once, got 3, 3"),
        ("new", {}, 1, r"num must be in \[2, 10000000\], at least one for each of 2 .*, got 1"),
        ("new", {"num_steps": 0}, 2, "num_inference_steps must be at least 1, got 0"),
        ("taken", {}, 2, "is not empty and holds no samples"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_files(source, tmp_path / out, settings=settings(**changes), num=num)
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "thesis.txt"]
    with pytest.raises(ValueError, match=r"npz: must end in \.npz"):
        sample_npz(source, tmp_path / "a.zip", settings=settings(), num=2)
    np.savez(tmp_path / "own.npz", images=np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(StoreError, match="holds no samples of this command"):
        sample_npz(source, tmp_path / "own.npz", settings=settings(), num=2)


def test_a_class_may_be_named(source: Source) -> None:
    """By number or by name, whatever its case; what is near is offered."""
    assert source.labels([1, "2", "-1", "Benign ", "CLASS 5"]) == [1, 2, -1, 3, 5]
    with pytest.raises(ValueError, match=r"got bening; did you mean benign\?"):
        source.labels(["bening"])
    with pytest.raises(ValueError, match=r"label must be in \[-1, 9\] or the name .* got 10$"):
        source.labels(["10"])


def test_names_of_folders() -> None:
    names = ["cat", "Cat", "a/b", "..", "", "two words", "train", "größe", "x\n", "1.5 (b)", ".h"]
    assert folder_names(names) == [
        "class-0", "class-1", "class-2", "class-3", "class-4", "two words", "class-6", "größe",
        "class-8", "1.5 (b)", "class-10",
    ]  # fmt: skip


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    few = ("sample", exported, "--label", 3, "--num", 2, "--steps", 1)
    done = called(capsys, *few, "--files", out)
    assert done.code == 0, done.err
    assert f"2 samples in {out}, 2 of them drawn now; no guarantee covers them: {out}" in done.out
    facts = json.loads(called(capsys, *few, "--files", out, "--json").out)
    assert facts == {
        "files": str(out), "num": 2, "drawn": 0, "method": "pfdm", "covered": False,
        "statement": str(out / "privacy.txt"),
    }  # fmt: skip
    for more, message in (
        ((), "--out, --files, --npz: give one of them, got none"),
        (("--out", "a.png", "--npz", "a.npz"), "give one of them, got --out and --npz"),
        (("--files", out, "--seed", 4), f"{out}: holds samples of seed 0, not 4"),
        (
            ("--files", out, "--label", "three"),
            "or the name of a class of the export pipeline, got",
        ),
    ):
        done = called(capsys, *few, *more)
        assert done.code == 2
        assert message in done.err
