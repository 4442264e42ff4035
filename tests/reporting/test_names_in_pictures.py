"""Pictures with the names that people give to their classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpdm.data.partition import ClientPartition
from fedpdm.reporting.page.charts import Series, line_chart
from fedpdm.reporting.pictures import draw_image_grid, draw_partition, draw_roc, lettering
from fedpdm.reporting.run_files import draw_samples
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.run_directory import RunDirectory
from tests.support.federations import small_config

CHINESE = ["\u732b\u54aa\u52a8\u7269", "\u72d7", "caf\u00e9"]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as matplotlib warns of missing letters
        yield


@pytest.fixture(params=("this machine's fonts", "no other font"))
def fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "no other font":
        monkeypatch.setattr(lettering, "_families", lambda: ())
    lettering._font_of.cache_clear()
    yield request.param
    lettering._font_of.cache_clear()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def split(num_classes: int) -> tuple[tuple[ClientPartition, ...], np.ndarray]:
    labels = np.arange(num_classes).repeat(3)
    half = len(labels) // 2
    parts = (np.arange(half), np.arange(half, len(labels)))
    return tuple(
        ClientPartition(client_id=k, indices=part, majority=(k,), minority=())
        for k, part in enumerate(parts)
    ), labels


def saved_run(root: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Draw the samples of a client with these classes; what the grid was asked for."""
    run = RunDirectory(root)
    run.write_json("partition.json", {"class_names": names, "clients": []})
    labels = np.arange(len(names)).repeat(2)
    images = np.zeros((len(labels), 3, 8, 8), np.uint8)
    ClientStore(run.client_path(0)).save_samples({"labels": labels, "pfdm": images})
    asked: dict[str, Any] = {}

    def draw(path: Path, rows: Any, **options: Any) -> None:
        asked.update(options, rows=rows)
        draw_image_grid(path, rows, **options)

    monkeypatch.setattr("fedpdm.reporting.run_files.draw_image_grid", draw)
    assert draw_samples(run, small_config(partition={"num_clients": 1}))
    return asked


def test_samples_are_headed_by_the_names_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["airplane", "automobile", "bird", "cat"]
    asked = saved_run(tmp_path, names, monkeypatch)
    assert asked["column_labels"] == [name for name in names for _ in range(2)]
    assert asked["note"] is None


def test_of_many_classes_some_are_shown_and_the_picture_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = saved_run(tmp_path, [f"class number {k}" for k in range(100)], monkeypatch)
    shown = asked["column_labels"]
    assert (len(shown), shown[0], shown[-1]) == (40, "class number 0", "class number 99")
    assert asked["note"] == "40 of 100 classes"


def test_every_picture_takes_names_in_any_script(fonts: str, tmp_path: Path) -> None:
    """Without a warning, and never as boxes: in a font that has the letters, or spelled."""
    rows = [np.zeros((3, 1, 8, 8), np.uint8)]
    draw_image_grid(
        tmp_path / "a.png", rows, row_labels=CHINESE[:1], column_labels=CHINESE, title=CHINESE[0]
    )
    parts, labels = split(3)
    draw_partition(tmp_path / "b.png", parts, labels, CHINESE)
    curve = (np.array([0.1, 1.0]), np.array([0.2, 1.0]))
    draw_roc(tmp_path / "c.png", {CHINESE[1]: curve}, title=CHINESE[0], smallest=0.01)
    for name in ("a.png", "b.png", "c.png"):
        assert pixels(tmp_path / name).shape > (50, 50)
    if fonts == "no other font":
        assert [lettering.written(name) for name in CHINESE] == [
            "MaoMiDongWu", "Gou", "caf\u00e9",
        ]  # fmt: skip
        assert lettering.written("\u306d\u3053 \uace0\uc591\uc774") == "neko GoYangI"
        assert lettering.written("\ue123") == r"\ue123"  # of private use: nobody knows its sound
        assert lettering.fallback_fonts(CHINESE) == [""] or not lettering.fallback_fonts(CHINESE)


def test_a_font_that_has_the_letters_is_chosen(fonts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_families", lambda: (("Other", "o.ttf"), ("Hanzi", "h.ttf")))
    has = lettering._has
    monkeypatch.setattr(
        lettering,
        "_has",
        lambda path, one: path == "h.ttf" if path[1:] == ".ttf" else has(path, one),
    )
    assert lettering.fallback_fonts(CHINESE) == ["Hanzi"]
    assert lettering.written(CHINESE[0]) == CHINESE[0]


def test_long_names_have_room_above_the_heat_map(tmp_path: Path) -> None:
    """Names of 30 letters: nothing of them is cut off at the top."""
    for count in (10, 100):
        parts, labels = split(count)
        names = [f"W{'m' * 27}{k:02}" for k in range(count)]
        draw_partition(tmp_path / "p.png", parts, labels, names)
        edge = pixels(tmp_path / "p.png")
        assert (edge[:2] == 255).all(), count
        assert (edge[:, -2:] == 255).all(), count


def chart_of(values: Sequence[float]) -> str:
    """A line through these values, as SVG."""
    chart = line_chart(
        [Series(name="a", points=list(enumerate(values)))],
        title="t", x_label="round", y_label="loss",
    )  # fmt: skip
    assert chart is not None
    return chart.svg


def test_the_name_of_an_axis_and_its_numbers_do_not_meet() -> None:
    """Numbers end left of the plot; the longer they are, the more room is between."""
    lefts = []
    for values in ((1.0, 2.0), (0.99981, 1.00052)):
        places = re.findall(r'<text[^>]* x="([0-9.]+)"[^>]*text-anchor: end', chart_of(values))
        lefts.append(min(map(float, places)))
    assert lefts[1] > lefts[0]
    assert lefts[1] >= 23 + 9 * len("1.0005")


def test_ticks_are_told_apart() -> None:
    """A loss of nearly 1, and bytes of a large model."""
    for values, wanted in (((1.0005, 0.9998), "1.0004"), ((100_000.0, 350_000.0), "200,000")):
        ticks = re.findall(r"<text[^>]*text-anchor: end[^>]*>([^<]+)</text>", chart_of(values))
        assert wanted in ticks
        assert len(set(ticks)) == len(ticks)


def test_a_font_of_boxes_is_no_font() -> None:
    """matplotlib brings one that has a box for every letter of Unicode."""
    lettering._families.cache_clear()
    assert all("Last Resort" not in family for family, _ in lettering._families())
