"""Pictures: pixels are where they should be, files are whole, and errors are clear."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import fedpdm.reporting.pictures
from fedpdm.data.partition import ClientPartition, partition
from fedpdm.reporting.pictures import draw_image_grid, draw_partition
from fedpdm.storage.files import StoreError
from tests.support.pixels import Pixels, random_pixels

NAMES = ("zero", "one", "$two$ & _three_", "four")
LABELS = np.repeat(np.arange(4), [40, 30, 20, 11])


def clients(kind: str = "majority_minority", **changes: Any) -> tuple[ClientPartition, ...]:
    given = {"majority_classes": 1, "majority_ratio": 5.0} if kind == "majority_minority" else {}
    arguments: dict[str, Any] = {"num_clients": 3, "num_classes": 4, **given, **changes}
    return partition(LABELS, kind=kind, rng=np.random.default_rng(0), **arguments)  # type: ignore[arg-type]


def read(path: Path) -> Pixels:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def find(canvas: Pixels, block: Pixels) -> list[tuple[int, int]]:
    """All (y, x) at which `block` (h, w, 3) occurs exactly."""
    starts = np.argwhere((canvas == block[0, 0]).all(axis=2))
    height, width = block.shape[:2]
    return [
        (int(y), int(x))
        for y, x in starts
        if np.array_equal(canvas[y : y + height, x : x + width], block)
    ]


def enlarged(image: Pixels, factor: int) -> Pixels:
    """(H * factor, W * factor, 3) by the Kronecker product."""
    block = np.kron(image.transpose(1, 2, 0), np.ones((factor, factor, 1), np.uint8))
    return np.broadcast_to(block.astype(np.uint8), (*block.shape[:2], 3))


# --- image grid -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("size", "factor"), [(8, 6), (28, 2), (64, 1), (7, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_there_pixel_by_pixel(
    size: int, factor: int, channels: int, tmp_path: Path
) -> None:
    rows = [random_pixels(3, channels, size, size, seed=seed) for seed in range(2)]
    path = tmp_path / "grid.png"
    draw_image_grid(path, rows, row_labels=["first", "second"], title="a title")
    canvas = read(path)
    places = [[find(canvas, enlarged(image, factor)) for image in row] for row in rows]
    assert all(len(found) == 1 for row in places for found in row)
    tops = [[found[0][0] for found in row] for row in places]
    lefts = [[found[0][1] for found in row] for row in places]
    assert len(set(tops[0])) == len(set(tops[1])) == 1
    assert lefts[0] == lefts[1] == sorted(lefts[0])
    assert tops[0][0] < tops[1][0]
    border = [canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1]]
    assert all((edge == 255).all() for edge in border)
    assert canvas[: tops[0][0]].min() < 100  # the title
    assert canvas[:, : lefts[0][0]].min() < 100  # the labels


def test_scale_groups_and_missing_images(tmp_path: Path) -> None:
    rows = [random_pixels(n, 3, 8, 8, seed=n) for n in (3, 1, 2)]
    plain, grouped = tmp_path / "plain.png", tmp_path / "grouped.png"
    draw_image_grid(plain, rows, row_labels=["a", "b", "c"], scale=4)
    draw_image_grid(
        grouped,
        rows,
        row_labels=["a", "b", "c"],
        row_groups=["majority", "majority", "minority"],
        column_labels=["1", "2", "a very long label"],
        scale=4,
    )
    tops = {}
    for path in (plain, grouped):
        canvas = read(path)
        places = [find(canvas, enlarged(row[0], 4)) for row in rows]
        assert [len(place) for place in places] == [1, 1, 1]
        tops[path] = [place[0][0] for place in places]
        y, x = places[1][0]
        missing = canvas[y : y + 32, x + 35 : x + 67]
        assert (missing == missing[0, 0]).all()
        assert missing[0, 0, 0] not in (0, 255)
    steps = {path: np.diff(top).tolist() for path, top in tops.items()}
    assert steps[plain][0] == steps[plain][1] == steps[grouped][0]
    assert steps[grouped][1] > steps[grouped][0]
    assert tops[grouped][0] > tops[plain][0]  # turned column labels need height


def test_a_note_stands_below_the_title_and_widens_the_picture(tmp_path: Path) -> None:
    row = random_pixels(1, 3, 8, 8)
    canvas = {}
    for note in (None, "short", "a note that is much longer than the one image of the row is wide"):
        path = tmp_path / "grid.png"
        draw_image_grid(path, [row], row_labels=["a"], title="title", note=note)
        canvas[note] = read(path)
    plain, short, long = canvas.values()
    top = find(plain, enlarged(row[0], 6))[0][0]
    lower = find(short, enlarged(row[0], 6))[0][0]
    assert lower > top
    assert (plain[12 + 16 : top] == 255).all()  # below the title is nothing
    assert short[12 + 16 : lower].min() < 200  # now the note
    assert (short[lower - 3 : lower] == 255).all()  # which does not reach the images
    assert long.shape[1] > short.shape[1]
    assert (long[:, -5:] == 255).all()  # nothing is cut off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "rows must hold at least 1 image, got 0"),
        ({"rows": [random_pixels(0, 3, 8, 8)]}, "rows must hold at least 1 image, got 0"),
        ({"row_labels": ["a"]}, "row_labels must be one per row, 2, got 1"),
        ({"row_groups": ["a"]}, "row_groups must be one per row, 2, got 1"),
        ({"column_labels": ["a"]}, "column_labels must be one per column, 2, got 1"),
        ({"scale": 0}, "scale must be at least 1, got 0"),
        ({"path": "grid.jpg"}, "path must end in .png, got grid.jpg"),
        (
            {"rows": [random_pixels(2, 3, 8, 8), np.zeros((2, 3, 8, 8))]},
            "rows[1] must be uint8 of shape (n, C, H, W) with C 1 or 3, "
            + "got float64 of shape (2, 3, 8, 8)",
        ),
        (
            {"rows": [random_pixels(2, 3, 8, 8), random_pixels(2, 3, 9, 8)]},
            "rows[1] must hold images of (8, 8) pixels, got (9, 8)",
        ),
    ],
)
def test_grid_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "path": tmp_path / "grid.png",
        "rows": [random_pixels(2, 3, 8, 8)] * 2,
        "row_labels": ["a", "b"],
        **changes,
    }
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        draw_image_grid(arguments.pop("path"), arguments.pop("rows"), **arguments)
    assert not list(tmp_path.iterdir())


# --- partitions -----------------------------------------------------------------------------


def is_orange(canvas: Pixels) -> NDArray[np.bool_]:
    red, green, blue = canvas.astype(int).transpose(2, 0, 1)
    return (red > 190) & (green > 60) & (green < 130) & (blue < 60)


def test_partition_picture_outlines_the_majority(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "partition.png"
    draw_partition(path, clients(), LABELS, NAMES)
    assert is_orange(read(path)).sum() > 200
    # Where every class is majority, outlines would say nothing.
    draw_partition(path, clients("iid"), LABELS, NAMES)
    assert is_orange(read(path)).sum() == 0
    assert [file.name for file in path.parent.iterdir()] == ["partition.png"]


@pytest.mark.slow
def test_partition_picture_grows_with_clients_and_classes(tmp_path: Path) -> None:
    few, many, wide = (tmp_path / f"{name}.png" for name in ("few", "many", "wide"))
    draw_partition(few, clients(), LABELS, NAMES)
    draw_partition(many, clients("dirichlet", num_clients=80, alpha=0.5), LABELS, NAMES)
    labels = np.arange(300) % 100
    parts = partition(
        labels, kind="iid", num_clients=2, num_classes=100, rng=np.random.default_rng(0)
    )
    draw_partition(wide, parts, labels, [str(k) for k in range(100)])
    assert read(many).shape[0] > 5 * read(few).shape[0]
    assert 1000 < read(wide).shape[1] < 4000


def test_partition_picture_refuses(tmp_path: Path) -> None:
    path = tmp_path / "partition.png"
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 3\), .* got 0 to 3$"):
        draw_partition(path, clients(), LABELS, NAMES[:3])
    with pytest.raises(ValueError, match=r"^partitions must hold at least 1 client, got 0$"):
        draw_partition(path, (), LABELS, NAMES)
    with pytest.raises(ValueError, match=r"^path must end in .png, got x.pdf$"):
        draw_partition("x.pdf", clients(), LABELS, NAMES)


# --- files ----------------------------------------------------------------------------------


def test_pictures_repeat_byte_by_byte_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_text("old")
    draw_image_grid(path, [random_pixels(2, 3, 8, 8)], row_labels=["a"])
    first = path.read_bytes()
    draw_image_grid(str(path), [random_pixels(2, 3, 8, 8)], row_labels=["a"])
    assert path.read_bytes() == first
    draw_image_grid(path, [random_pixels(2, 3, 8, 8, seed=1)], row_labels=["a"])
    assert path.read_bytes() != first


def test_a_failed_write_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.png"
    path.write_text("old")

    def fail(source: Path, target: Path) -> None:
        assert source.stat().st_size > 100  # the new picture is whole before it is moved
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match=r"grid\.png: cannot be written: no space left"):
        draw_image_grid(path, [random_pixels(2, 3, 8, 8)], row_labels=["a"])
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.slow
def test_slow_libraries_are_imported_only_when_used() -> None:
    code = (
        "import sys, fedpdm.data, fedpdm.evaluation.metrics;"
        "import fedpdm.data.partition, fedpdm.reporting.pictures;"
        "print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fedpdm.reporting.pictures.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
