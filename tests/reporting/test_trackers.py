"""Trackers: what they are shown, read back from their files; never in a run's way."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpdm.config import ConfigError, RunConfig
from fedpdm.engines.inprocess import run_in_process
from fedpdm.engines.preflight import check_run
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.reporting.pictures.tiles import tile_images
from fedpdm.reporting.trackers import RunTrackers, check_trackers, open_trackers
from fedpdm.reporting.trackers.following import flat_record
from fedpdm.reporting.trackers.pictures import final_pictures, round_pictures
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.storage.tensorfile import pack
from strategies.rounds import RoundBook
from tests.support.command_line import CONFIG
from tests.support.federations import small_config

RECORD = {
    "round": 2,
    "coarse_loss": 0.5,
    "bytes_up": 1000,
    "heldout_coarse_loss": math.nan,
    "note": "words",
    "flag": True,
    "clients": [
        {"client_id": 0, "fine_loss": 0.25},
        {"client_id": 7, "fine_loss": 0.75, "seconds": math.inf},
    ],
    "failed": ["client 3: gone"],
}
FLAT = {
    "coarse_loss": 0.5,
    "bytes_up": 1000.0,
    "client_0/fine_loss": 0.25,
    "client_7/fine_loss": 0.75,
    "failed_clients": 1.0,
}
HISTORY = {"rounds": [RECORD], "final": {"heldout_coarse_loss": 0.125, "clients": []}}


def tracked(*names: str, **run: Any) -> RunConfig:
    section = dataclasses.replace(CONFIG.run, trackers=names, **run)
    return dataclasses.replace(CONFIG, run=section)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def shown_pictures(out: Path) -> dict[str, dict[int, np.ndarray]]:
    """Pixels by name and round, from the run's event files."""
    found = events(out / "trackers" / "tensorboard")

    def pixels(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return {
        tag: {event.step: pixels(event.encoded_image_string) for event in found.Images(tag)}
        for tag in found.Tags()["images"]
    }


# What is shown.


def test_a_record_becomes_its_finite_numbers() -> None:
    assert flat_record(RECORD) == FLAT


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that TensorBoard has followed."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    run_in_process(tracked("tensorboard", rounds=2), folder)
    return folder


@pytest.mark.slow
def test_a_run_in_tensorboard_is_its_metrics(out: Path) -> None:
    """Oracle: TensorBoard's own reader, against the run's metrics.json and samples.png."""
    metrics = json.loads((out / "metrics.json").read_text())
    found = scalars(out / "trackers" / "tensorboard")
    for name in ("coarse_loss", "fine_loss", "heldout_coarse_loss", "bytes_up", "bytes_down"):
        wanted = [(record["round"], record[name]) for record in metrics["rounds"]]
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    for client in metrics["rounds"][1]["clients"]:
        steps = dict(found[f"client_{client['client_id']}/fine_loss"])
        assert steps[2] == pytest.approx(client["fine_loss"], rel=1e-6)
    final = metrics["final"]["clients"][0]
    name = next(name for name in final if name.endswith("_frechet"))
    assert found[f"final/client_0/{name}"] == [(2, pytest.approx(final[name], rel=1e-6))]
    accumulator = events(out / "trackers" / "tensorboard")
    drawn = Image.open(out / "samples.png").convert("RGB")
    assert np.array_equal(shown_pictures(out)["samples"][2], np.asarray(drawn))
    (text,) = [tag for tag in accumulator.Tags()["tensors"] if tag.startswith("config")]
    shown = accumulator.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert '"privacy.clip_norm": 8.0' in shown


@pytest.mark.slow
def test_samples_of_every_evaluated_round_are_shown(out: Path) -> None:
    """Oracle: the run's own synthesizer, with the models as the last round has left them."""
    shown = shown_pictures(out)
    assert {name: sorted(rounds) for name, rounds in shown.items()} == {
        "coarse_samples": [1, 2],
        "client_0_samples": [1, 2],
        "client_1_samples": [1, 2],
        "samples": [2],
    }
    for name in ("coarse_samples", "client_0_samples"):
        assert not np.array_equal(shown[name][1], shown[name][2])  # the models have learnt
    labels = np.tile(np.arange(10), 2)
    for client in (0, 1):
        one = open_synthesizer(RunDirectory(out), client)
        wanted = tile_images(one.sample(labels, seed=CONFIG.run.seed), columns=10)
        assert np.array_equal(shown[f"client_{client}_samples"][2], wanted)


def every_file(out: Path) -> dict[str, bytes]:
    """What a run has computed: models, moments, samples and statements, by place.

    Of tensor files the values: their labels name the config, which differs in its trackers.
    """
    kept = (".safetensors", ".npz", ".png")
    skipped = ("trackers/", "server/checkpoint")  # the latter has seconds in its header
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    chosen = [n for n in found if n.endswith(kept) and not n.startswith(skipped)]
    return {name: values_of(found[name]) for name in chosen}


def values_of(path: Path) -> bytes:
    if path.suffix == ".safetensors":
        return pack(read_tensors(path)[0], {})
    return path.read_bytes()


@pytest.mark.slow
def test_a_tracked_run_computes_the_same_bit_for_bit(out: Path, tmp_path: Path) -> None:
    run_in_process(tracked(rounds=2), tmp_path / "run")
    tracked_files, files = every_file(out), every_file(tmp_path / "run")
    assert tracked_files.keys() == files.keys()
    assert {"coarse.safetensors", "samples.png", "clients/1/samples.npz"} <= files.keys()
    assert [name for name in files if files[name] != tracked_files[name]] == []


@pytest.mark.slow
def test_rounds_without_evaluation_have_no_pictures(tmp_path: Path) -> None:
    config = tracked("tensorboard", rounds=3)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(CONFIG.evaluation, every=2))
    run_in_process(config, tmp_path / "run")
    shown = shown_pictures(tmp_path / "run")
    assert sorted(shown["coarse_samples"]) == [2, 3]  # the last round is always evaluated
    assert sorted(shown["samples"]) == [3]


@pytest.mark.slow
def test_a_baselines_rounds_show_the_models_that_it_has(tmp_path: Path) -> None:
    config = tracked("tensorboard", rounds=1)
    alone = dataclasses.replace(config.coarse, training="none")
    run_in_process(dataclasses.replace(config, coarse=alone), tmp_path / "run")
    assert sorted(shown_pictures(tmp_path / "run")) == [
        "client_0_samples",
        "client_1_samples",
        "samples",
    ]


@pytest.mark.slow
def test_another_rounds_checkpoint_is_not_drawn(out: Path, tmp_path: Path) -> None:
    config = tracked("tensorboard", rounds=2)
    assert round_pictures(RunDirectory(out), config, 1) == {}
    assert round_pictures(RunDirectory(tmp_path), config, 1) == {}


@pytest.mark.slow
def test_pictures_that_cannot_be_drawn_are_said_once(out: Path, tmp_path: Path) -> None:
    """Planted fault: half of the checkpoint is gone."""
    damaged = tmp_path / "server" / "checkpoint.safetensors"
    damaged.parent.mkdir()
    whole = (out / "server" / "checkpoint.safetensors").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    said: list[str] = []
    opened = open_trackers(tracked("tensorboard"), tmp_path, first_round=1, say=said.append)
    for round in (1, 2):
        opened.round({**RECORD, "round": round})
    opened.finish({}, HISTORY)
    (line,) = said
    assert line.startswith("trackers get no pictures: ")
    assert "checkpoint.safetensors" in line
    found = scalars(tmp_path / "trackers" / "tensorboard")
    assert [step for step, _ in found["coarse_loss"]] == [1, 2]


@pytest.mark.slow
def test_nothing_but_what_metrics_json_holds_is_shown(out: Path) -> None:
    """Every tracked number stands in the server's own file."""
    history = json.loads((out / "metrics.json").read_text())

    def numbers(value: Any) -> set[float]:
        if isinstance(value, dict):
            return set().union(*map(numbers, value.values()), {0.0})
        if isinstance(value, list):
            return set().union(*map(numbers, value), {float(len(value))})
        return {float(value)} if isinstance(value, int | float) else set()

    known = numbers(history)
    for name, points in scalars(out / "trackers" / "tensorboard").items():
        for _, value in points:
            assert any(math.isclose(value, one, rel_tol=1e-6) for one in known), name


@pytest.mark.slow
def test_no_trackers_no_files(tmp_path: Path) -> None:
    run_in_process(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run" / "trackers").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", tracked("tensorboard", rounds=3)
    told = RoundBook.tell

    def break_after_round_2(self: RoundBook) -> None:
        told(self)
        if self.rounds_done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RoundBook, "tell", break_after_round_2)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(config, out)
    assert [step for step, _ in scalars(out / "trackers" / "tensorboard")["coarse_loss"]] == [1, 2]
    run_in_process(config, out, resume=True)
    steps = [step for step, _ in scalars(out / "trackers" / "tensorboard")["coarse_loss"]]
    assert steps == [1, 2, 3]


def test_a_deployed_server_shows_samples_of_the_shared_model_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(), run=dataclasses.replace(CONFIG.run, rounds=1))
    setup = set_up(config)
    model = build_denoiser(setup, "coarse")
    weights = {name: value.detach() for name, value in model.network.named_parameters()}
    deployed = dataclasses.replace(config, run=dataclasses.replace(config.run, simulation=False))
    Image.new("RGB", (4, 4)).save(tmp_path / "samples.png")  # of somebody else
    run = RunDirectory(tmp_path)
    pictures = final_pictures(deployed, run, weights)
    assert list(pictures) == ["coarse_samples"]
    assert pictures["coarse_samples"].shape == (2 * 8 + 1, 10 * 8 + 9, 3)
    assert pictures["coarse_samples"].std() > 5
    state = {
        f"{part}.{name}": value for part in ("weights", "ema") for name, value in weights.items()
    }
    run.save_checkpoint(4, state, {})
    after_round = round_pictures(run, deployed, 4)
    assert list(after_round) == ["coarse_samples"]
    assert np.array_equal(after_round["coarse_samples"], pictures["coarse_samples"])


# What goes wrong.


def test_a_missing_package_is_one_line_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a)
    )
    with pytest.raises(ConfigError, match=r"run.trackers: wandb needs .*'fedpdm\[wandb\]'") as info:
        check_run(tracked("tensorboard", "wandb"), tmp_path / "out", resume=False)
    assert "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"run.trackers\[0\]: must be one of tensorboard, wandb"):
        small_config(run={"trackers": ["tensorbord"]})
    with pytest.raises(ConfigError, match="tensorboard is named twice"):
        check_trackers(tracked("tensorboard", "tensorboard"))


class Broken:
    """A tracker whose service is gone after the first round."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def log(self, round: int, values: Any) -> None:
        self.rounds.append(round)
        if len(self.rounds) > 1:
            raise ConnectionError("service\nis gone")

    def show(self, round: int, name: str, pixels: np.ndarray) -> None:
        raise AssertionError("not asked again")

    def close(self) -> None:
        raise AssertionError("not asked again")


def test_a_tracker_that_fails_is_left_behind_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken = Broken()
    good = open_trackers(tracked("tensorboard"), tmp_path, first_round=1, say=said.append)
    trackers = RunTrackers(
        {"mlflow": broken, **good._trackers}, config=CONFIG, root=tmp_path, say=said.append
    )
    for round in (1, 2, 3):
        trackers.round({**RECORD, "round": round})
    trackers.finish({}, HISTORY)
    assert broken.rounds == [1, 2]
    assert said == ["tracker mlflow failed, the run goes on without it: service is gone"]
    found = scalars(tmp_path / "trackers" / "tensorboard")
    assert [step for step, _ in found["coarse_loss"]] == [1, 2, 3]
    assert found["final/heldout_coarse_loss"] == [(2, 0.125)]


def test_a_tracker_that_cannot_be_opened_stops_the_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "trackers").write_text("a file where a folder is needed")
    with pytest.raises(ConfigError, match="tensorboard cannot be opened"):
        open_trackers(tracked("tensorboard"), tmp_path, first_round=1, say=print)


# The optional ones, by their own packages.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_mlflow_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="fedpdm[mlflow] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Image.new("RGB", (6, 5), (10, 20, 30)).save(tmp_path / "samples.png")
    for first_round in (1, 2):  # the second goes on with the first
        said: list[str] = []
        opened = open_trackers(
            tracked("mlflow"), tmp_path, first_round=first_round, say=said.append
        )
        opened.round({**RECORD, "round": first_round})
    opened.finish({}, HISTORY)
    assert said == []
    folder = tmp_path / "trackers" / "mlflow"
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedpdm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "small"
    assert run.data.params["privacy.clip_norm"] == "8.0"
    history = client.get_metric_history(run.info.run_id, "client_7/fine_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.75), (2, 0.75)]
    assert run.data.metrics["final/heldout_coarse_loss"] == 0.125
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples-round2.png"]


def leveldb_records(data: bytes, *, first: int, block: int = 1 << 15) -> Iterator[bytes]:
    """Records of a LevelDB log, which wandb writes: chunks with a header, in blocks of 32 KiB.

    `first` bytes before `data` belong to the first block.
    """
    at, parts = 0, []
    while at + 7 <= len(data):
        if (room := block - (at + first) % block) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="fedpdm[wandb] is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    Image.new("RGB", (6, 5), (10, 20, 30)).save(tmp_path / "samples.png")
    said: list[str] = []
    opened = open_trackers(tracked("wandb"), tmp_path, first_round=1, say=said.append)
    opened.round(RECORD)
    opened.finish({}, HISTORY)
    assert said == []
    (log,) = (tmp_path / "trackers" / "wandb").rglob("*.wandb")
    records: list[Any] = []
    until = time.monotonic() + 60.0  # wandb's own process writes, and may be behind
    while not any(each.HasField("exit") for each in records) and time.monotonic() < until:
        time.sleep(0.05)
        data = leveldb_records(log.read_bytes()[7:], first=7)
        records = [wandb_internal_pb2.Record.FromString(each) for each in data]
    logged: dict[str, Any] = {}
    name = ""
    for record in records:
        if record.run.display_name:
            name = record.run.display_name
        for item in record.history.item:
            logged["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert name == "small"
    assert logged["client_7/fine_loss"] == 0.75
    assert logged["final/heldout_coarse_loss"] == 0.125
    assert logged["samples/_type"] == "image-file"
    assert logged["_step"] == 2
