"""A client's own images: folders, .npz files, and what each error line says."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpdm.data import ImageSet, load_image_set
from tests.support.pixels import Pixels, exactly, random_pixels


def write_image(path: Path, pixels: Pixels, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)


def test_image_folder_with_train_and_test(tmp_path: Path) -> None:
    for split, name, count in (("train", "cat", 3), ("train", "dog", 2), ("test", "emu", 1)):
        for number in range(count):
            write_image(
                tmp_path / split / name / f"{number}.png",
                random_pixels(6, 5, 3, seed=10 * count + number),
            )
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    train = load_image_set("image_folder", split="train", root=tmp_path)
    test = load_image_set("image_folder", split="test", root=str(tmp_path))
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert train.images.shape == (5, 3, 6, 5)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1], [2])
    first = np.asarray(Image.open(tmp_path / "train" / "cat" / "0.png"))
    assert np.array_equal(train.images[0], first.transpose(2, 0, 1))
    assert train.background == 0.0


def test_image_folder_without_split_goes_by_content(tmp_path: Path) -> None:
    for number in range(300):
        pixels = random_pixels(4, 4, seed=number)
        write_image(tmp_path / f"class {number % 2}" / f"{number:03d}.png", pixels)
    (tmp_path / "empty class").mkdir()
    parts = {
        split: load_image_set("image_folder", split=split, root=tmp_path)
        for split in ("train", "test")
    }
    assert parts["train"].class_names == ("class 0", "class 1", "empty class")
    assert parts["train"].images.shape[1] == 1  # every file is grey
    contents = {s: {image.tobytes() for image in part.images} for s, part in parts.items()}
    assert len(contents["train"] | contents["test"]) == 300
    assert not contents["train"] & contents["test"]
    assert abs(len(parts["test"]) - 30) < 4 * (300 * 0.1 * 0.9) ** 0.5
    # New names and one more image move no other image across.
    for file in sorted(tmp_path.glob("class */*.png")):
        file.rename(file.with_name(f"renamed-{file.name}"))
    write_image(tmp_path / "class 0" / "0.png", random_pixels(4, 4, seed=999))
    again = load_image_set("image_folder", split="test", root=tmp_path)
    assert contents["test"] <= {image.tobytes() for image in again.images}
    assert len(again) - len(parts["test"]) in (0, 1)


def test_image_folder_of_mixed_kinds_is_rgb(tmp_path: Path) -> None:
    grey = random_pixels(4, 4)
    write_image(tmp_path / "train" / "a" / "0.png", grey)
    write_image(tmp_path / "train" / "a" / "1.PNG", random_pixels(4, 4, 3), mode="P")
    write_image(tmp_path / "test" / "a" / "0.png", grey)
    train = load_image_set("image_folder", split="train", root=tmp_path)
    assert train.images.shape == (2, 3, 4, 4)
    assert all(np.array_equal(train.images[0, channel], grey) for channel in range(3))
    # The test split has grey files alone, but must have the channels of the train split.
    assert load_image_set("image_folder", split="test", root=tmp_path).images.shape[1] == 3


def test_image_folder_errors(tmp_path: Path) -> None:
    def load(split: str = "train", **arguments: object) -> ImageSet:
        return load_image_set("image_folder", split=split, root=tmp_path, **arguments)  # type: ignore[arg-type]

    absent = tmp_path / "absent"
    with pytest.raises(
        FileNotFoundError, match=exactly(f"data.root: image_folder has no folder {absent}")
    ):
        load_image_set("image_folder", split="train", root=absent)
    with pytest.raises(FileNotFoundError, match=r"<class>/.*.png, found no class folder$"):
        load()
    first, second = tmp_path / "train" / "a" / "0.png", tmp_path / "train" / "b" / "1.png"
    first.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match=exactly("data.root: image_folder has no train image")):
        load()
    write_image(first, random_pixels(4, 6, 3))
    with pytest.raises(
        FileNotFoundError,
        match=exactly(f"data.root: image_folder has no folder {tmp_path / 'test'}"),
    ):
        load("test")
    write_image(second, random_pixels(8, 8, 3))
    with pytest.raises(
        ValueError,
        match=exactly(
            f"data.root: images differ in size, {first} is 6x4 and {second} is 8x8; "
            "set data.resolution to resize them"
        ),
    ):
        load()
    assert load(resolution=4).images.shape == (2, 3, 4, 4)
    second.write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=rf"^data.root: {re.escape(str(second))} is not a readable"
    ):
        load()
    write_image(second, random_pixels(4, 6, 3))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])  # a good header, half the pixels
    with pytest.raises(
        ValueError, match=rf"^data.root: {re.escape(str(second))} is not a readable"
    ):
        load()
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(second)
    with pytest.raises(
        ValueError, match=r"1\.png must have 8 bits per channel, got mode I;16; for more, "
    ):
        load()


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz_layouts(layout: str, tmp_path: Path) -> None:
    channels = 1 if layout == "NHW" else 3
    pixels = random_pixels(40, channels, 6, 5)
    stored = {
        "NHW": pixels[:, 0],
        "NHWC": pixels.transpose(0, 2, 3, 1),
        "NCHW": pixels,
    }[layout]
    file = tmp_path / "own.npz"
    labels = np.arange(40, dtype=np.int32) % 4
    names = np.array(["w", "x", "y", "z"])
    np.savez(
        file,
        images=stored,
        labels=labels,
        class_names=names,
        images_test=stored[:7],
        labels_test=labels[:7],
    )
    train = load_image_set("npz", split="train", root=file)
    test = load_image_set("npz", split="test", root=file)
    assert np.array_equal(train.images, pixels)
    assert np.array_equal(test.images, pixels[:7])
    assert (train.labels == labels).all()
    assert train.class_names == ("w", "x", "y", "z")


def test_npz_without_test_arrays_is_split_by_content(tmp_path: Path) -> None:
    pixels, labels = random_pixels(400, 6, 6), np.arange(400) % 3
    order = np.random.default_rng(0).permutation(400)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", images=pixels[order], labels=labels[order])
    sides = [
        {
            split: {
                (image.tobytes(), int(label))
                for image, label in zip(part.images, part.labels, strict=True)
            }
            for split in ("train", "test")
            for part in [load_image_set("npz", split=split, root=tmp_path / name)]
        }
        for name in ("a.npz", "b.npz")
    ]
    assert sides[0] == sides[1]
    assert len(sides[0]["train"]) + len(sides[0]["test"]) == 400
    assert abs(len(sides[0]["test"]) - 40) < 4 * (400 * 0.1 * 0.9) ** 0.5
    colored = load_image_set("npz", split="train", root=tmp_path / "a.npz", coloring="by_label")
    assert (colored.images.shape[1], colored.class_names) == (3, ("0", "1", "2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "must hold labels, holds images$"),
        ({"images_test": np.zeros((2, 5, 6), np.uint8)}, "must hold labels_test, holds "),
        ({"images": np.zeros((4, 5, 6))}, "images must be uint8, got float64$"),
        ({"images": np.zeros((4, 5, 6, 2), np.uint8)}, r"images must have .* shape \(4, 5, 6, 2\)"),
        ({"images": np.zeros((4, 3, 6, 3), np.uint8)}, r"images must have .* shape \(4, 3, 6, 3\)"),
        ({"labels": np.zeros(4)}, r"labels must be integers of shape \(4,\), got float64"),
        ({"labels": np.zeros(3, int)}, r"labels must be integers .* got int64 of shape \(3,\)$"),
        ({"labels": np.array([0, 0, -2, 1])}, r"labels\[2\] must be in \[0, 2\), got -2$"),
        (
            {"class_names": np.array(["a", "b"]), "labels": np.array([0, 1, 5, 1])},
            r"labels\[2\] must be in \[0, 2\), got 5$",
        ),
        ({"class_names": np.array([1, 2])}, r"class_names must be strings of shape \(K,\)"),
        ({"class_names": np.array(["a", "a"])}, "^class_names must be distinct"),
        ({"labels": np.array([{}] * 4, dtype=object)}, "is not a readable .npz file: "),
    ],
)
def test_npz_errors(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    arrays: dict[str, object] = {
        "images": random_pixels(4, 5, 6),
        "labels": np.array([0, 1, 0, 1]),
    }
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    file = tmp_path / "own.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        load_image_set("npz", split="train", root=file)
    assert "\n" not in str(caught.value)


def test_npz_files_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data.root: npz has no file .*absent.npz$"):
        load_image_set("npz", split="train", root=tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"^data.root: npz must be a .npz file, got "):
        load_image_set("npz", split="train", root=tmp_path)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"text.npz is not a readable .npz file: "):
        load_image_set("npz", split="train", root=tmp_path / "text.npz")
    np.savez(
        tmp_path / "none.npz",
        images=np.zeros((0, 4, 4), np.uint8),
        labels=np.zeros(0, int),
    )
    with pytest.raises(ValueError, match=exactly("data.root: npz has no train image")):
        load_image_set("npz", split="train", root=tmp_path / "none.npz")


def test_an_image_too_large_to_read_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    size = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 0, 0, 0, 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 7).save(tmp_path / name / "small.png")
    (tmp_path / "b" / "vast.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"vast.png is too large to be read: .*1200000000 pixels"):
        load_image_set("image_folder", split="train", root=tmp_path, resolution=8)


def test_an_image_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/a", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8), 7).save(tmp_path / name / "1.png")

    def convert(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ValueError, match=r"1.png is larger than the free memory"):
        load_image_set("image_folder", split="train", root=tmp_path)
