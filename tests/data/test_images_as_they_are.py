"""Image files as people have them: turned, transparent, deep, of several frames, nested, stray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedpdm.data import ImageSet, load_image_set
from fedpdm.data.identity import identity
from tests.support.pixels import Pixels, exactly, random_pixels

ORIENTATION = 0x0112


def save(path: Path, pixels: Pixels, *, orientation: int | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if orientation is not None:
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        options["exif"] = tags
    picture.save(path, **options)
    return path


def load(root: Path, split: str = "train", **options: Any) -> ImageSet:
    return load_image_set("image_folder", split=split, root=root, **options)  # type: ignore[arg-type]


def train(root: Path) -> Path:
    """Where one image goes, beside a class for the test images."""
    (root / "test" / "a").mkdir(parents=True, exist_ok=True)
    return root / "train" / "a"


# --- Orientation ----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_a_picture_is_turned_as_its_tag_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = np.kron(random_pixels(3, 4, 3), np.ones((8, 8, 1), np.uint8))
    path = save(train(tmp_path) / f"0.{suffix}", pixels, orientation=orientation)
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    loaded = load(tmp_path)
    assert np.array_equal(loaded.images[0], upright.transpose(2, 0, 1))
    assert loaded.images.shape[2:] == ((24, 32) if orientation < 5 else (32, 24))


def test_a_turned_picture_is_known_by_what_lies_in_its_file(tmp_path: Path) -> None:
    """As versions knew it that left the tag aside: an old store recognises it."""
    pixels = random_pixels(6, 6, seed=1)
    save(train(tmp_path) / "0.png", pixels, orientation=6)
    loaded = load(tmp_path)
    assert bytes(loaded.image_identities()[0]) == identity(pixels[None])
    assert np.array_equal(loaded.images[0, 0], np.rot90(pixels, -1))


def test_sizes_are_compared_upright(tmp_path: Path) -> None:
    folder = train(tmp_path)
    save(folder / "0.jpg", random_pixels(8, 16), orientation=6)
    save(folder / "1.jpg", random_pixels(16, 8))
    assert load(tmp_path).images.shape == (2, 1, 16, 8)
    save(folder / "2.jpg", random_pixels(8, 16))
    with pytest.raises(ValueError, match=r"0.jpg is 8x16 and .*2.jpg is 16x8; set data.resolution"):
        load(tmp_path)


def test_a_damaged_tag_turns_nothing(tmp_path: Path) -> None:
    pixels = random_pixels(5, 6)
    save(train(tmp_path) / "0.png", pixels, exif=b"Exif\0\0MM\0*broken")
    assert np.array_equal(load(tmp_path).images[0, 0], pixels)


# --- Transparency ---------------------------------------------------------------------------


@pytest.mark.parametrize(("background", "level"), [(None, 128), (-1.0, 0), (1.0, 255), (0.2, 153)])
def test_the_background_shows_through(tmp_path: Path, background: float | None, level: int) -> None:
    pixels = random_pixels(4, 4, 4, seed=3)
    pixels[..., 3] = np.arange(16).reshape(4, 4) * 17
    save(train(tmp_path) / "0.png", pixels)
    loaded = load(tmp_path, background=background)
    share = pixels[..., 3:] / 255.0
    wanted = pixels[..., :3] * share + level * (1 - share)
    assert np.abs(loaded.images[0].transpose(1, 2, 0) - wanted).max() <= 0.5 + 1e-9
    assert loaded.background == (background or 0.0)
    assert bytes(loaded.image_identities()[0]) == identity(pixels[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB"])
def test_every_kind_of_transparency_counts(tmp_path: Path, mode: str) -> None:
    pixels = np.full((4, 4), 200, np.uint8)
    pixels[1:3, 1:3] = 10
    path = train(tmp_path) / "0.png"
    path.parent.mkdir(parents=True)
    if mode == "LA":
        picture = Image.fromarray(np.stack([pixels, 255 * (pixels == 10).astype(np.uint8)], -1))
        picture.save(path)
    else:
        transparent: Any = (200, 200, 200) if mode == "RGB" else 200
        picture = Image.fromarray(pixels)
        if mode == "P":
            picture = Image.fromarray(pixels // 200).convert("P")
            picture.putpalette([10, 10, 10, 200, 200, 200])
            transparent = 1
        picture.convert(mode).save(path, transparency=transparent)
    shown = load(tmp_path, background=1.0).images[0]
    assert shown.shape[0] == (1 if mode == "L" else 3)
    assert np.array_equal(shown[0], np.where(pixels == 10, 10, 255))


def test_what_is_opaque_stays_as_it_is(tmp_path: Path) -> None:
    pixels = random_pixels(5, 5, 4)
    pixels[..., 3] = 255
    save(train(tmp_path) / "0.png", pixels)
    loaded = load(tmp_path, background=-1.0)
    assert np.array_equal(loaded.images[0], pixels[..., :3].transpose(2, 0, 1))
    assert np.array_equal(loaded.image_identities(), loaded.image_digests())


def test_icons_that_differ_in_transparency_alone_are_different(tmp_path: Path) -> None:
    """Their colour is the same all over: earlier versions saw nothing of them."""
    for number in range(3):
        pixels = np.zeros((6, 6, 4), np.uint8)
        pixels[..., 3] = random_pixels(6, 6, seed=number)
        save(train(tmp_path) / f"{number}.png", pixels)
    assert load(tmp_path).distinct().tolist() == [0, 1, 2]


# --- More than 8 bits -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_shown_by_a_stated_range(tmp_path: Path, suffix: str) -> None:
    stored = np.array([[0, 1000, 2000], [3000, 4000, 65535]], np.uint16)
    path = save(train(tmp_path) / f"0.{suffix}", stored)
    with pytest.raises(
        ValueError, match=rf"{path.name} must have 8 bits per channel, .* data.black"
    ):
        load(tmp_path)
    shown = load(tmp_path, value_range=(1000.0, 4000.0))
    assert shown.images[0, 0].tolist() == [[0, 0, 85], [170, 255, 255]]
    other = load(tmp_path, value_range=(4000.0, 1000.0))
    assert other.images[0, 0].tolist() == [[255, 255, 170], [85, 0, 0]]
    assert np.array_equal(shown.image_identities(), other.image_identities())


def test_floating_point_tiff_and_grey_pictures_go_together(tmp_path: Path) -> None:
    save(train(tmp_path) / "0.tiff", np.array([[0.0, 0.5], [np.nan, 2.0]], np.float32))
    save(train(tmp_path) / "1.png", np.array([[9, 8], [7, 6]], np.uint8))
    shown = load(tmp_path, value_range=(0.0, 1.0))
    assert shown.images[:, 0].tolist() == [[[0, 128], [0, 255]], [[9, 8], [7, 6]]]


# --- Several frames -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tiff", "gif"])
def test_frames_are_refused_or_images(tmp_path: Path, suffix: str) -> None:
    frames = [np.full((4, 4), level, np.uint8) for level in (10, 100, 200)]
    rest = [Image.fromarray(frame) for frame in frames[1:]]
    path = save(train(tmp_path) / f"0.{suffix}", frames[0], save_all=True, append_images=rest)
    with pytest.raises(
        ValueError,
        match=exactly(
            f"data.root: {path} has 3 frames; set data.frames to all (each is an image) or to first"
        ),
    ):
        load(tmp_path)
    first, every = load(tmp_path, frames="first"), load(tmp_path, frames="all")
    assert (len(first), len(every)) == (1, 3)
    assert every.images[:, 0, 0, 0].tolist() == [10, 100, 200]
    assert np.array_equal(first.image_identities(), every.image_identities()[:1])


def test_a_photograph_with_a_preview_is_one_image(tmp_path: Path) -> None:
    large, small = random_pixels(16, 16, 3), random_pixels(4, 4, 3, seed=1)
    path = train(tmp_path) / "0.jpg"
    save(path, large, format="MPO", save_all=True, append_images=[Image.fromarray(small)])
    with Image.open(path) as picture:
        assert picture.format == "MPO"
    assert load(tmp_path).images.shape == (1, 3, 16, 16)


# --- Nothing is skipped silently ------------------------------------------------------------


def test_nested_folders_are_read_and_every_other_file_is_named(tmp_path: Path) -> None:
    for number, place in enumerate(("cat/0.png", "cat/anna/1.png", "cat/anna/2019/2.png",
                                    "dog/3.png")):  # fmt: skip
        save(tmp_path / place, random_pixels(4, 4, seed=number))
    for place in ("readme.txt", "cat/.DS_Store", "cat/anna/notes.doc", ".cache/x.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("no image")
    (tmp_path / "dog" / "link").symlink_to(tmp_path / "cat")
    loaded = load(tmp_path, whole=True)
    assert loaded.labels.tolist() == [0, 0, 0, 1]
    assert set(loaded.inventory.unused) == {
        "readme.txt (in no class folder)",
        ".cache/x.png (in no class folder)",
        "cat/.DS_Store (hidden)",
        "cat/anna/notes.doc (no image by its name)",
        "dog/link (a link to a folder)",
    }
    assert loaded.inventory.words().startswith("5 files are not used: .cache/x.png (in no class")
    few = load(tmp_path, whole=True, classes=["dog"])
    assert few.inventory.words().startswith(
        "3 left out by data.classes or data.max_images; 5 files"
    )


def test_files_beside_train_and_test_are_named(tmp_path: Path) -> None:
    save(train(tmp_path) / "0.png", random_pixels(4, 4))
    save(tmp_path / "valid" / "a" / "1.png", random_pixels(4, 4, seed=1))
    (tmp_path / "train" / "list.csv").write_text("x")
    assert load(tmp_path).inventory.unused == (
        "train/list.csv (in no class folder)",
        "valid/a/1.png (in no class folder)",
    )


def test_many_files_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    save(train(tmp_path) / "0.png", random_pixels(4, 4))
    for number in range(12):
        (train(tmp_path) / f"{number:02d}.txt").write_text("x")
    words = load(tmp_path).inventory.words()
    assert words.startswith("12 files are not used: train/a/00.txt (no image by its name), ")
    assert words.endswith("train/a/09.txt (no image by its name) and 2 more")


def test_set_aside_are_images_without_a_split_of_their_own(tmp_path: Path) -> None:
    for number in range(60):
        save(tmp_path / "a" / f"{number}.png", random_pixels(4, 4, seed=number))
    parts = {split: load(tmp_path, split) for split in ("train", "test")}
    assert parts["train"].inventory.set_aside == len(parts["test"]) > 0
    assert parts["test"].inventory.words(split="test") == (
        f"{len(parts['train'])} set aside as training images"
    )
    assert len(load(tmp_path, whole=True)) == 60
    with pytest.raises(ValueError, match=r"has no test image; 60 set aside as training images$"):
        load(tmp_path, "test", whole=True)


def test_keys_of_files_are_for_files(tmp_path: Path) -> None:
    for options, key in (
        ({"background": 0.5}, "background"),
        ({"value_range": (0, 9)}, "black"),
        ({"frames": "all"}, "frames"),
    ):
        with pytest.raises(
            ValueError, match=rf"^data.{key}: is for own image files, got data.name"
        ):
            load_image_set("digits", split="train", **options)  # type: ignore[arg-type]
