"""`fedpdm experiment`: cells that run, fail, are interrupted and go on, and its refusals."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedpdm.commands.experiment import add_experiment_parser, chosen_cells
from fedpdm.config import load_suite
from fedpdm.storage.holding import held
from tests.support.apart import run_apart, start_apart
from tests.support.command_line import call, forget_surroundings, without_advice
from tests.support.own_code import MODULE, write_module
from tests.support.refusals import tree

METHODS = Path(__file__).parents[2] / "experiments" / "methods"
SEVERAL = ("centralised", "alone", "ours")
SUITE: dict[str, Any] = {
    "title": "Small digits",
    "table": [*SEVERAL, "diverging"],
    "common": {
        "data": {"name": "digits", "max_images": 1100},
        "partition": {
            "kind": "majority_minority",
            "num_clients": 2,
            "majority_classes": 5,
            "majority_ratio": 5,
        },
        "privacy": {"clip_norm": 8},
        "coarse": {"preset": "nano", "batch_size": 16},
        "fine": {"preset": "nano", "batch_size": 16},
        "sampling": {"num_steps": 3, "per_class": 1},
        "evaluation": {
            "every": 5,
            "image_metrics": False,
            "features": "pixels",
            "num_images": 40,
            "num_reference": 355,
            "classifier_steps": 20,
        },
    },
    "profiles": {"smoke": {"rounds": 3, "steps": 36}},
    "ablations": {"epsilon": {"methods": ["ours"], "variants": {"1": {"privacy": {"epsilon": 1}}}}},
}
DIVERGING = {
    "title": "far too fast",
    "trust": "nothing is sent",
    "set": {"coarse": {"training": "none"}, "fine": {"lr": 1e30, "grad_clip": 1e30}},
}


def write_suite(folder: Path, **changes: Any) -> Path:
    """The small suite beside the committed methods, and one that diverges."""
    shutil.copytree(METHODS, folder / "methods", dirs_exist_ok=True)
    (folder / "methods" / "diverging.yaml").write_text(yaml.safe_dump(DIVERGING))
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch, tmp_path)
    write_suite(tmp_path)
    return tmp_path


def places(folder: Path) -> tuple[Any, ...]:
    """Options that keep runs and results under a folder."""
    return ("--runs", folder / "runs", "--results", folder / "results")


def methods(*names: str) -> list[str]:
    return [word for name in names for word in ("--method", name)]


def read(folder: Path, method: str, seed: int = 0) -> dict[str, Any]:
    path = folder / "results" / "small-smoke" / f"{method}-seed{seed}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """(folder, exit code, output, errors) of a first call with all methods, of which one fails."""
    folder = tmp_path_factory.mktemp("experiment")
    suite = write_suite(folder)
    done = run_apart("experiment", suite, "--jobs", "2", *places(folder), directory=folder)
    return folder, done.returncode, done.stdout, done.stderr


def test_variants_and_methods_asked_for_are_the_only_cells(folder: Path) -> None:
    variants = {str(value): {"privacy": {"epsilon": value}} for value in (1, 3, 10)}
    path = write_suite(folder, ablations={"epsilon": {"methods": ["ours"], "variants": variants}})
    parser = argparse.ArgumentParser()
    add_experiment_parser(parser.add_subparsers())
    words = ["experiment", str(path), "--ablation", "epsilon", "--seeds", "0,2"]
    options = parser.parse_args([*words, "--variant", "10", "--variant", "1", *methods("alone")])
    cells = chosen_cells(load_suite(path), options)
    assert [(cell.seed, cell.variant, cell.config.privacy.epsilon) for cell in cells] == [
        (0, "10", 10), (0, "1", 1), (2, "10", 10), (2, "1", 1)
    ]  # fmt: skip
    assert {cell.method for cell in cells} == {"alone"}
    everything = chosen_cells(load_suite(path), parser.parse_args(words))
    assert [cell.variant for cell in everything] == sorted(variants) * 2


def test_a_variant_that_changes_nothing_is_the_tables_own_cell(folder: Path) -> None:
    variants: dict[str, Any] = {"1": {"privacy": {"epsilon": 1}}, "as it is": {}}
    path = write_suite(folder, ablations={"epsilon": {"methods": ["ours"], "variants": variants}})
    parser = argparse.ArgumentParser()
    add_experiment_parser(parser.add_subparsers())
    suite, words = load_suite(path), ["experiment", str(path), "--seeds", "0"]
    own = chosen_cells(suite, parser.parse_args([*words, *methods("ours")]))
    ablation = chosen_cells(suite, parser.parse_args([*words, "--ablation", "epsilon"]))
    assert ablation[1:] == own
    assert ablation[0].folder == own[0].folder / "epsilon" / "1"


First = tuple[Path, int, str, str]


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_others_are_kept(first: First) -> None:
    folder, code, out, err = first
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("fedpdm: ")]
    assert len(lines) == 1
    words = (
        r"fedpdm: diverging seed 0 failed: round 1 fit: .*client 0 round 1 fine: "
        r"(loss|gradient) is (nan|inf) at step \d+.*"
    )
    assert re.fullmatch(words, lines[0]), lines[0]
    assert "Traceback" not in err
    names = {path.name for path in (folder / "results" / "small-smoke").iterdir()}
    assert names == {f"{method}-seed0.{kind}" for method in SEVERAL for kind in ("json", "npz")}
    assert "small, smoke: 4 cells, 0 done before" in out
    assert len(re.findall(r"\[\d/4\] \w+ seed 0: done", out)) == 3
    assert re.search(r"\[\d/4\] diverging seed 0: FAILED", out)
    assert re.search(r"  ours seed 0: round 3/3 ", out)
    table = out[out.index("Small digits, profile smoke") :]
    seeds = {line.split("  ")[0]: re.split(r"\s{2,}", line)[1:2] for line in table.splitlines()}
    assert seeds["non-collaborative"] == ["1"]
    assert seeds["far too fast"] == ["0"]
    assert seeds["real images of other clients"] == ["1"]
    assert "Gap closed, minority distance:" in table


@pytest.mark.slow
def test_what_a_result_says(first: First) -> None:
    folder = first[0]
    for method in SEVERAL:
        found = read(folder, method)
        assert (found["suite"], found["profile"]) == ("small", "smoke")
        assert (found["method"], found["seed"], found["ablation"]) == (method, 0, None)
        assert found["extractor"] == "pixel-32"
        assert found["images_per_group"] == 40
        assert found["config"]["run"]["rounds"] == 3
        assert found["config"]["data"]["root"] is None
        assert {"fedpdm", "flwr", "torch"} <= set(found["versions"])
        assert found["seconds"]["training"] > 0
        assert len(found["clients"]) == 1
        assert str(folder) not in json.dumps(found)  # nothing of this machine's folders
        pictures = folder / "results" / "small-smoke" / f"{method}-seed0.npz"
        with np.load(pictures) as arrays:
            assert arrays["minority"].shape == (20, 3, 8, 8)
    budget = {method: read(folder, method)["privacy"]["epsilon"] for method in SEVERAL}
    assert budget["centralised"] is None
    assert budget["alone"] == 0.0
    assert 9 < budget["ours"] <= 10
    traffic = {method: read(folder, method)["megabytes_per_client"] for method in SEVERAL}
    assert traffic["alone"] < 0.01 < traffic["ours"]
    # Real images are the same for all methods, and so are their scores.
    floors = [read(folder, m)["clients"][0]["groups"]["minority"]["floor"] for m in SEVERAL]
    assert all(floor == floors[0] for floor in floors)
    # The clients' stores are gone, the rest of the runs is there.
    runs = list((folder / "runs").glob("[!.]*"))
    assert len(runs) == 4
    for run in runs:
        assert (run / "log.txt").exists()
        assert (run / "clients").exists() == ("diverging" in run.name)


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last digits, which depend on the number of threads."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for first, second in zip(found, expected, strict=True):
            assert_same(first, second)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert found == expected


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    first: First, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = first[0]
    forget_surroundings(monkeypatch, folder)
    before = stamps(folder / "results"), stamps(folder / "runs")
    assert call("experiment", "small.yaml", *places(folder), *methods(*SEVERAL)) == 0
    out = capsys.readouterr().out
    assert "small, smoke: 3 cells, 3 done before" in out
    assert "done, about" not in out
    assert "Small digits, profile smoke" in out
    assert (stamps(folder / "results"), stamps(folder / "runs")) == before

    assert call("experiment", "small.yaml", *places(folder), "--table") == 0
    table = capsys.readouterr().out
    assert "cells" not in table
    assert table.strip() == out[out.index("Small digits") :].strip()
    assert (stamps(folder / "results"), stamps(folder / "runs")) == before


@pytest.mark.slow
def test_a_result_of_another_config_is_made_anew(
    first: First,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a copy. The models of the first call are gone, so the cell is trained once more, too."""
    folder = tmp_path / "copy"
    shutil.copytree(first[0], folder)
    forget_surroundings(monkeypatch, folder)
    before, place = read(folder, "alone"), folder / "results" / "small-smoke"
    other = {**before, "config": {**before["config"], "sampling": {"num_steps": 4}}}
    (place / "alone-seed0.json").write_text(json.dumps({**other, "clients": []}))
    others = {path: mtime for path, mtime in stamps(place).items() if "alone" not in path}
    # One cell; side by side with another, as in the first call, it has as many threads.
    arguments = (*places(folder), *methods("alone", "alone"), "--seeds", "0,0", "--jobs", "2")
    assert call("experiment", "small.yaml", *arguments) == 0
    out = capsys.readouterr().out
    assert "small, smoke: 1 cells, 0 done before" in out
    assert "[1/1] alone seed 0: done" in out
    after = read(folder, "alone")
    assert after["config"] == before["config"]
    assert_same(after["clients"], before["clients"])
    assert {path: mtime for path, mtime in stamps(place).items() if "alone" not in path} == others


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_from_its_checkpoint(first: First, tmp_path: Path) -> None:
    folder = tmp_path
    suite = write_suite(folder)
    # As many threads as in the undisturbed call.
    command = ("experiment", suite, "--method", "ours", "--jobs", "2", *places(folder))
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if "round 1/3" in line:
            process.interrupt()

    process = start_apart(*command, hear=hear)
    assert process.end() == 130
    assert process.errors[0].startswith("interrupted; nothing is lost")
    assert len(process.errors) == 1
    assert not any("FAILED" in line for line in lines)
    assert not (folder / "results").exists()
    (run,) = (folder / "runs").glob("[!.]*")
    log = (run / "log.txt").read_text()
    assert "round 1/3" in log
    assert "round 3/3" not in log  # the cell's own process has ended too

    done = run_apart(*command)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs").exists()
    assert [path.name for path in (folder / "runs").glob("[!.]*")] == [run.name]
    log = (run / "log.txt").read_text()
    assert re.search(r"resumed after round [12] of 3", log)
    assert log.count("round 1/3") == 1
    undisturbed, resumed = read(first[0], "ours"), read(folder, "ours")
    for name in ("privacy", "config", "megabytes_per_client"):
        assert resumed[name] == undisturbed[name], name
    assert_same(resumed["clients"], undisturbed["clients"])


def test_a_cell_that_another_process_runs_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_experiment_parser(parser.add_subparsers())
    words = ["experiment", str(folder / "small.yaml"), *map(str, places(folder))]
    chosen = parser.parse_args([*words, *methods("alone")])
    (cell,) = chosen_cells(load_suite(folder / "small.yaml"), chosen)
    with held(cell.working):
        assert call(*words, *methods("alone", "ours")) == 2
    error = without_advice(capsys.readouterr().err)
    assert f"{cell.working}: is in use by process {os.getpid()} since" in error
    assert not (folder / "results").exists()


# Refusals: exit code 2, one line, nothing written.

REFUSED = {
    "jobs": (("--jobs", "0"), r"--jobs: must be at least 1, got 0"),
    "seeds": (("--seeds", "0,one"), r"--seeds: must be whole numbers with commas, got '0,one'"),
    "no seeds": (("--seeds", ""), r"--seeds: must be whole numbers with commas, got ''"),
    "seed below 0": (("--seeds=-1,0",), r"--seeds: must be at least 0, got -1"),
    "method": (("--method", "hours"), r"method: must be one of alone-augmented, .*, got 'hours'"),
    "profile": (("--profile", "cpu"), r"profile: small has smoke, got 'cpu'"),
    "profile of a table": (
        ("--profile", "cpu", "--table"),
        r"profile: small has smoke, got 'cpu'",
    ),
    "ablation": (("--ablation", "clients"), r"ablation: small has epsilon, got 'clients'"),
    "variant": (
        ("--ablation", "epsilon", "--variant", "3"),
        r"variant: must be one of 1, got '3'",
    ),
    "variant of nothing": (("--variant", "1"), r"--variant: needs --ablation"),
    "key": (("--set", "fine.lrate=1"), r"fine\.lrate: unknown key"),
    "value": (("--set", "fine.lr=fast"), r"fine\.lr: must be float, got 'fast'"),
    "form": (("--set", "fine.lr"), r"--set 'fine\.lr': must have the form"),
    "split": (("--set", "partition.num_clients=2000"), r"num_clients .*got 2000"),
    "scores": (("--set", "evaluation.num_images=20"), r"num_images: .* at least 33 images, got 20"),
    "steps": (("--set", "run.rounds=200"), r"profiles\.smoke\.steps: 36 over 200 rounds leave no"),
}


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, str]:
    """(output, line on standard error) of a call that is refused and leaves no trace."""
    before = tree(folder)
    capsys.readouterr()
    assert call("experiment", *arguments) == 2
    printed = capsys.readouterr()
    said = without_advice(printed.err)
    assert said.startswith("fedpdm: ")
    assert said.count("\n") == 1
    assert tree(folder) == before
    return printed.out, said.removeprefix("fedpdm: ").strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = REFUSED[kind]
    _, line = refusal(folder, capsys, "small.yaml", *places(folder), *arguments)
    assert re.search(words, line), line


def test_missing_suite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, line = refusal(folder, capsys, "nowhere.yaml")
    assert re.search(r"nowhere\.yaml: cannot be read: No such file", line)


def test_single_run_is_no_suite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "single.yaml").write_text("run: {rounds: 2}\n")
    _, line = refusal(folder, capsys, "single.yaml")
    assert line == "single.yaml: run: unknown key"


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-batches-py/data_batch_1"), ("mnist", "MNIST/raw/train-images-idx3")],
)
def test_missing_data_set(
    folder: Path, name: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = folder / "empty"
    empty.mkdir()
    arguments = ("small.yaml", *places(folder), "--set", f"data.name={name}", "--data-dir", empty)
    _, line = refusal(folder, capsys, *arguments)
    assert line.startswith(f"data.root: {name} misses {file}")
    assert f"in {empty};" in line
    assert "FEDPDM_DATA" in line


def test_data_folder_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDPDM_DATA", "elsewhere")
    _, line = refusal(folder, capsys, "small.yaml", "--set", "data.name=mnist")
    assert f"in {folder / 'elsewhere'};" in line


@pytest.mark.slow
def test_a_method_takes_a_strategy_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(folder)
    own = f"aggregation.method={MODULE}:PlainMean"
    arguments = ("experiment", "small.yaml", *places(folder), *methods("ours-federated"))
    assert call(*arguments, "--set", own, "--set", "run.rounds=1", "--keep") == 0
    assert (
        read(folder, "ours-federated")["config"]["aggregation"]["method"] == f"{MODULE}:PlainMean"
    )
    (run,) = (folder / "runs").glob("[!.]*")
    assert json.loads((run / "metrics.json").read_text())["rounds"][0]["moved"] > 0


@pytest.mark.parametrize("name", ["nowhere_at_all:Mine", "json:dumps", "json:", "json:Nothing"])
def test_a_strategy_that_is_not_there_is_refused_before_any_cell(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"aggregation.method='{name}'"
    _, line = refusal(
        folder, capsys, "small.yaml", *places(folder), *methods("ours-federated"), "--set", key
    )
    assert line.startswith(f"aggregation.method: '{name}'")


def test_table_of_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    assert call("experiment", "small.yaml", *places(folder), "--table") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(("non-coll", "ours", "central"))]
    assert len(lines) == 3
    assert all(re.split(r"\s{2,}", line)[1:4] == ["0", "-", "-"] for line in lines)
    assert tree(folder) == before
