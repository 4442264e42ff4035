"""Scores of a finished run's samples beside real images, the hand-over curve, `fedpdm evaluate`."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpdm.evaluation.scoring
from fedpdm.config import RunConfig, config_to_yaml
from fedpdm.data import ImageSet
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.assessment import assess_run, check_scoring, handover_curve
from fedpdm.evaluation.features import TrainedFeatures, train_feature_network
from fedpdm.storage.files import read_json, read_tensors, write_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import call, forget_surroundings, without_advice
from tests.support.federations import small_config

NUM = 40
CONFIG = small_config(
    run={"rounds": 1},
    data={"max_images": 1100},
    partition={"num_clients": 2},
    coarse={"steps_per_round": 1},
    fine={"steps_per_round": 1},
    evaluation={
        "image_metrics": False,
        "num_images": NUM,
        "num_reference": 355,
        "classifier_steps": 60,
    },
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that trained one step: its models have learnt nothing."""
    root = tmp_path_factory.mktemp("run") / "untrained"
    run_in_process(CONFIG, root)
    return RunDirectory(root)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def assessed(run: RunDirectory) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return assess_run(run, clients=(0, 1), say=silent)


def with_config(run: RunDirectory, root: Path, config: RunConfig) -> RunDirectory:
    """A copy of a run that says it was made with `config`: its files do not say with which."""
    shutil.copytree(run.root, root)
    (root / "config.yaml").write_text(config_to_yaml(config))
    for path in root.rglob("*.json"):
        path.write_text(json.dumps(read_json(path)))
    for path in (root / "coarse.safetensors", *root.rglob("fine.safetensors")):
        write_tensors(path, *read_tensors(path))
    return RunDirectory(root)


@pytest.mark.slow
def test_real_images_score_better_than_an_untrained_model(
    assessed: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    result, _ = assessed
    assert result["extractor"] == "pixel-32"
    assert result["classifier_accuracy"] is None
    assert (result["method"], result["images_per_group"]) == ("run", NUM)
    assert [client["client_id"] for client in result["clients"]] == [0, 1]
    for client in result["clients"]:
        assert set(client["groups"]) == {"majority", "minority"}
        for group, record in client["groups"].items():
            scores, floor = record["scores"], record["floor"]
            assert set(scores) == set(floor)
            for name in ("frechet[pixel-32]", "frechet_infinity[pixel-32]", "kernel[pixel-32]"):
                assert scores[f"{group}_{name}"] > 2 * floor[f"{group}_{name}"], name
            for name in ("precision[pixel-32]", "recall[pixel-32]", "coverage[pixel-32]"):
                assert scores[f"{group}_{name}"] < floor[f"{group}_{name}"], name
        assert 0.0 <= client["downstream"]["synthetic_downstream_worst_group"] <= 1.0
        # Ten classes, and images that show nothing of them.
        assert client["downstream"]["synthetic_downstream_accuracy"] < 0.5
    json.dumps(result, allow_nan=False)  # plain data


def test_counts_of_own_images(
    run: RunDirectory, assessed: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    images = load_split(CONFIG, "train")
    for part, client in zip(build_partitions(CONFIG, images), assessed[0]["clients"], strict=True):
        counts = np.bincount(images.labels[part.indices], minlength=10)
        own = {group: record["num_own"] for group, record in client["groups"].items()}
        heldout = CONFIG.data.holdout_fraction
        assert sum(own.values()) == client["num_train"]
        assert client["num_train"] == pytest.approx((1 - heldout) * len(part.indices), rel=0.02)
        for group, classes in (("majority", part.majority), ("minority", part.minority)):
            assert client["groups"][group]["classes"] == list(classes)
            assert own[group] <= counts[list(classes)].sum()
        assert own["majority"] > 3 * own["minority"]


def test_pictures_of_the_first_client(
    assessed: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    result, pictures = assessed
    train = load_split(CONFIG, "train")
    held = {image.tobytes() for image in train.images}
    for group in ("majority", "minority"):
        classes = result["clients"][0]["groups"][group]["classes"]
        assert pictures[group].shape == (20, 3, 8, 8)
        assert pictures[group].dtype == np.uint8
        np.testing.assert_array_equal(pictures[f"{group}_labels"], np.repeat(classes, 4))
        assert all(image.tobytes() in held for image in pictures[f"real_{group}"])
        assert not any(image.tobytes() in held for image in pictures[group])


def test_hand_over_at_0_is_the_floor(
    run: RunDirectory, assessed: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    curve = handover_curve(run, client=1, levels=(0, 900), say=silent)
    assert [(point["group"], point["t"]) for point in curve] == [
        ("majority", 0), ("majority", 900), ("minority", 0), ("minority", 900),
    ]  # fmt: skip
    floors = assessed[0]["clients"][1]["groups"]
    for point in curve:
        group = point["group"]
        if point["t"] == 0:
            assert point["scores"] == floors[group]["floor"]  # exactly
        else:  # an untrained model cannot bring them back
            name = f"{group}_frechet[pixel-32]"
            assert point["scores"][name] > 2 * floors[group]["floor"][name]


@pytest.mark.slow
def test_alone_samples_with_the_fine_model_only(
    run: RunDirectory, assessed: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    alone, pictures = assess_run(run, method="alone", say=silent)
    both = assessed[0]["clients"][0]
    assert alone["method"] == "alone"
    for group, record in alone["clients"][0]["groups"].items():
        assert record["floor"] == both["groups"][group]["floor"]
        assert record["scores"] != both["groups"][group]["scores"]
    assert not np.array_equal(pictures["majority"], assessed[1]["majority"])


@pytest.mark.slow
def test_features_of_a_network_trained_on_images_that_no_client_holds(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = dataclasses.replace(
        CONFIG.evaluation, features="trained", num_public=300, num_images=70
    )
    other = with_config(run, tmp_path / "run", dataclasses.replace(CONFIG, evaluation=evaluation))
    seen: list[ImageSet] = []

    def train(images: ImageSet, **options: Any) -> TrainedFeatures:
        seen.append(images)
        return train_feature_network(images, **options, num_steps=300)

    monkeypatch.setattr(fedpdm.evaluation.scoring, "train_feature_network", train)
    said: list[str] = []
    result, _ = assess_run(other, cache=tmp_path / "cache", say=said.append)
    train_images = load_split(CONFIG, "train")
    held = {image.tobytes() for image in train_images.images}
    public = [image.tobytes() for image in seen[0].images]
    assert len(public) == 300
    assert not held & set(public)
    assert result["extractor"] == "trained-64"
    assert result["classifier_accuracy"] > 0.7
    assert re.fullmatch(r"feature network: accuracy [01]\.\d+ on 30 public images", said[0])
    for group, record in result["clients"][0]["groups"].items():
        name = f"{group}_class_fidelity[trained-64]"
        # The network knows real digits, and an untrained model draws none.
        assert record["floor"][name] > 0.7
        assert record["scores"][name] < 0.5
        name = f"{group}_frechet[trained-64]"
        assert record["scores"][name] > 2 * record["floor"][name]


# The command.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_evaluate_prints_and_writes(
    run: RunDirectory,
    folder: Path,
    assessed: tuple[dict[str, Any], dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = folder / "scores.json"
    assert call("evaluate", run.root, "--clients", "1", "--out", out) == 0
    written = json.loads(out.read_text())
    # The same scores again, whichever other clients are asked.
    assert written["clients"] == json.loads(json.dumps(assessed[0]["clients"][1:]))
    lines = capsys.readouterr().out.splitlines()
    for client in written["clients"]:
        for group, record in client["groups"].items():
            where = f"client {client['client_id']} {group}"
            at = lines.index(f"{where}, {record['num_own']} own images")
            for line, scores in ((lines[at + 1], "scores"), (lines[at + 2], "floor")):
                value = record[scores][f"{group}_frechet[pixel-32]"]
                assert f"frechet[pixel-32] {value:.3g}" in line
            assert lines[at + 1].startswith("  samples ")
            assert lines[at + 2].startswith("  real images ")
        accuracy = client["downstream"]["synthetic_downstream_accuracy"]
        assert f"  synthetic downstream accuracy {accuracy:.3f}" in lines
    assert lines[-1] == f"written to {out}"


def test_evaluate_the_hand_over(
    run: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "curve.json"
    assert call("evaluate", run.root, "--handover", "0,500", "--num", 45, "--out", out) == 0
    points = json.loads(out.read_text())
    assert [(p["group"], p["t"]) for p in points] == [
        ("majority", 0), ("majority", 500), ("minority", 0), ("minority", 500),
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if re.match(r"(majority|minority) ", line)]
    for line, point in zip(lines, points, strict=True):
        value = point["scores"][f"{point['group']}_frechet[pixel-32]"]
        assert f"t = {point['t']:>4}  frechet[pixel-32] {value:.3g}" in line


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The line on standard error of an evaluation that is refused."""
    capsys.readouterr()
    assert call("evaluate", *arguments) == 2
    error = without_advice(capsys.readouterr().err)
    assert error.startswith("fedpdm: ")
    assert error.count("\n") == 1
    return error.removeprefix("fedpdm: ").strip()


REFUSED = {
    "clients": (("--clients", "0,x"), r"--clients: must be whole numbers with commas, got '0,x'"),
    "client": (("--clients", "2"), r"partition\.num_clients: 2, but there is a client 2"),
    "below 0": (("--clients=-1",), r"there is a client -1"),
    "no images": (("--num", "0"), r"number of images must be at least 1, got 0"),
    "less than none": (("--num", "-3"), r"number of images must be at least 1, got -3"),
    "few images": (
        ("--num", "20"),
        r"client 0, majority, real images of other clients: evaluation\.num_images: .* d=32 "
        r"features needs at least 33 images, got 20",
    ),
    "levels": (("--handover", "0,high"), r"--handover: must be whole numbers .*got '0,high'"),
    "level": (("--handover", "1001"), r"t must be in \[0, 1000\], got 1001"),
    "level below 0": (("--handover=-1",), r"t must be in \[0, 1000\], got -1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(
    run: RunDirectory, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = REFUSED[kind]
    line = refusal(capsys, run.root, *arguments)
    assert re.search(words, line), line


def only_config(folder: Path, config: RunConfig) -> Path:
    """A run that has begun and not finished."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return folder


def test_every_image_is_held(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, max_images=None),
        evaluation=dataclasses.replace(CONFIG.evaluation, features="trained"),
    )
    line = refusal(capsys, only_config(folder / "run", config))
    assert line == (
        "data.max_images: every training image is held by a client; set it below 1442 to leave "
        "public ones, got none"
    )


def test_run_that_is_not_there_or_not_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, folder / "nowhere")
    assert re.search(r"nowhere: is not a run directory \(config\.yaml is missing\)", line)
    line = refusal(capsys, only_config(folder / "run", CONFIG))
    assert re.search(r"run: this run has not finished \(coarse\.safetensors is missing\)", line)


def test_deployed_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, simulation=False))
    line = refusal(capsys, only_config(folder / "run", config))
    assert line.startswith("run.simulation: false; only a simulation's images can be scored here")


def test_few_real_images_are_named_before_anything_is_drawn(
    run: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other clients hold too few for the floor, whatever `num_images` says."""
    few = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, max_images=240))
    other = with_config(run, folder / "run", few)
    line = refusal(capsys, other.root, "--num", 500)
    assert re.search(r"client 0, m\w+ority, real images of other clients: .* 33 images, got", line)
    assert "client 0, majority: 500" not in capsys.readouterr().out


def test_group_without_reference_images(
    run: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = dataclasses.replace(CONFIG.evaluation, num_reference=8)
    other = with_config(run, folder / "run", dataclasses.replace(CONFIG, evaluation=few))
    line = refusal(capsys, other.root)
    words = r"evaluation\.num_reference: classes \(.*\) need at least 6 reference images, got \d"
    assert re.search(words, line), line


def test_method_that_the_run_has_not(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="method must be run or alone, got 'coarse'"):
        assess_run(run, method="coarse", say=silent)


UNSCORABLE = {
    "no public images": ({"max_images": None}, {"features": "trained"}, r"held by a client; set"),
    "few public images": ({"max_images": 1440}, {"features": "trained"}, r"needs at least 20 im"),
    "few samples": ({}, {"num_images": 20}, r"0, majority: evaluation.num_images: .* 33 im.* 20$"),
    "few others": ({"max_images": 240}, {"num_images": 50}, r"real images of other clients: .* 33"),
    "few test images": ({}, {"num_reference": 8}, r"classes \(.*\) need at least 6 reference im"),
}


@pytest.mark.parametrize("kind", UNSCORABLE)
def test_what_cannot_be_scored_is_refused_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("FEDPDM_CACHE", str(folder / "cache"))
    data, evaluation, words = UNSCORABLE[kind]
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, **data),
        evaluation=dataclasses.replace(CONFIG.evaluation, **evaluation),
    )
    with pytest.raises(ValueError, match=words):
        check_scoring(config, clients=(0, 1), say=silent)


def test_what_can_be_scored_is_not_refused() -> None:
    check_scoring(CONFIG, clients=(0, 1), say=silent)
