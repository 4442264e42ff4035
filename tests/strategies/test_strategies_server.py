"""Server training (the paper's Algorithm 1), driven by hand with releases made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import FitRes, parameters_to_ndarrays

from fedpdm import wire
from fedpdm.config import RunConfig
from fedpdm.data.spec import build_image_spec
from fedpdm.diffusion.training import Trainer, TrainReport
from fedpdm.privacy.mechanism import SeededNoise, SystemNoise, join, release
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import build_schedule, set_up_for
from fedpdm.storage.run_directory import RunDirectory
from strategies.roster import ClientFailure
from strategies.server_training import (
    CoarseServerTraining,
    keep_release,
    kept_releases,
)
from tests.support.federations import small_config
from tests.support.strategy_fakes import EMPTY, Server, arrays, drift, fit_result, settings, update

CONFIG = small_config(
    run={"rounds": 3, "seed": 3, "threads": 0, "device": "cpu"},
    coarse={"training": "server", "preset": "nano", "steps_per_round": 2, "batch_size": 8},
    privacy={"epsilon": None, "t0": 600, "clip_norm": 8.0},
    aggregation={"server_steps_per_round": 3},
)
SCHEDULE = build_schedule(CONFIG)
SPEC = build_image_spec(CONFIG)
COUNTS = {0: 12, 1: 7, 2: 5}


def released(client_id: int, **changes: Any) -> ReleasedDataset:
    """What a client releases of images drawn here; `changes` spoil it."""
    rng = np.random.default_rng(client_id)
    count = changes.pop("count", COUNTS[client_id])
    shape = changes.pop("shape", SPEC.shape)
    labels = changes.pop("labels", torch.from_numpy(rng.integers(0, 10, count)))
    options: dict[str, Any] = {
        "schedule": SCHEDULE,
        "t0": 600,
        "clip_norm": 8.0,
        "shift": SPEC.shift,
        "noise": SeededNoise(np.random.SeedSequence(client_id)),
        **changes,
    }
    return release(torch.from_numpy(rng.random((count, *shape))).float(), labels, **options)


def upload(client_id: int, *, says: int | None = None, **changes: Any) -> FitRes:
    message = wire.encode_release(
        released(client_id, **changes), client_id=client_id if says is None else says
    )
    return fit_result(message, COUNTS[client_id], {"client_id": client_id})


def nothing(client_id: int) -> FitRes:
    return fit_result(wire.encode_nothing(), COUNTS[client_id], {"client_id": client_id})


def make_server(root: Path, config: RunConfig = CONFIG, **changes: Any) -> Server:
    said: list[str] = []
    finished: list[Any] = []
    model = build_denoiser(set_up_for(config, SPEC), "coarse")
    strategy = CoarseServerTraining(
        setup=set_up_for(config, SPEC),
        settings=settings(**{"simulation": True, **changes}),
        weights={name: p.detach() for name, p in model.network.named_parameters()},
        run=RunDirectory(root),
        announce=said.append,
        finish=lambda ema, history: finished.append((ema, history)),
    )
    return Server(strategy, said, finished).connect((2, 0, 1))


def train(server: Server, first: int, last: int) -> Any:
    """Rounds `first` to `last` of a run; Flower's own count starts at 1, in a resumed one with an
    evaluation."""
    for server_round, round in enumerate(range(first, last + 1), start=1 if first == 1 else 2):
        make = upload if round == 1 else nothing
        server.round(server_round, {k: make(k) for k in (2, 0, 1)})
    return arrays(server.strategy.weights), arrays(server.strategy.ema)


def assert_equal(first: Any, second: Any) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_releases_are_asked_for_in_the_first_round_alone(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    phases = []
    for round in (1, 2, 3):
        requests = server.ask(round)
        phases.append({ins.config["phase"] for _, ins in requests})
        server.take(round, {k: (upload if round == 1 else nothing)(k) for k in COUNTS})
    assert phases == [{"release"}, {"fine"}, {"fine"}]
    assert [r["server_steps"] for r in server.strategy.history["rounds"]] == [3, 3, 3]
    assert server.strategy.history["rounds"][0]["bytes_up"] > 0
    assert server.strategy.history["rounds"][1]["bytes_up"] == 0


def test_no_weights_travel_to_clients_that_do_not_train_them(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    assert all(ins.parameters.tensors == [] for _, ins in server.ask(1))
    server.take(1, {k: upload(k) for k in COUNTS})
    assert server.strategy.history["rounds"][0]["bytes_down"] == 0
    asked = server.strategy.configure_evaluate(1, EMPTY, server.manager)
    assert len(asked) == len(COUNTS)
    for _, ins in asked:  # evaluation needs them
        sent = wire.decode_model(parameters_to_ndarrays(ins.parameters))
        assert all(torch.equal(sent[name], server.strategy.ema[name]) for name in sent)


def test_the_server_trains_on_every_release_as_it_was_sent(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    train(server, 1, 1)
    kept = kept_releases(RunDirectory(tmp_path))
    assert [len(part) for part in kept] == [COUNTS[k] for k in (0, 1, 2)]
    joined = join(kept)
    sent = [released(k) for k in (0, 1, 2)]
    assert torch.equal(joined.x_tilde, torch.cat([part.x_tilde for part in sent]))
    assert torch.equal(joined.labels, torch.cat([part.labels for part in sent]))
    assert joined.parameters == sent[0].parameters
    assert joined.event == sent[0].event


@pytest.mark.slow
def test_training_moves_the_weights_and_repeats(tmp_path: Path) -> None:
    start = arrays(make_server(tmp_path / "0").strategy.weights)
    first = train(make_server(tmp_path / "1"), 1, 2)
    assert_equal(train(make_server(tmp_path / "2"), 1, 2), first)
    moved = [name for name in start if not np.array_equal(first[0][name], start[name])]
    assert len(moved) > len(start) / 2
    assert not np.array_equal(first[1][moved[0]], first[0][moved[0]])  # the average lags


@pytest.mark.slow
def test_every_round_and_seed_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def look(self: Trainer, *_: Any, generator: torch.Generator, **__: Any) -> TrainReport:
        seeds.append(generator.initial_seed())
        return TrainReport(loss=0.0, num_steps=0, num_images=0, seconds=0.0)

    monkeypatch.setattr(Trainer, "train", look)
    other = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, seed=4))
    train(make_server(tmp_path / "3"), 1, 3)
    train(make_server(tmp_path / "4", other), 1, 3)
    assert len(set(seeds)) == len(seeds) == 6


@pytest.mark.slow
def test_resuming_asks_for_no_release_again_and_changes_no_bit(tmp_path: Path) -> None:
    whole = train(make_server(tmp_path / "whole"), 1, 3)
    train(make_server(tmp_path / "cut"), 1, 1)
    again = make_server(tmp_path / "cut")
    again.strategy.resume()
    assert {ins.config["phase"] for _, ins in again.ask(2)} == {"fine"}
    assert_equal(train(again, 2, 3), whole)


def test_a_run_cut_inside_the_first_round_asks_again(tmp_path: Path) -> None:
    """Clients answer with the release they stored, so nothing is noised twice."""
    keep_release(RunDirectory(tmp_path / "cut"), 0, released(0))
    server = make_server(tmp_path / "cut")
    server.strategy.resume()
    assert {ins.config["phase"] for _, ins in server.ask(1)} == {"release"}
    assert_equal(train(server, 1, 1), train(make_server(tmp_path / "whole"), 1, 1))


def test_a_resumed_run_without_its_releases_is_refused(tmp_path: Path) -> None:
    train(make_server(tmp_path), 1, 1)
    for path in (tmp_path / "server" / "releases").iterdir():
        path.unlink()
    server = make_server(tmp_path)
    server.strategy.resume()
    with pytest.raises(ValueError, match="no release was collected"):
        train(server, 2, 2)


OTHER_SCHEDULE = build_schedule(small_config(schedule={"kind": "cosine"}))
OTHER_LENGTH = build_schedule(small_config(schedule={"num_steps": 900}))
OTHER_BETAS = build_schedule(small_config(schedule={"beta_end": 0.01}))

BAD: dict[str, tuple[Callable[[], FitRes], str]] = {
    "t0": (lambda: upload(1, t0=599), "t0=599.* expected .*t0=600"),
    "clip norm": (lambda: upload(1, clip_norm=4.0), "clip_norm=4.0.* expected .*clip_norm=8.0"),
    "shift": (lambda: upload(1, shift=0.0), "shift=0.0.* expected .*shift=-1.0"),
    "schedule": (lambda: upload(1, schedule=OTHER_SCHEDULE), "'cosine'.* expected .*'linear'"),
    "chain length": (lambda: upload(1, schedule=OTHER_LENGTH), "=900,.* expected .*=1000,"),
    "betas": (lambda: upload(1, schedule=OTHER_BETAS), "alpha_bar=.* expected .*alpha_bar="),
    "resolution": (lambda: upload(1, shape=(3, 16, 16)), r"\(3, 16, 16\)"),
    "channels": (lambda: upload(1, shape=(1, 8, 8)), r"\(1, 8, 8\)"),
    "label too high": (lambda: upload(1, labels=torch.full((7,), 10)), r"must be in \[0, 9\]"),
    "label negative": (lambda: upload(1, labels=torch.full((7,), -1)), r"must be in \[0, 9\]"),
    "another's": (lambda: upload(1, says=2), "header says client 2"),
    "other count": (lambda: upload(1, count=6), "6 images; Flower says 7"),
    "an update": (lambda: update(1, drift(1)), "expected a release message"),
    "nothing": (lambda: nothing(1), "got 0 arrays"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_release_is_refused_and_names_the_client(tmp_path: Path, kind: str) -> None:
    make, words = BAD[kind]
    server = make_server(tmp_path)
    server.ask(1)
    with pytest.raises(ClientFailure, match=words) as caught:
        server.take(1, {0: upload(0), 1: make(), 2: upload(2)})
    assert "client 1" in str(caught.value)
    assert kept_releases(RunDirectory(tmp_path)) == []


def test_a_bad_release_is_left_out_when_failures_are_skipped(tmp_path: Path) -> None:
    server = make_server(tmp_path, on_failure="skip")
    server.ask(1)
    server.take(1, {0: upload(0), 1: upload(1, t0=599), 2: upload(2)})
    assert [len(part) for part in kept_releases(RunDirectory(tmp_path))] == [12, 5]
    (failed,) = server.strategy.history["rounds"][0]["failed"]
    assert failed.startswith("client 1")


def test_seeded_noise_is_refused_outside_simulation(tmp_path: Path) -> None:
    server = make_server(tmp_path, simulation=False, on_failure="skip")
    server.ask(1)
    sound = {k: upload(k, noise=SystemNoise()) for k in (0, 2)}
    server.take(1, {**sound, 1: upload(1)})
    (failed,) = server.strategy.history["rounds"][0]["failed"]
    assert failed == "client 1: release of client 1: its noise is seeded, outside simulation"
    assert [part.seeded for part in kept_releases(RunDirectory(tmp_path))] == [False, False]


def test_nothing_may_be_sent_where_nothing_was_asked_for(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    train(server, 1, 1)
    server.ask(2)
    with pytest.raises(ClientFailure, match="client 1 sent a message where none was asked for"):
        server.take(2, {0: nothing(0), 1: upload(1), 2: nothing(2)})
