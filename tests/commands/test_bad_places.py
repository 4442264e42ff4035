"""Data and run directories that cannot be used, refused as `test_bad_input` says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpdm.storage.run_directory import RunDirectory
from tests.support.refusals import CONFIG, Refuser


@pytest.fixture
def refuser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuser:
    return Refuser(tmp_path, capsys, monkeypatch)


# Own images.


def image_folder(root: Path, *, size: int = 8) -> Path:
    """Two classes of 12 pictures, which the fixed split shares out."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for part, count in (("train", 12), ("test", 6)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return root


def spoil_picture(root: Path) -> None:
    (root / "train" / "cat" / "03.png").write_bytes(b"not a picture")


def cut_picture(root: Path) -> None:
    path = root / "train" / "cat" / "03.png"
    path.write_bytes(path.read_bytes()[:60])


def other_size(root: Path) -> None:
    Image.new("RGB", (9, 8)).save(root / "test" / "dog" / "99.png")


def no_test_part(root: Path) -> None:
    shutil.rmtree(root / "test")


def one_test_picture(root: Path) -> None:
    for path in [*(root / "test").rglob("*.png")][1:]:
        path.unlink()


def no_test_dogs(root: Path) -> None:
    shutil.rmtree(root / "test" / "dog")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "data.root: image_folder has no folder .*/pictures"),
    "unreadable": (spoil_picture, "data.root: .*train/cat/03.png is not a readable image"),
    "cut short": (cut_picture, "data.root: .*train/cat/03.png is not a readable image"),
    "sizes": (other_size, "data.root: images differ in size, .* is 8x8 and .*/99.png is 9x8"),
    "no test part": (no_test_part, "data.root: image_folder has no folder .*/pictures/test"),
    "one test picture": (one_test_picture, "image_metrics: need at least 5 test images, got 1"),
    "no test dogs": (
        no_test_dogs,
        r"at least 2 test images of classes \(1,\) \(client \d\), got 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_own_folder(refuser: Refuser, tmp_path: Path, kind: str) -> None:
    spoil, words = FOLDERS[kind]
    root = image_folder(tmp_path / "pictures")
    spoil(root)
    split = ("partition.majority_classes=1", "partition.num_clients=2")
    line = refuser.run_line("data.name=image_folder", f"data.root={root}", *split)
    assert re.search(words, line), line


IMAGES = np.zeros((20, 8, 8), dtype=np.uint8)
LABELS = np.arange(20) % 2
ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "label too high": (
        {"images": IMAGES, "labels": LABELS + 1, "class_names": np.array(["a", "b"])},
        r"labels\[1\] must be in \[0, 2\), got 2",
    ),
    "label negative": ({"images": IMAGES, "labels": LABELS - 1}, r"labels\[0\] must be .* got -1"),
    "floats": ({"images": IMAGES / 255.0, "labels": LABELS}, "images must be uint8, got float64"),
    "counts": (
        {"images": IMAGES, "labels": LABELS[:9]},
        r"labels must be .* \(20,\), got .*\(9,\)",
    ),
    "no labels": ({"images": IMAGES}, "must hold labels, holds images"),
    "not square": (
        {"images": np.zeros((20, 8, 6), np.uint8), "labels": LABELS}
        | {"images_test": np.zeros((20, 8, 6), np.uint8), "labels_test": LABELS},
        "data.resolution: images are 8x6, not square",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_own_arrays(refuser: Refuser, tmp_path: Path, kind: str) -> None:
    arrays, words = ARCHIVES[kind]
    np.savez(tmp_path / "own.npz", **arrays)
    split = ("partition.majority_classes=1", "partition.num_clients=2")
    line = refuser.run_line("data.name=npz", f"data.root={tmp_path / 'own.npz'}", *split)
    assert re.search(words, line), line


def test_public_data_that_is_not_there(tmp_path: Path, refuser: Refuser) -> None:
    nowhere = tmp_path / "nowhere"
    for name, file in (
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("colored_mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("celeba", "celeba/list_attr_celeba.txt"),
    ):
        line = refuser.run_line(f"data.name={name}", f"data.root={nowhere}")
        assert f"data.root: {name} misses {file}, " in line
        assert f" in {nowhere}; set data.root" in line
    assert "set data.root or the environment variable FEDPDM_DATA" in refuser.run_line(
        "data.name=cifar10"
    )
    assert "data.root: npz has no file" in refuser.run_line("data.name=npz", "data.root=own.npz")


# The run directory.


def claim(out: Path, *, finished: bool = False) -> None:
    """A run of `CONFIG`, as a run that was cut after a round leaves it, or one that was not."""
    run = RunDirectory(out)
    run.open(CONFIG, resume=False)
    history = {"rounds": [{"round": 1}]} | ({"final": {}} if finished else {})
    run.save_checkpoint(1, {}, history)


def test_directory_of_another_config(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out")
    line = refuser.run_line("fine.lr=0.5", "run.seed=9", flags=("--resume",))
    assert "out: holds a run of another config (run.seed, fine.lr); choose another --out" in line


def test_directory_in_use(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out")
    assert "out: holds this run already; --resume continues it" in refuser.run_line()


def test_finished_run(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out", finished=True)
    line = refuser.run_line(flags=("--resume",))
    assert "out: this run has finished; nothing to resume" in line
    assert "out: this run has finished; choose another --out" in refuser.run_line()


def test_foreign_directory(tmp_path: Path, refuser: Refuser) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    line = refuser.run_line()
    assert "out: is not empty and holds no run (thesis.tex, ...)" in line


def test_out_is_a_file(tmp_path: Path, refuser: Refuser) -> None:
    (tmp_path / "out").write_text("")
    assert "out: exists and is not a directory" in refuser.run_line()


def test_out_is_below_a_file(refuser: Refuser) -> None:
    line = refuser.line("run", "digits.yaml", "--out", "digits.yaml/out")
    assert re.search("digits.yaml/out: cannot be made, .*digits.yaml is not a directory", line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_is_read_only(tmp_path: Path, refuser: Refuser) -> None:
    tmp_path.chmod(0o555)
    try:
        line = refuser.run_line()
    finally:
        tmp_path.chmod(0o755)
    assert "out: cannot be written, no permission in" in line


def test_out_is_not_permitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refuser: Refuser
) -> None:
    """As the test above, for root too: the system is asked, and says no."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"out: cannot be written, no permission in {tmp_path}" in refuser.run_line()


def test_nothing_to_resume(refuser: Refuser) -> None:
    line = refuser.line("run", "digits.yaml", "--resume", "--out", "out")
    assert "out: no run to resume (config.yaml is missing)" in line
    line = refuser.line("run", "--resume", "--out", "out")
    assert "out: is not a run directory (config.yaml is missing)" in line


def test_damaged_checkpoint(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out")
    RunDirectory(tmp_path / "out").checkpoint_path.write_bytes(b"not tensors")
    line = refuser.run_line(flags=("--resume",))
    assert "server/checkpoint.safetensors: cannot be read" in line


def test_disk_is_full(monkeypatch: pytest.MonkeyPatch, refuser: Refuser) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refuser.run_line()
    assert re.search(r"out: the run needs about \d+\.\d GB of disk space, 0.0 GB are free", line)


def test_export_of_an_unfinished_run(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out")
    line = refuser.line("export", "out", "--out", "pipe")
    assert "out: this run has not finished (coarse.safetensors is missing)" in line
    assert "the run has not got that far" in refuser.line("show", "out")


def test_export_onto_something(tmp_path: Path, refuser: Refuser) -> None:
    claim(tmp_path / "out")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "old").write_text("")
    line = refuser.line("export", "out", "--out", "pipe")
    assert "pipe: exists already and is not an empty directory" in line
