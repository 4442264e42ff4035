"""`fedpdm privacy` with public images: norms of a sample, and a picture of releases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedpdm.data import load_image_set, normalize
from fedpdm.data import open_images as public_images
from fedpdm.data.open_images import open_public_images, sorted_norms
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.mechanism import SeededNoise, clip_l2, release
from tests.support.command_line import call, forget_surroundings, without_advice

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, size=(60, 1, 6, 6), dtype=np.uint8)
LABELS = np.arange(60) % 3
NORMS = np.sort(
    np.sqrt(((PIXELS.astype(np.float64) / 127.5 - 1.0) ** 2).sum(axis=(1, 2, 3)))
)  # by hand, shift 0


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_surroundings(monkeypatch, tmp_path)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "public.npz"
    np.savez(path, images=PIXELS, labels=LABELS)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "public"
    for position, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(root / f"class{label}" / f"{position:02d}.png")
    return root


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[dict[str, Any], str]:
    """The JSON answer and what stands on standard error."""
    assert call("privacy", *arguments, "--json") == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


# --- Norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "folder", "parts"])
def test_norms_of_ones_own_public_images(
    kind: str, npz: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All images count, whatever their split."""
    if kind == "parts":
        source = folder.with_name("parts")
        (source / "test").mkdir(parents=True)
        folder.rename(source / "train")
        (source / "train" / "class0").rename(source / "test" / "class0")
    else:
        source = npz if kind == "npz" else folder
    answer, told = ask(capsys, "--public-sample", source)
    assert set(answer) == {"public_sample"}
    sample = answer["public_sample"]
    assert (sample["images"], sample["shift"], sample["source"]) == (60, 0.0, str(source))
    assert list(sample["norm_quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    for quantile, norm in sample["norm_quantiles"].items():
        assert norm == pytest.approx(np.quantile(NORMS, float(quantile)), rel=1e-6)
    assert sample["covered_by_guarantee"] is False
    for warning in (told, sample["warning"]):
        assert "NOT covered by the privacy guarantee" in warning
        assert "never private" in warning
    assert told.startswith("WARNING: --public-sample: ")
    assert told.count("\n") == 1


def test_norms_are_those_that_clipping_sees(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the median as clip norm half of the images are clipped; chunks change nothing."""
    whole = sorted_norms(open_public_images(str(npz), option="--data"), shift=-0.5)
    monkeypatch.setattr(public_images, "CHUNK_PIXELS", 7 * 36)
    images = open_public_images(str(npz), option="--data")
    read: list[int] = []
    counted = public_images.PublicImages(
        source="", labels=images.labels, class_names=images.class_names, background=0.0,
        read=lambda positions: (read.append(len(positions)), images.read(positions))[1],
    )  # fmt: skip
    assert np.array_equal(sorted_norms(counted, shift=-0.5), whole)
    assert max(read) == 7
    x_0 = normalize(PIXELS, shift=-0.5)
    clipped = clip_l2(x_0, clip_norm=float(np.median(whole)))
    shorter = (clipped.flatten(1).norm(dim=1) < x_0.flatten(1).norm(dim=1) * (1 - 1e-6)).sum()
    assert int(shorter) == 30


def test_resolution_shift_and_a_named_set(capsys: pytest.CaptureFixture[str]) -> None:
    plain = ask(capsys, "--public-sample", "digits")[0]["public_sample"]
    assert (plain["images"], plain["shift"]) == (1442, -1.0)
    images = load_image_set("digits", split="train").images
    norms = (images.astype(np.float64) / 127.5).reshape(len(images), -1)
    median = np.median(np.linalg.norm(norms, axis=1))
    assert plain["norm_quantiles"]["0.5"] == pytest.approx(median, rel=1e-6)
    grey = ask(capsys, "--public-sample", "digits", "--shift", 0, "--resolution", 4)[0]
    images = load_image_set("digits", split="train", resolution=4).images
    norms = (images.astype(np.float64) / 127.5 - 1).reshape(len(images), -1)
    median = np.median(np.linalg.norm(norms, axis=1))
    assert grey["public_sample"]["norm_quantiles"]["0.5"] == pytest.approx(median, rel=1e-6)


def test_a_quantile_becomes_the_clip_norm(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ("--public-sample", npz, "--clip-quantile", 0.25)
    answer, told = ask(capsys, *sample, "--epsilon", 10)
    clip = answer["public_sample"]["clip_norm"]
    assert clip == pytest.approx(np.quantile(NORMS, 0.25), rel=1e-6)
    assert answer["exact"]["clip_norm"] == answer["paper"]["clip_norm"] == clip
    assert "WARNING" in told
    same = ask(capsys, "--epsilon", 10, "--clip-norm", repr(clip))[0]
    assert same["exact"] == answer["exact"]
    assert call("privacy", *sample, "--t0", 600) == 0
    told = capsys.readouterr().out
    assert "L2 norms of 60 public images" in told
    assert "clip norm C, the 25% quantile" in told
    assert call("privacy", *sample) == 2  # a clip norm alone
    assert "exactly two" in capsys.readouterr().err


def test_at_most_so_many_images(npz: Path) -> None:
    few = open_public_images(str(npz), option="--data", max_images=7)
    assert len(few) == 7
    assert np.bincount(few.labels).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    pixels = few.read(np.arange(7))
    for image, label in zip(pixels, few.labels, strict=True):
        found = [k for k in range(60) if np.array_equal(PIXELS[k], image)]
        assert LABELS[found].tolist() == [label]


REFUSED = [
    ("mnits", "must be a folder, a .npz file or one of digits, .*'mnits'; did you mean mnist"),
    ("image_folder", "must be a folder, a .npz file or one of digits, "),
    ("gone.npz", "npz has no file gone.npz"),
    ("mnist", "FEDPDM_DATA"),
    ("empty", "found no class folder"),
    ("void", "--public-sample: void has no image"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED, ids=[source for source, _ in REFUSED])
def test_bad_sources(source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("void/one").mkdir(parents=True)
    assert call("privacy", "--public-sample", source) == 2
    warning, line = without_advice(capsys.readouterr().err).splitlines()
    assert warning.startswith("WARNING: ")
    assert line.startswith("fedpdm: ")
    assert re.search(message, line)


def test_parts_of_different_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.npz"
    np.savez(
        path, images=PIXELS, labels=LABELS, images_test=PIXELS[:, :, :4, :4], labels_test=LABELS
    )
    assert call("privacy", "--public-sample", path) == 2
    line = without_advice(capsys.readouterr().err).splitlines()[-1]
    assert "--public-sample: images must have one shape, got (1, 4, 4) and (1, 6, 6)" in line
    assert call("privacy", "--public-sample", path, "--resolution", 4) == 0


# --- The picture ------------------------------------------------------------------------------


def blocks(path: Path, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Where an image (C, H, W) stands in a picture, enlarged so that it has 48 pixels."""
    factor = -(-48 // wanted.shape[1])
    block = wanted.repeat(factor, axis=1).repeat(factor, axis=2).transpose(1, 2, 0)
    block = np.broadcast_to(block, (*block.shape[:2], 3))
    with Image.open(path) as picture:
        canvas = np.asarray(picture.convert("RGB"))
    height, width = block.shape[:2]
    starts = np.argwhere((canvas == block[0, 0]).all(axis=2))
    return [
        (int(y), int(x))
        for y, x in starts
        if np.array_equal(canvas[y : y + height, x : x + width], block)
    ]


def test_the_picture_shows_clean_clipped_and_released(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "releases.png"
    options = ("--clip-norm", 2, "--epsilon", 10, "--data", npz, "--num", 4, "--seed", 5)
    answer, told = ask(capsys, *options, "--picture", path, "--epsilons", "3,50,1e-4")
    picture = answer["picture"]
    assert told.startswith("WARNING: --picture: ")
    assert "never private" in told
    assert picture["warning"] in told
    assert picture["covered_by_guarantee"] is False
    assert [row["epsilon"] for row in picture["rows"]] == [50, 3, 1e-4]  # noise grows downwards
    assert picture["rows"][2]["t0"] is None
    t0 = picture["rows"][0]["t0"]
    assert t0 < picture["rows"][1]["t0"]

    images = open_public_images(str(npz), option="--data", max_images=4)
    order = np.argsort(images.labels, kind="stable")
    pixels = torch.tensor(images.read(order))
    clipped = clip_l2(normalize(pixels, shift=0.0), clip_norm=2.0)
    released = release(
        pixels, torch.tensor(images.labels[order]), schedule=make_schedule("linear"), t0=t0,
        clip_norm=2.0, shift=0.0, noise=SeededNoise(np.random.SeedSequence(5, spawn_key=(0,))),
    ).x_tilde  # fmt: skip
    rows = [
        pixels.numpy(),
        np.rint((clipped.numpy() + 1) * 127.5).astype(np.uint8),
        np.rint(np.clip((released.numpy() / 3 + 1) * 127.5, 0, 255)).astype(np.uint8),
    ]
    places = [[blocks(path, image) for image in row] for row in rows]
    assert all(len(found) == 1 for row in places for found in row)
    tops = [{found[0][0] for found in row} for row in places]
    assert all(len(top) == 1 for top in tops)
    assert sorted(tops, key=min) == tops
    lefts = [[found[0][1] for found in row] for row in places]
    assert lefts[0] == lefts[1] == lefts[2] == sorted(lefts[0])


@pytest.mark.slow
def test_the_picture_follows_its_seed_and_the_number_of_releases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--clip-norm", 10, "--epsilon", 10, "--num", 2, "--epsilons", "10")
    content = {}
    for name, options in {
        "a": (),
        "b": (),
        "seed": ("--seed", 1),
        "two": ("--releases", 2),
    }.items():
        answer, _ = ask(capsys, *common, *options, "--picture", tmp_path / f"{name}.png")
        assert answer["picture"]["source"] == "digits"
        assert answer["picture"]["rows"] == [{"epsilon": 10.0, "t0": answer["exact"]["t0"]}]
        content[name] = (tmp_path / f"{name}.png").read_bytes()
    assert content["a"] == content["b"]
    assert len(set(content.values())) == 3
    assert call("privacy", *common, "--picture", tmp_path / "again.png") == 0
    assert f"picture of digits written to {tmp_path / 'again.png'}\n" in capsys.readouterr().out


def test_pictures_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = tmp_path / "large.npz"
    np.savez(large, images=np.zeros((2, 600, 500), dtype=np.uint8), labels=np.zeros(2, dtype=int))
    common = ("--clip-norm", 1, "--epsilon", 10, "--picture", "a.png")
    for options, message in (
        (("--data", large), "--data: images must have at most 512 pixels a side to be drawn"),
        (("--shift", 3), "shift must be in [-1, 1], got 3.0"),
        (("--epsilons", "1,-2"), "epsilon must be positive and finite, got -2.0"),
        (("--epsilons", "nan"), "epsilon must be positive and finite, got nan"),
    ):
        assert call("privacy", *common, *options) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in without_advice(printed.err).splitlines()[-1]
        assert not Path("a.png").exists()
    assert call("privacy", *common, "--data", large, "--resolution", 16) == 0
