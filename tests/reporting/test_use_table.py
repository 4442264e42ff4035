"""The table of a client's own classifier, and precision against recall by length of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedpdm.config import load_suite
from fedpdm.reporting.use_table import draw_lengths, use_table
from tests.reporting.test_results import folder  # noqa: F401


def result(method: str, seed: int, **use: tuple[float, float]) -> dict[str, Any]:
    rows = {name: {"minority": a, "mean": b} for name, (a, b) in use.items()}
    lengths = [
        {
            "share": share,
            "group": "minority",
            "scores": {"minority_recall[f]": share * 0.5, "minority_precision[f]": 1 - share * 0.5},
        }
        for share in (0.5, 1.0)
    ]
    return {"method": method, "seed": seed, "extractor": "f",
            "clients": [{"use": rows, "lengths": lengths}]}  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_rows_and_values(folder: Path) -> None:  # noqa: F811
    suite = load_suite(folder / "toy.yaml")
    found = [
        result("alone", 0, own=(0.8, 0.9), samples=(0.7, 0.85), others=(0.96, 0.98)),
        result("alone", 1, own=(0.84, 0.92), samples=(0.7, 0.85)),
        result("ours", 0, samples=(0.9, 0.95), gaussians=(0.91, 0.93), together=(0.923, 0.956)),
    ]
    table = use_table(suite, suite.table, found)
    assert table is not None
    head, body = table
    assert head == ["trained on", "seeds", "minority classes", "all classes"]
    assert body == [
        ["own images alone", "2", "82.0 ± 2.8", "91.0 ± 1.4"],
        ["own images and samples: solo", "2", "70.0 ± 0.0", "85.0 ± 0.0"],
        ["own images and samples: our own", "1", "90.0", "95.0"],
        ["no network: the Gaussians of our own as a classifier", "1", "91.0", "93.0"],
        ["own images alone, and the Gaussians of our own", "1", "92.3", "95.6"],
        ["own images and real images of others", "1", "96.0", "98.0"],
    ]
    assert use_table(suite, suite.table, [{"method": "alone", "seed": 0, "clients": [{}]}]) is None


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_figure_is_drawn_where_there_are_lengths(folder: Path) -> None:  # noqa: F811
    suite = load_suite(folder / "toy.yaml")
    stem = folder / "curve"
    assert not draw_lengths(suite, suite.table, [{"method": "alone", "clients": [{}]}], stem)
    assert not stem.with_suffix(".png").exists()
    assert draw_lengths(suite, suite.table, [result("alone", 0), result("ours", 0)], stem)
    with Image.open(stem.with_suffix(".png")) as image:
        assert min(image.size) > 200
