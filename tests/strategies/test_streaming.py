"""Answers taken in one by one: any order, failures in between, and never all at once."""

from __future__ import annotations

import gc
import itertools
import random
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM

from fedpdm.config import AggregationConfig
from strategies.averaging import OrderedMean, make_server_optimizer
from strategies.roster import ClientFailure
from strategies.streaming import StreamingServer
from tests.support.strategy_fakes import START, FakeProxy, arrays, drift, fedavg_server, update

COUNTS = {0: 5, 1: 11, 2: 2, 3: 7}


def answer(client_id: int, round: int = 1) -> FitRes:
    return update(
        client_id, drift(client_id, round), round=round, num_examples=COUNTS.get(client_id, 3)
    )


def mean(clients: Any) -> dict[str, np.ndarray]:
    total = sum(COUNTS[k] for k in clients)
    return {
        name: sum(COUNTS[k] * drift(k)[name].astype(np.float64) for k in clients) / total
        for name in START
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_any_order_of_arrival_gives_the_same_bits(tmp_path: Path, order: tuple[int, ...]) -> None:
    server = fedavg_server(tmp_path / "any", clients=range(4))
    server.ask(1)
    given = {k: answer(k) for k in order}
    for k in order:
        server.strategy.receive_fit(1, server.proxy(k), given[k])
        assert given[k].parameters.tensors == []  # its weights are not kept
    server.take(1, given)
    sorted_server = fedavg_server(tmp_path / "sorted", clients=range(4))
    wanted = sorted_server.round(1, {k: answer(k) for k in range(4)})
    for name, value in arrays(server.strategy.weights).items():
        np.testing.assert_array_equal(value, wanted[name])
        np.testing.assert_allclose(value, mean(range(4))[name], rtol=2e-6)
    assert list((tmp_path / "any" / "server" / "updates").glob("*")) == []
    assert [c["client_id"] for c in server.strategy.history["rounds"][0]["clients"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [(3, 2, 1), (1, 3, 2), (2, 1, 3)])
@pytest.mark.parametrize("silent", [True, False])
def test_a_client_that_fails_holds_nobody_up(
    tmp_path: Path, order: tuple[int, ...], silent: bool
) -> None:
    """Client 0 says nothing, or something that is refused in the middle."""
    server = fedavg_server(tmp_path, clients=range(4), on_failure="skip")
    server.ask(1)
    results = {k: answer(k) for k in order}
    for place, k in enumerate(order):
        server.strategy.receive_fit(1, server.proxy(k), results[k])
        if place == 1 and not silent:
            results[0] = answer(0, round=2)
            server.strategy.receive_fit(1, server.proxy(0), results[0])
    server.take(1, results, [ValueError("lost")] if silent else [])
    for name, value in arrays(server.strategy.weights).items():
        np.testing.assert_allclose(value, mean(order)[name], rtol=2e-6)
    (problem,) = server.strategy.history["rounds"][0]["failed"]
    assert problem.startswith("client 0: ")


def test_a_failed_round_leaves_no_updates_behind(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, clients=range(4))
    server.ask(1)
    late = {k: answer(k) for k in (3, 2)}
    for k, result in late.items():
        server.strategy.receive_fit(1, server.proxy(k), result)
    assert len(list((tmp_path / "server" / "updates").iterdir())) == 2
    with pytest.raises(ClientFailure, match="client 0 or client 1"):
        server.take(1, late, [ValueError("lost")])
    assert not (tmp_path / "server" / "updates").exists()
    np.testing.assert_array_equal(arrays(server.strategy.weights)["conv.bias"], START["conv.bias"])


class Trainee(FakeProxy):
    """Answers with its update after a while."""

    live: ClassVar[list[weakref.ref[FitRes]]] = []
    most = 0
    seconds = 0.0

    def fit(self, ins: Any, timeout: Any, group_id: Any) -> FitRes:
        time.sleep(random.Random(self.client_id).random() * self.seconds)
        result = answer(self.client_id, int(ins.config["round"]))
        Trainee.live.append(weakref.ref(result))
        alive = [reference() for reference in Trainee.live]
        full = [other for other in alive if other is not None and other.parameters.tensors]
        Trainee.most = max(Trainee.most, len(full))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["clients", "server"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_server_holds_few_updates(
    tmp_path: Path, workers: int, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With w clients at work at most w + 1 updates are in memory, whatever their number."""
    made = fedavg_server(tmp_path, clients=())
    if slow == "server":
        accept = made.strategy.accept
        monkeypatch.setattr(
            made.strategy, "accept", lambda *given: (time.sleep(0.02), accept(*given))
        )
    monkeypatch.setattr(Trainee, "seconds", 0.05 if slow == "clients" else 0.0)
    for k in range(20):
        trainee = Trainee(k)
        trainee.cid = f"node{k}"
        made.manager.register(trainee)
    server = StreamingServer(client_manager=made.manager, strategy=made.strategy)
    server.set_max_workers(workers)
    gc.collect()
    Trainee.live.clear()
    Trainee.most = 0
    for round in (1, 2):
        outcome = server.fit_round(round, None)
        assert outcome is not None
        _, _, (results, failures) = outcome
        assert len(results) == 20
        assert failures == []
    assert 1 <= Trainee.most <= workers + 2
    assert made.strategy.rounds_done == 2


@pytest.mark.parametrize(
    ("section", "flower"),
    [
        ({"method": "fedavg"}, lambda start: FedAvg(initial_parameters=start)),
        (
            {"method": "fedavgm", "server_lr": 0.3, "momentum": 0.8},
            lambda start: FedAvgM(
                initial_parameters=start, server_learning_rate=0.3, server_momentum=0.8
            ),
        ),
        (
            {"method": "fedadam", "server_lr": 0.02, "momentum": 0.7},
            lambda start: FedAdam(
                initial_parameters=start, eta=0.02, beta_1=0.7, beta_2=0.99, tau=1e-3
            ),
        ),
    ],
)
def test_the_arithmetic_is_that_of_flowers_strategies(section: Any, flower: Any) -> None:
    names = sorted(START)
    theirs = flower(ndarrays_to_parameters([START[name] for name in names]))
    weights = {name: torch.from_numpy(START[name].copy()) for name in names}
    ours = make_server_optimizer(AggregationConfig(**section), weights)
    for round in range(1, 6):
        held: dict[int, Any] = {}
        averaged = OrderedMean((0, 1, 2, 3), keep=held.__setitem__, recall=held.pop)
        results = []
        for k in (2, 0, 3, 1):
            sent = drift(k, round)
            averaged.add(
                k, {n: torch.from_numpy(v.copy()) for n, v in sent.items()}, num_examples=COUNTS[k]
            )
            parameters = ndarrays_to_parameters([sent[name] for name in names])
            results.append((None, FitRes(None, parameters, COUNTS[k], {})))  # type: ignore[arg-type]
        weights = ours.step(round, weights, averaged.finish())
        wanted, _ = theirs.aggregate_fit(round, results, [])
        for name, array in zip(names, parameters_to_ndarrays(wanted), strict=True):
            np.testing.assert_allclose(weights[name].numpy(), array, rtol=3e-6, atol=3e-7)


def test_misuse_of_a_mean_is_refused() -> None:
    mean = OrderedMean((1, 2), keep=lambda *_: None, recall=lambda _: {})
    with pytest.raises(ValueError, match="client 7 is not waited for"):
        mean.add(7, {}, num_examples=1)
    with pytest.raises(ValueError, match="no update to average"):
        mean.finish()
    with pytest.raises(ValueError, match="unknown method 'sgd'"):
        make_server_optimizer(AggregationConfig(method="sgd"), {})


def test_an_error_of_the_server_ends_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fedavg_server(tmp_path, clients=())
    for k in range(4):
        made.manager.register(Trainee(k))

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(made.strategy, "accept", fail)
    server = StreamingServer(client_manager=made.manager, strategy=made.strategy)
    with pytest.raises(ZeroDivisionError):
        server.fit_round(1, None)
