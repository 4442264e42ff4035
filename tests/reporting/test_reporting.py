"""What a run tells: log, pictures, closing summary."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.reporting.run_files import (
    RunLog,
    draw_samples,
    draw_split,
    finish_run,
    metrics_table,
    summarise,
)
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.federations import small_config

CONFIG = small_config()


def test_log_goes_to_the_screen_and_with_the_time_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").write_text("before\n")
    log = RunLog(RunDirectory(tmp_path))
    log.say("first")
    log.say("zweitens: ε = 3")
    assert capsys.readouterr().out == "first\nzweitens: ε = 3\n"
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before"  # a resumed run goes on in the same log
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  first", lines[1])
    assert lines[2].endswith("  zweitens: ε = 3")


def test_split_is_drawn_and_written_down(tmp_path: Path) -> None:
    images = load_split(CONFIG, "train")
    partitions = build_partitions(CONFIG, images)
    draw_split(RunDirectory(tmp_path), CONFIG, partitions, images)
    with Image.open(tmp_path / "partition.png") as picture:
        assert min(picture.size) > 50
    rows = [line.split() for line in (tmp_path / "partition.txt").read_text().splitlines()]
    totals = {row[0]: int(row[-1]) for row in rows if row[0] in ("0", "1", "2", "total")}
    assert totals == {str(p.client_id): len(p) for p in partitions} | {"total": 240}


# Samples.


def store_samples(run: RunDirectory, client: int, **changes: Any) -> None:
    labels = np.repeat(np.arange(10), 2)
    shape = (20, 3, 8, 8)
    grey = {"coarse": 40, "pfdm": 120, "alone": 200}
    arrays = {name: np.full(shape, level, np.uint8) for name, level in grey.items()}
    arrays = {"labels": labels, **arrays, **changes}
    store = ClientStore(run.client_path(client))
    store.save_samples({name: array for name, array in arrays.items() if array is not None})


def drawn(root: Path, clients: range, **changes: Any) -> np.ndarray:
    """The picture of some clients' samples, as grey values (H, W)."""
    run = RunDirectory(root)
    for client in clients:
        store_samples(run, client, **changes)
    config = small_config(partition={"num_clients": 6})
    assert draw_samples(run, config)
    with Image.open(root / "samples.png") as picture:
        return np.asarray(picture.convert("L"))


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_samples(RunDirectory(tmp_path), CONFIG) is False
    assert list(tmp_path.iterdir()) == []


def test_a_row_per_client_and_method(tmp_path: Path) -> None:
    """Uniform grey samples can be counted: each method's level covers the same area."""
    picture = drawn(tmp_path, range(2))
    areas = [int((picture == level).sum()) for level in (40, 120, 200)]
    assert min(areas) > 1000
    assert max(areas) < 1.2 * min(areas)
    without = drawn(tmp_path / "without", range(2), alone=None)
    assert (without == 200).sum() < 0.1 * areas[2]
    assert without.shape[0] < picture.shape[0]


@pytest.mark.slow
def test_at_most_four_clients_are_shown(tmp_path: Path) -> None:
    heights = {n: drawn(tmp_path / str(n), range(n)).shape[0] for n in (1, 4, 6)}
    assert heights[1] < heights[4] == heights[6]


def test_a_client_without_samples_is_passed_over(tmp_path: Path) -> None:
    """Not every client takes part, and its store may not be here."""
    assert drawn(tmp_path / "1", range(1, 3)).shape == drawn(tmp_path / "0", range(2)).shape


# Metrics.


def row_of(table: list[str], *start: str) -> str:
    """The cells of the one row that begins with some words, one blank between them."""
    rows = [line.split() for line in table if line.split()[: len(start)] == list(start)]
    (row,) = rows
    return " ".join(row[len(start) :])


def client_metrics(client_id: int, base: float, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"client_id": client_id}
    for group, plus in (("majority", 0.0), ("minority", 10.0)):
        for index, method in enumerate(("pfdm", "alone", "own")):
            values[f"{group}_{method}_frechet"] = base + plus + index
            values[f"{group}_{method}_class_fidelity"] = 0.1 * (index + 1)
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def test_table_has_a_row_per_client_and_group_and_their_means() -> None:
    table = metrics_table([client_metrics(0, 1.0), client_metrics(1, 3.0)])
    assert row_of(table, "client", "0", "majority") == "1.00 2.00 3.00 0.10 0.20 0.30"
    assert row_of(table, "client", "1", "minority") == "13.00 14.00 15.00 0.10 0.20 0.30"
    assert row_of(table, "mean", "majority") == "2.00 3.00 4.00 0.10 0.20 0.30"
    assert row_of(table, "mean", "minority") == "12.00 13.00 14.00 0.10 0.20 0.30"
    assert "not FID" in "\n".join(table)


def test_missing_cells_are_marked_and_left_out_of_the_mean() -> None:
    gap = {"minority_own_frechet": None, "minority_own_class_fidelity": None}
    table = metrics_table([client_metrics(0, 1.0, **gap), client_metrics(1, 3.0)])
    assert row_of(table, "client", "0", "minority") == "11.00 12.00 - 0.10 0.20 -"
    assert row_of(table, "mean", "minority") == "12.00 13.00 15.00 0.10 0.20 0.30"
    both = metrics_table([client_metrics(0, 1.0, **gap), client_metrics(1, 3.0, **gap)])
    assert row_of(both, "mean", "minority") == "12.00 13.00 - 0.10 0.20 -"
    assert "nan" not in "\n".join([*table, *both])


def test_columns_line_up() -> None:
    gap = {"majority_alone_frechet": None, "majority_own_class_fidelity": None}
    table = metrics_table([client_metrics(0, 1.0, **gap), client_metrics(10, 123.0)])
    rows = [line for line in table if line.startswith(("  client", "  mean"))]
    assert len({len(line) for line in rows}) == 1


def test_one_client_has_no_mean_and_no_client_no_table() -> None:
    assert not any("mean" in line for line in metrics_table([client_metrics(0, 1.0)]))
    assert metrics_table([]) == []
    assert metrics_table([{"client_id": 0, "heldout_coarse_loss": 1.0}]) == []


# The end of a run.


def finish(root: Path, config: RunConfig, clients: list[dict[str, Any]]) -> RunDirectory:
    run = RunDirectory(root)
    run.open(config, resume=False)
    history = {"rounds": [], "final": {"heldout_coarse_loss": 0.98765, "clients": clients}}
    store_samples(run, 0)
    finish_run(run, set_up(config), RunLog(run), [], {"w": torch.ones(2)}, history)
    return run


def test_finished_run_leaves_its_results(tmp_path: Path) -> None:
    run = finish(tmp_path, CONFIG, [client_metrics(0, 1.0)])
    assert torch.equal(read_tensors(tmp_path / "coarse.safetensors")[0]["w"], torch.ones(2))
    privacy = run.read_json("privacy.json")
    assert privacy["epsilon"] <= privacy["epsilon_requested"] == 10.0
    assert privacy["epsilon_paper_bound"] > privacy["epsilon"]
    assert privacy["releases_per_image"] == 1
    words = (tmp_path / "privacy.txt").read_text()
    assert "THIS IS A SIMULATION" in words
    assert f"epsilon = {privacy['epsilon']:.4g} at delta = 1e-05" in words
    assert all(line in words for line in privacy["does_not_protect"])
    assert run.read_json("metrics.json")["final"]["clients"][0]["client_id"] == 0
    assert (tmp_path / "samples.png").exists()
    assert summarise(run).splitlines()[1] in (tmp_path / "log.txt").read_text()


def test_summary_says_what_is_promised_and_what_is_not(tmp_path: Path) -> None:
    run = finish(tmp_path, CONFIG, [client_metrics(0, 1.0)])
    told, privacy = summarise(run), run.read_json("privacy.json")
    assert f"({privacy['epsilon']:.4g}, 1e-05)-locally differentially private" in told
    assert f"t0 = {privacy['t0']}, clip norm 8 around -1" in told
    assert f"bound would say {privacy['epsilon_paper_bound']:.4g}" in told
    assert "Not covered: labels, counts, metrics on raw data, fine models" in told
    assert "SIMULATION: the noise is seeded" in told
    assert f"epsilon {privacy['group_epsilon']['2']:.4g} for 2" in told
    assert "held-out releases: 0.9877" in told
    assert "then the client's fine model; trained as 'ours' in fedpdm experiment (not as" in told
    assert str(tmp_path) in told
    assert "samples.png" in told
    assert "partition.png" not in told  # only what is there is listed


def test_summary_of_a_deployed_run(tmp_path: Path) -> None:
    """The server draws no client's samples, even if a directory of them happens to be there."""
    config = dataclasses.replace(
        CONFIG,
        run=dataclasses.replace(CONFIG.run, simulation=False),
        evaluation=dataclasses.replace(CONFIG.evaluation, image_metrics=False),
    )
    run = finish(tmp_path, config, [{"client_id": 0, "heldout_coarse_loss": 1.0}])
    told = summarise(run)
    assert not (tmp_path / "samples.png").exists()
    assert "SIMULATION" not in told
    assert "No image metrics: they are of raw images, which stay at the partic" in told
    assert "SIMULATION" not in (tmp_path / "privacy.txt").read_text()
    assert "operating-system" in run.read_json("privacy.json")["noise_source"]


def test_no_summary_before_the_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.open(CONFIG, resume=False)
    run.write_json("metrics.json", {"rounds": []})
    with pytest.raises(ConfigError, match=r"privacy\.json: is missing; the run has not got that"):
        summarise(run)
