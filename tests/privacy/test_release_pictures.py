"""A store of a version that left orientation and transparency aside, and pictures that have them.

They are known by the pixels in their files, so a store refuses to noise them once more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpdm.data import ImageSet
from fedpdm.privacy.releases import ReleasePreview, ReleaseRequest, ReleaseStore
from tests.data.test_identities import grey_folder
from tests.privacy.test_release_identities import (
    DELTA,
    TWICE,
    as_before,
    asks,
    refusal,
    released_numbers,
)  # fmt: skip
from tests.support.pixels import random_pixels

EARLIER = "orientation and transparency left aside, as earlier versions did (now not)"


def of_before(asked: tuple[ImageSet, ReleaseRequest]) -> tuple[ImageSet, ReleaseRequest]:
    """The same request, as a version recorded it that saw neither."""
    images, request = asked
    made = {key: value for key, value in request.preparation.items() if key != "files"}
    return images, dataclasses.replace(request, preparation=made)


def turn(path: Path) -> None:
    """The same pixels in the file, with a tag that turns them."""
    tags = Image.Exif()
    tags[0x0112] = 6
    with Image.open(path) as picture:
        picture.copy().save(path, exif=tags)


def make_transparent(path: Path) -> None:
    """The same colours in the file, half of them transparent."""
    with Image.open(path) as picture:
        colors = np.asarray(picture.convert("RGB"))
    alpha = 127 * np.ones(colors.shape[:2], np.uint8)
    Image.fromarray(np.dstack([colors, alpha])).save(path)


@pytest.mark.parametrize("change", [turn, make_transparent])
def test_a_picture_that_looks_different_now_is_not_noised_again(
    tmp_path: Path, change: Any
) -> None:
    root, store = grey_folder(tmp_path / "pictures"), ReleaseStore(tmp_path / "client")
    path = root / "train" / "a" / "color.png"  # all are in colour, before and after
    Image.fromarray(random_pixels(8, 8, 3, seed=999)).save(path)
    store.obtain(*of_before(asks(root)))
    for file in (root / "train" / "a" / "m000.png", root / "train" / "b" / "m001.png"):
        change(file)
    line = refusal(store, asks(root))
    assert line.startswith(f"2 of 41 images were released before with {EARLIER}; releasing them")
    store.obtain(*asks(root, allow=True))
    (twice, _) = store.spent(delta=DELTA).distribution
    assert twice == (pytest.approx(TWICE, rel=1e-6), 2)


def test_a_store_without_identities_cannot_tell_and_refuses(tmp_path: Path) -> None:
    """It knows images by what was noised alone, here after resizing."""
    root, store = grey_folder(tmp_path / "pictures"), ReleaseStore(tmp_path / "client")
    store.obtain(*asks(root, resolution=4))
    old = as_before(store, tmp_path / "old")
    turn(root / "train" / "a" / "m000.png")
    line = refusal(old, asks(root, resolution=4))
    assert line.startswith(f"1 of 40 images were released before with {EARLIER}; releasing them")
    assert old.preview(*asks(root, resolution=4, allow=True)).epsilon_after == pytest.approx(TWICE)


def test_an_upright_picture_is_handed_out_as_before(tmp_path: Path) -> None:
    root, store = grey_folder(tmp_path / "pictures"), ReleaseStore(tmp_path / "client")
    store.obtain(*of_before(asks(root)))
    assert store.preview(*asks(root)).known == 40
    store.obtain(*asks(root))
    assert released_numbers(store) == [40]


def test_a_new_background_of_transparent_pictures_is_a_changed_step(tmp_path: Path) -> None:
    root, store = grey_folder(tmp_path / "pictures", 6), ReleaseStore(tmp_path / "client")
    for path in root.glob("train/*/*.png"):
        make_transparent(path)
    store.obtain(*asks(root))
    line = refusal(store, asks(root, background=-1.0))
    assert line.startswith("6 of 6 images were released before with data.background = None (now -1")


def test_another_range_of_deep_pictures_is_a_changed_step(tmp_path: Path) -> None:
    root, store = tmp_path / "pictures", ReleaseStore(tmp_path / "client")
    (root / "train" / "a").mkdir(parents=True)
    for number in range(6):
        stored = np.random.default_rng(number).integers(0, 4096, (8, 8), dtype=np.uint16)
        Image.fromarray(stored).save(root / "train" / "a" / f"{number}.png")
    store.obtain(*asks(root, black=0, white=4095))
    line = refusal(store, asks(root, black=0, white=2000))
    assert line.startswith("6 of 6 images were released before with data.white = 4095.0 (now 2000.")
    allowed = asks(root, black=0, white=2000, allow=True)
    assert isinstance(store.preview(*allowed), ReleasePreview)
    assert store.preview(*allowed).again == 6
