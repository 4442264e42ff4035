"""Cells whose methods share an own model: what they hold, and that they differ above it alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedpdm.config import ConfigError, Suite, load_suite
from fedpdm.suites.cell import Cell, finished, run_cell
from fedpdm.suites.planning import plan_cells
from tests.commands.test_experiment_command import METHODS, SUITE
from tests.support.made_once import made_once

pytestmark = pytest.mark.slow

TABLE = ("alone", "alone-early", "ours", "statistics", "others-refined")


def suite_in(folder: Path) -> Suite:
    """Small digits, five methods that share own models of three rounds."""
    shutil.copytree(METHODS, folder / "methods", dirs_exist_ok=True)
    small = json.loads(json.dumps(SUITE))
    small["common"]["data"]["holdout_fraction"] = 0.2
    small["common"]["fine"]["clipped_fraction"] = 0.0
    small["common"]["evaluation"]["classifier_steps"] = 5
    small["table"] = [*TABLE, "feddm"]
    fixed = {"handover": 150, "fine_labels": False, "candidates": 1}  # a choice takes its time
    small["methods"] = {"statistics": {"sampling": fixed}}
    small["profiles"] = {
        "shared": {"rounds": 3, "steps": 36, "shared_steps": 6, "first_seed": 4, "table": [*TABLE]},
        "plain": {"rounds": 3, "steps": 36},
        "drawn": {
            "rounds": 3, "steps": 36, "shared_steps": 6, "first_seed": 4, "seeds": 2, "draws": 3,
            "table": [*TABLE],
        },
    }  # fmt: skip
    small["ablations"] = {
        "budget": {
            "methods": ["alone", "ours"],
            "variants": {"1": {"privacy": {"epsilon": 1}}, "10": {}},
        },
        "other": {"methods": ["alone", "ours"], "variants": {"10": {}}},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    return load_suite(folder / "small.yaml")


def cells_of(folder: Path, profile: str = "shared", **options: Any) -> list[Cell]:
    return plan_cells(
        suite_in(folder), profile, overrides={}, runs=folder / "runs", results=folder / "results",
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(folder, results by method) of all five cells."""

    def make(folder: Path) -> None:
        for cell in cells_of(folder):
            run_cell(cell)

    folder = made_once(tmp_path_factory, "shared-own", make)
    results = {}
    for path in sorted((folder / "results" / "small-shared").glob("*.json")):
        found = json.loads(path.read_text())
        results[found["method"]] = found
    return folder, results


Made = tuple[Path, dict[str, dict[str, Any]]]


def test_one_own_model_serves_all_and_cells_are_done_once(made: Made) -> None:
    folder, results = made
    assert set(results) == set(TABLE)
    kept = sorted(path.name for path in (folder / "runs" / "own-models").iterdir() if path.is_dir())
    assert len(kept) == 1
    cells = cells_of(folder)
    assert [cell.seed for cell in cells] == [4] * len(TABLE)
    for cell in cells:
        assert finished(cell)


def test_what_each_cell_says_of_use(made: Made) -> None:
    _, results = made
    rows = {name: set(r["clients"][0]["use"]) - {"recipe"} for name, r in results.items()}
    assert rows == {
        "alone": {"samples", "own", "others"},
        "alone-early": {"samples"},
        "ours": {"samples"},
        "statistics": {"samples", "gaussians", "together"},
        "others-refined": {"samples"},
    }
    for found in results.values():
        for name, row in found["clients"][0]["use"].items():
            if name != "recipe":
                assert 0.0 <= row["minority"] <= 1.0
                assert 0.0 <= row["mean"] <= 1.0
        assert [point["share"] for point in found["clients"][0]["lengths"]] == [1 / 3, 1.0]
    gaussians = results["statistics"]["clients"][0]["use"]["gaussians"]
    assert gaussians["mean"] > 0.5  # of real digits, ten classes: chance is 0.1


def test_what_is_sent_and_promised(made: Made) -> None:
    _, results = made
    for name, epsilon in (("alone", 0), ("alone-early", 0), ("others-refined", None)):
        assert results[name]["privacy"]["epsilon"] == epsilon
        assert results[name]["megabytes_per_client"] == 0.0
    for name in ("ours", "statistics"):
        assert 9.0 < results[name]["privacy"]["epsilon"] <= 10.0
        assert results[name]["megabytes_per_client"] > 0.0
    assert results["alone"]["clients"][0]["own_model_rounds"] == 3
    assert 1 <= results["alone-early"]["clients"][0]["own_model_rounds"] <= 3


def test_real_images_refined_are_nearer_to_real_ones(made: Made) -> None:
    """Noised to t = 150 and refined by a model of 36 steps: far better than from pure noise."""
    _, results = made

    def distance(name: str) -> float:
        scores = results[name]["clients"][0]["groups"]["minority"]["scores"]
        return float(next(v for k, v in scores.items() if k.startswith("minority_frechet[")))

    assert distance("others-refined") < 0.8 * min(distance("statistics"), distance("alone"))


def test_pictures_show_its_own_images(made: Made) -> None:
    folder, _ = made
    with np.load(folder / "results" / "small-shared" / "statistics-seed4.npz") as arrays:
        assert {"own_majority", "own_minority", "minority", "real_minority"} <= set(arrays)
        assert arrays["own_minority"].dtype == np.uint8


def test_an_ablation_with_draws_is_made_on_the_first_seed(tmp_path: Path) -> None:
    """Draws of the table's own cells serve all ablations; a cell without noise has one."""

    def named(ablation: str) -> list[str]:
        cells = cells_of(tmp_path, "drawn", ablation=ablation)
        assert {cell.seed for cell in cells} == {4}
        assert all(cell.config.privacy.noise_draw == cell.draw for cell in cells)
        assert len({cell.run_directory for cell in cells}) == len(cells)
        base = tmp_path / "results" / "small-drawn"
        return sorted(str(cell.result.relative_to(base)) for cell in cells)

    plain = [
        "alone-seed4.json", "draws/ours-seed4-draw1.json", "draws/ours-seed4-draw2.json",
        "ours-seed4.json",
    ]  # fmt: skip
    assert named("budget") == sorted(
        [*plain, *(f"budget/1/{name.removeprefix('draws/')}" for name in plain)]
    )
    assert named("other") == plain
    table = cells_of(tmp_path, "drawn")
    assert {(cell.seed, cell.draw) for cell in table} == {(4, 0), (5, 0)}
    asked = cells_of(tmp_path, "drawn", ablation="other", seeds=[7])
    assert {cell.seed for cell in asked} == {7}


def test_a_drawn_cell_has_the_own_model_of_the_first_draw(made: Made) -> None:
    folder, _ = made
    kept = sorted((folder / "runs" / "own-models").iterdir())
    drawn = next(c for c in cells_of(folder, "drawn", ablation="other") if c.draw == 1)
    result = run_cell(drawn)
    assert sorted((folder / "runs" / "own-models").iterdir()) == kept
    assert (result["seed"], result["draw"]) == (4, 1)
    assert drawn.title == "ours seed 4 draw 1"
    assert finished(drawn)
    assert result["config"]["privacy"]["noise_draw"] == 1


def test_rows_that_need_shared_own_models_are_refused_elsewhere(tmp_path: Path) -> None:
    for method in ("alone-early", "others-refined"):
        words = f"method {method}: needs a profile with shared_steps"
        with pytest.raises(ConfigError, match=words):
            cells_of(tmp_path, "plain", methods=[method])
    with pytest.raises(ConfigError, match=r"shared_steps: feddm has no own models"):
        cells_of(tmp_path, methods=["feddm"])
