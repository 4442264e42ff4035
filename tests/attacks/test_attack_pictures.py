"""Pictures of attacks: the images that were given stand in the file, in their places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedpdm.reporting.pictures import draw_image_grid, draw_memorised_pairs, draw_reconstructions

Pixels = NDArray[np.uint8]


def flat(*colors: tuple[int, int, int]) -> Pixels:
    """One image of a single colour each, (n, 3, 8, 8)."""
    return np.array(colors, np.uint8)[:, :, None, None] * np.ones((1, 1, 8, 8), np.uint8)


def places(path: Path, image: Pixels) -> tuple[float, float, int]:
    """(mean row, mean column, number) of the pixels of an image's colour."""
    with Image.open(path) as picture:
        canvas = np.asarray(picture.convert("RGB"))
    at = np.argwhere((canvas == image[:, 0, 0]).all(axis=2))
    assert len(at) > 0, "the image is not there"
    return float(at[:, 0].mean()), float(at[:, 1].mean()), len(at)


def test_pairs_stand_above_each_other_worst_first(tmp_path: Path) -> None:
    generated = flat((250, 0, 0), (0, 250, 0), (0, 0, 250))
    nearest = flat((120, 0, 0), (0, 120, 0), (0, 0, 120))
    target = tmp_path / "pairs.png"
    draw_memorised_pairs(target, generated, nearest, np.array([0.2, 0.98, 1.3]), per_row=2)
    above, below = ([places(target, image) for image in row] for row in (generated, nearest))
    for (y, x, count), (y_training, x_training, _) in zip(above, below, strict=True):
        assert count == 48 * 48
        assert x == x_training
        assert y_training - y == 48 + 3
    assert above[0][0] == above[1][0] < above[2][0]
    assert above[0][1] == above[2][1] < above[1][1]

    plain = tmp_path / "plain.png"
    draw_image_grid(plain, [generated], row_labels=[""])
    labelled = tmp_path / "labelled.png"
    draw_image_grid(labelled, [generated], row_labels=[""], image_labels=[["a", "b", "c"]])
    with Image.open(plain) as a, Image.open(labelled) as b:
        assert b.height == a.height + 15
    assert places(labelled, generated[0])[0] == places(plain, generated[0])[0] + 15


def test_reconstructions_stand_under_their_originals(tmp_path: Path) -> None:
    rows = {
        "original": flat((250, 0, 0), (0, 250, 0)),
        "upload": flat((120, 0, 0), (0, 120, 0)),
        "global": flat((60, 0, 0), (0, 60, 0)),
    }
    target = tmp_path / "rows.png"
    draw_reconstructions(target, rows, note="t0 = 300")
    found = [[places(target, image) for image in images] for images in rows.values()]
    for column in (0, 1):
        assert len({row[column][1] for row in found}) == 1
    heights = [row[0][0] for row in found]
    assert heights == sorted(heights)
    assert found[0][0][1] < found[0][1][1]


def test_pictures_refuse(tmp_path: Path) -> None:
    images = flat((1, 2, 3), (4, 5, 6))
    with pytest.raises(ValueError, match=r"^generated, nearest and ratios must be of one number"):
        draw_memorised_pairs(tmp_path / "x.png", images, images[:1], np.zeros(2))
    with pytest.raises(ValueError, match=r"^rows must hold equally many images, got \{'a': 2"):
        draw_reconstructions(tmp_path / "x.png", {"a": images, "b": images[:1]})
    with pytest.raises(ValueError, match=r"^image_labels must be one per image or none"):
        draw_image_grid(tmp_path / "x.png", [images], row_labels=["a"], image_labels=[["b"]])
    assert list(tmp_path.iterdir()) == []
