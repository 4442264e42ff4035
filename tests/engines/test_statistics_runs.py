"""Whole runs of class statistics in this process: real clients, the real strategy, few steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.config import ConfigError, RunConfig, config_from_json, config_to_json
from fedpdm.diffusion.combined import HandOver, Unlabelled
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import SamplerSettings, hand_over
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.build import build_gaussians, sampler_settings
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.types import Phase
from strategies.answers import ClientAnswer
from strategies.gaussians import CoarseGaussians
from strategies.roster import ClientFailure
from strategies.server_app import build_strategy
from tests.support.federations import client_of, small_config
from tests.support.release_toys import DELTA

PARTS = ("means", "pooled", "classes")


def config_of(**sections: dict[str, Any]) -> RunConfig:
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 4},
        "partition": {"num_clients": 2},
        "coarse": {"training": "server"},
        "privacy": {"release": "statistics", "clip_norm": 6.0},
    }
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return small_config(**given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "run"
    run_in_process(config_of(), out)
    return out


def final(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "coarse.safetensors")[0]


def stage_of(record: Any) -> str:
    assert isinstance(record.parameters, StatisticsParameters)
    return record.parameters.stage


def strategy_of(config: RunConfig, out: Path) -> CoarseGaussians:
    made = build_strategy(config, RunDirectory(out), resume=False)
    assert isinstance(made, CoarseGaussians)
    return made


# --- A run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_training_image_is_in_the_sum_of_each_round_and_no_other_is(finished: Path) -> None:
    config = config_of()
    for client in range(2):
        local = client_of(config, finished, client).local
        train = local.held.images.subset(local.held.train)
        expected = sorted(bytes(row) for row in train.image_digests())
        records = local.releases.ledger().releases()
        assert [stage_of(record) for record in records] == list(PARTS)
        for record in records:
            path = local.releases.root / "releases" / record.file
            digests = read_tensors(path)[0]["digests"].numpy()
            assert sorted(bytes(row) for row in digests) == expected
        spent = local.releases.spent(delta=DELTA)
        assert [count for _, count in spent.distribution] == [len(expected)]
        assert spent.largest == pytest.approx(10.0, rel=1e-9)


def test_the_run_says_what_was_sent_and_what_it_cost(finished: Path) -> None:
    privacy = json.loads((finished / "privacy.json").read_text())
    assert privacy["epsilon"] == privacy["epsilon_of_this_release"] == pytest.approx(10.0)
    assert privacy["releases_per_image"] == 3
    assert "No image is sent by itself." in privacy["released"]
    text = " ".join((finished / "privacy.txt").read_text().split())
    assert "Then such a table is sent for each class, of 48 features" in text
    metrics = json.loads((finished / "metrics.json").read_text())
    third = metrics["rounds"][2]
    assert third["classes"] == 10
    assert third["images"] == sum(client["num_released"] for client in third["clients"])
    assert "heldout_coarse_loss" not in metrics["final"]
    assert metrics["rounds"][3]["bytes_up"] == 0
    assert (finished / "samples.png").stat().st_size > 0


def test_the_shared_model_is_class_gaussians_that_every_reader_takes(finished: Path) -> None:
    config = config_of()
    one = open_synthesizer(RunDirectory(finished), 0)
    assert isinstance(one.coarse, GaussianDenoiser)
    assert one.coarse.gaussians.classes.tolist() == list(range(10))
    assert one.settings.t0 == 150
    images = one.sample(np.array([3, -1, 7]), seed=1)
    assert images.shape == (3, 3, 8, 8)
    again = open_synthesizer(RunDirectory(finished), 0).sample(np.array([3, -1, 7]), seed=1)
    np.testing.assert_array_equal(images, again)
    setup = set_up(config)
    whole = build_gaussians(setup, final(finished))
    x = torch.zeros(2, 3, 8, 8)
    answer = whole(x, torch.tensor([500, 900]), labels=torch.tensor([0, 1]))
    assert bool(answer.isfinite().all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("rest"), "class Gaussians: expected"),
        (lambda w: w.update(classes=w["classes"] + 5), r"classes must be in \[0, 9\]"),
        (lambda w: w.update(classes=w["classes"].float()), "with classes int64"),
        (lambda w: w.update(variances=-w["variances"]), "variances must be positive"),
        (lambda w: w.update(means=w["means"][:, 1:]), r"must be \(J, d\)"),
    ],
)
def test_what_is_no_shared_model_of_this_run_is_refused(
    finished: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    weights = dict(final(finished))
    change(weights)
    with pytest.raises(ValueError, match=words):
        build_gaussians(set_up(config_of()), weights)


# --- Crashes and clients that leave ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("round", [2, 3])
def test_a_crash_sends_the_same_sums_and_ends_in_the_same_gaussians(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round: int
) -> None:
    """The server dies after the sums of a round came, before it used them."""
    merge = CoarseGaussians.merge

    def die(self: CoarseGaussians, now: int) -> Any:
        if now == round:
            raise KeyboardInterrupt
        return merge(self, now)

    with monkeypatch.context() as broken:
        broken.setattr(CoarseGaussians, "merge", die)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(config_of(), tmp_path / "run")
    run_in_process(config_of(), tmp_path / "run", resume=True)
    first, second = final(finished), final(tmp_path / "run")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for client in range(2):
        ledger = ReleaseStore(RunDirectory(tmp_path / "run").client_path(client)).ledger()
        assert [stage_of(record) for record in ledger.releases()] == list(PARTS)


@pytest.mark.slow
def test_a_client_that_leaves_between_rounds_has_its_first_sum_in_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain = LocalTraining.statistics

    def leave(self: LocalTraining, stage: int, public: Any) -> Any:
        if stage >= 1 and self.local.client_id == 1:
            raise ValueError("left")
        return obtain(self, stage, public)

    monkeypatch.setattr(LocalTraining, "statistics", leave)
    config = config_of(run={"rounds": 3}, aggregation={"on_failure": "skip"})
    run_in_process(config, tmp_path / "run")
    kept = {part: len(RunDirectory(tmp_path / "run").load_uploads(part=part)) for part in PARTS}
    assert kept == {"means": 2, "pooled": 1, "classes": 1}
    assert final(tmp_path / "run")["classes"].tolist() == list(range(10))
    stores = [ReleaseStore(RunDirectory(tmp_path / "run").client_path(c)) for c in range(2)]
    assert [len(store.ledger().releases()) for store in stores] == [3, 1]
    with pytest.raises(ClientFailure):
        run_in_process(config_of(), tmp_path / "other")


@pytest.mark.slow
def test_another_run_with_the_same_releases_sends_them_again(
    finished: Path, tmp_path: Path
) -> None:
    """With other fine models; no image pays twice."""
    stores = [RunDirectory(finished).client_path(client) for client in range(2)]
    heads = [ReleaseStore(store).ledger().head for store in stores]
    other = config_of(fine={"steps_per_round": 2}, run={"rounds": 3})
    run_in_process(other, tmp_path / "run", releases=finished / "clients")
    assert [ReleaseStore(store).ledger().head for store in stores] == heads
    first, second = final(finished), final(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- What a server takes -----------------------------------------------------------------------


def test_hostile_sums_are_refused_by_the_server(finished: Path, tmp_path: Path) -> None:
    config = config_of()
    strategy = strategy_of(config, tmp_path / "run")
    sums = {
        part: wire_release(client_of(config, finished, 0).local.releases, index, config)
        for index, part in enumerate(PARTS)
    }
    good = sums["means"]
    answer = ClientAnswer(client_id=0, metrics={}, num_examples=int(good.counts.sum()))

    def offer(released: ReleasedStatistics, *, round: int = 1, client: int = 0) -> None:
        strategy.accept(round, answer, wire.encode_release(released, client_id=client))

    strategy.begin(1, [0])
    for bad, round, client, words in (
        (sums["pooled"], 1, 0, "made with .*stage='pooled'.* expected .*stage='means'"),
        (good, 2, 0, "made with .*stage='means'.* expected .*stage='pooled'"),
        (good, 1, 1, "header says client 1"),
        (good, 4, 0, "sent a message where none was asked for"),
        (dataclasses.replace(good, counts=0 * good.counts, sums=0 * good.sums), 1, 0,
         "sums of 0 images"),
        (dataclasses.replace(good, sums=good.sums + (1 << 40)), 1, 0, "must be within"),
    ):  # fmt: skip
        with pytest.raises(wire.WireError, match=words):
            offer(bad, round=round, client=client)
    strategy.settings = dataclasses.replace(strategy.settings, max_examples=5)
    with pytest.raises(wire.WireError, match="at least 1 and at most 5"):
        offer(good)
    strategy.settings = dataclasses.replace(strategy.settings, max_examples=None, simulation=False)
    with pytest.raises(wire.WireError, match="its noise is seeded, outside simulation"):
        offer(good)
    assert RunDirectory(tmp_path / "run").load_uploads(part="means") == []
    strategy.settings = dataclasses.replace(strategy.settings, simulation=True)
    offer(good)
    assert len(RunDirectory(tmp_path / "run").load_uploads(part="means")) == 1
    size = wire.message_bytes(wire.encode_release(good, client_id=0))
    assert size < strategy.largest_message(1) + 8192 < 20_000 + 8192
    assert strategy.largest_message(10**9) == 64 * strategy.largest_message(1)
    strategy.abandon()  # a round that failed keeps nothing
    assert RunDirectory(tmp_path / "run").load_uploads(part="means") == []
    strategy.begin(4, [0])
    assert strategy.largest_message(1000) == 0
    assert strategy.phase(4) is Phase.FINE


def wire_release(store: ReleaseStore, index: int, config: RunConfig) -> ReleasedStatistics:
    """A client's kept sums of a round."""
    setup = set_up(config)
    local_train = store.ledger().releases()[index]
    tensors, metadata = read_tensors(store.root / "releases" / local_train.file)
    stacked = {name: tensors[name][None] for name in ("counts", "sums", "directions")}
    released = setup.release_plan.mechanism.restore(
        stacked, parameters=local_train.parameters, event=local_train.event,
        noise_source=metadata["noise_source"], seeded=True, check_values=True,
    )  # fmt: skip
    assert isinstance(released, ReleasedStatistics)
    return released


def test_what_the_server_says_to_clients_is_checked_by_them(finished: Path, tmp_path: Path) -> None:
    """Sums without means, means that are no numbers, a round that is not planned: one line each,
    and nothing is released."""
    config = config_of()
    bad = wire.encode_model({"means": torch.full((10, 192), float("nan"))})
    short = wire.encode_model({"means": torch.zeros(10, 5)})
    for round, message, words in (
        (2, [], "the server's means are missing"),
        (2, bad, "not finite"),
        (2, short, "must be finite, 10 x 192, got (10, 5)"),
        (9, [], "no sums are planned in it"),
    ):
        client = client_of(config, tmp_path / f"{round}-{len(words)}", 0)
        payload, count, metrics = client.fit(message, {"round": round, "phase": "release"})
        assert (payload, count) == ([], 0)
        assert words in str(metrics["error"])
        assert client.local.releases.ledger().releases() == ()
    assert parameters_to_ndarrays(ndarrays_to_parameters([])) == []


# --- Settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"coarse": {"training": "federated"}}, r"^coarse\.training: must be server with"),
        ({"run": {"rounds": 2}}, r"^run\.rounds: must be at least 3 with privacy\.release"),
        ({"sampling": {"handover": 1001}}, r"^sampling\.handover: must be at most"),
        ({"sampling": {"candidates": 0}}, r"^sampling\.candidates: must be at least 1, got 0"),
        ({"sampling": {"candidates": 65}}, r"^sampling\.candidates: must be at most 64, got 65"),
        (
            {"privacy": {"release": "images"}, "sampling": {"candidates": 4}},
            r"^sampling\.candidates: must be 1 without privacy\.release: statistics or network, "
            r".* got 4 with images$",
        ),
        (
            {"aggregation": {"secure": True}},
            r"^aggregation\.max_examples: secure aggregation needs",
        ),
        ({"aggregation": {"secure": True, "max_examples": 99}}, r"^aggregation\.secure: needs 3"),
    ],
)
def test_settings_that_class_statistics_cannot_keep_are_refused(
    sections: dict[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(**sections)


@pytest.mark.parametrize(
    "section",
    [
        {"method": "median"},
        {"method": "trimmed_mean"},
        {"method": "krum"},
        {"method": "some.module:Mine"},
        {"max_update_norm": 1.0},
    ],
)
def test_means_that_do_not_apply_to_sums_are_refused_by_name(section: dict[str, Any]) -> None:
    """Other methods are those of coarse updates, of which there are none."""
    (name,) = section
    words = (
        rf"^aggregation\.{name}.*: does not apply with privacy\.release: statistics, whose sums "
        "are added up; each is held against the most that its images can give$"
    )
    with pytest.raises(ConfigError, match=words):
        config_of(aggregation=section)
    assert config_of(aggregation={"method": "fedadam"}).has_statistics  # as with released images


def test_the_hand_over_is_chosen_and_the_fine_model_is_not_told_the_class() -> None:
    settings = sampler_settings(set_up(config_of()))
    assert (settings.t0, settings.fine_labels, settings.chain) == (150, False, "truncated")
    assert settings.candidates == 4
    other = config_of(sampling={"handover": 200, "fine_labels": True, "candidates": 2})
    settings = sampler_settings(set_up(other))
    assert (settings.t0, settings.fine_labels, settings.candidates) == (200, True, 2)
    assert config_from_json(config_to_json(other)) == other
    images = sampler_settings(set_up(small_config()))
    assert (images.fine_labels, images.candidates) == (True, 1)
    assert small_config(sampling={"candidates": 1}).sampling.candidates == 1
    short = config_of(schedule={"num_steps": 100})
    assert sampler_settings(set_up(short)).t0 == 15
    assert "handover" not in config_to_json(small_config())
    assert "fine_labels" not in config_to_json(small_config())
    assert "candidates" not in config_to_json(small_config())


def test_without_labels_the_fine_model_is_asked_without() -> None:
    def model(*_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(1)

    schedule = set_up(small_config()).schedule
    for labels in (True, False):
        settings = SamplerSettings(schedule=schedule, t0=5, fine_labels=labels)
        both = hand_over(model, model, settings)
        assert isinstance(both, HandOver)
        assert isinstance(both.below, Unlabelled) is not labels
    with pytest.raises(ValueError, match="fine_labels: false needs the chain truncated"):
        SamplerSettings(schedule=schedule, t0=5, fine_labels=False, chain="noise_to_noise")
