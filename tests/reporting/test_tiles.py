"""Images side by side in one array."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fedpdm.reporting.pictures.tiles import png_bytes, tile_images


def test_every_image_has_its_place_and_no_pixel_is_lost() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    tiled = tile_images(images, columns=3, gap=2)
    assert tiled.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]):
        place = tiled[top : top + 4, left : left + 6]
        assert np.array_equal(place, images[index].transpose(1, 2, 0))
    assert (tiled[:, 6:8] == 128).all()
    assert (tiled[6:, 16:] == 128).all()


def test_one_channel_becomes_grey_and_the_file_keeps_it() -> None:
    images = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    tiled = tile_images(images, columns=7)
    read = np.asarray(Image.open(io.BytesIO(png_bytes(tiled))))
    assert np.array_equal(read, np.repeat(images[0].transpose(1, 2, 0), 3, axis=2))


@pytest.mark.parametrize(
    ("shape", "dtype", "columns"),
    [((0, 3, 4, 4), "uint8", 1), ((1, 2, 4, 4), "uint8", 1), ((3, 4, 4), "uint8", 1),
     ((1, 3, 4, 4), "float32", 1), ((1, 3, 4, 4), "uint8", 0)],
)  # fmt: skip
def test_what_is_no_set_of_images_is_refused(
    shape: tuple[int, ...], dtype: str, columns: int
) -> None:
    with pytest.raises(ValueError, match=r"images must be|need an image"):
        tile_images(np.zeros(shape, dtype=dtype), columns=columns)  # type: ignore[arg-type]
