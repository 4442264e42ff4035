"""The federated strategy, driven by hand: its arithmetic, its requests, its memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from strategies.roster import ClientFailure
from tests.support.strategy_fakes import (
    START,
    Arrays,
    arrays,
    drift,
    fedavg_server,
    sent_weights,
    update,
)

COUNTS = {0: 30, 1: 10, 2: 5}
METHODS = ("fedavg", "fedprox", "fedavgm", "fedadam")


def answers(round: int, clients: Sequence[int] = (0, 1, 2)) -> dict:
    return {
        k: update(k, drift(k, round), round=round, num_examples=COUNTS.get(k, 7)) for k in clients
    }


def weighted_mean(round: int) -> Arrays:
    """sum_k n_k w_k / sum_k n_k (McMahan et al. 2017, Algorithm 1), in float64."""
    total = sum(COUNTS.values())
    return {
        name: sum(n * drift(k, round)[name].astype(np.float64) for k, n in COUNTS.items()) / total
        for name in START
    }


def assert_close(got: Arrays, wanted: Arrays) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == np.float32
        assert got[name].shape == wanted[name].shape
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-6, atol=2e-6)


def assert_same(got: Arrays, wanted: Arrays) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])


def fedavgm_by_hand(rate: float, momentum: float) -> Callable[[int], Arrays]:
    """Hsu et al. 2019, section 4.3: v <- beta v + delta_w, w <- w - v, with a server rate."""
    w = {k: v.astype(np.float64) for k, v in START.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}

    def step(round: int) -> Arrays:
        mean = weighted_mean(round)
        for name in w:
            v[name] = momentum * v[name] + (w[name] - mean[name])
            w[name] = w[name] - rate * v[name]
        return dict(w)

    return step


def fedadam_by_hand(rate: float, beta_1: float) -> Callable[[int], Arrays]:
    """Reddi et al. 2021, Algorithm 2 (FedAdam): delta is the mean update, tau = 1e-3.

    The paper takes constant steps of `rate`. Flower corrects for the bias of the moments as
    Kingma and Ba 2015 do, except that the first round counts as their second step; that factor
    is written out here, so this test says by how much Flower departs from the paper.
    """
    beta_2, tau = 0.99, 1e-3
    x = {k: v.astype(np.float64) for k, v in START.items()}
    m = {k: np.zeros_like(a) for k, a in x.items()}
    v = {k: np.zeros_like(a) for k, a in x.items()}

    def step(round: int) -> Arrays:
        correction = np.sqrt(1 - beta_2 ** (round + 1)) / (1 - beta_1 ** (round + 1))
        mean = weighted_mean(round)
        for name in x:
            delta = mean[name] - x[name]
            m[name] = beta_1 * m[name] + (1 - beta_1) * delta
            v[name] = beta_2 * v[name] + (1 - beta_2) * delta**2
            x[name] = x[name] + rate * correction * m[name] / (np.sqrt(v[name]) + tau)
        return dict(x)

    return step


@pytest.mark.parametrize(
    ("method", "options", "by_hand"),
    [
        ("fedavg", {}, weighted_mean),
        ("fedprox", {"proximal_mu": 0.3}, weighted_mean),  # the server's side is FedAvg's
        ("fedavgm", {}, fedavgm_by_hand(1.0, 0.9)),
        ("fedavgm", {"server_lr": 0.25, "momentum": 0.5}, fedavgm_by_hand(0.25, 0.5)),
        ("fedavgm", {"server_lr": 0.5, "momentum": 0.0}, fedavgm_by_hand(0.5, 0.0)),
        ("fedadam", {}, fedadam_by_hand(0.01, 0.9)),
        ("fedadam", {"server_lr": 0.05, "momentum": 0.6}, fedadam_by_hand(0.05, 0.6)),
    ],
)
def test_three_rounds_follow_the_formula(
    tmp_path: Path, method: str, options: dict, by_hand: Callable[[int], Arrays]
) -> None:
    server = fedavg_server(tmp_path, method=method, **options)
    for round in (1, 2, 3):
        assert_close(server.round(round, answers(round)), by_hand(round))


@pytest.mark.parametrize("method", METHODS)
def test_rates_and_momentum_matter(tmp_path: Path, method: str) -> None:
    """The formulas above cannot pass by chance: methods differ from each other."""
    server = fedavg_server(tmp_path, method=method)
    for round in (1, 2):
        got = server.round(round, answers(round))
    plain = method in ("fedavg", "fedprox")
    assert np.allclose(got["conv.bias"], weighted_mean(2)["conv.bias"], atol=1e-4) == plain


def test_one_client_is_taken_over_exactly(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, clients=(4,))
    assert_same(server.round(1, {4: update(4, drift(4))}), drift(4))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_order_of_arrival_changes_no_bit(tmp_path: Path, method: str) -> None:
    reference = None
    for index, order in enumerate(itertools.permutations((0, 1, 2))):
        server = fedavg_server(tmp_path / str(index), method=method, clients=order)
        for round in (1, 2):
            given = answers(round)
            got = server.round(round, {k: given[k] for k in order})
        reference = reference or got
        assert_same(got, reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 2])
def test_resuming_changes_no_bit(tmp_path: Path, method: str, stop: int) -> None:
    whole = fedavg_server(tmp_path / "whole", method=method)
    for round in (1, 2, 3):
        whole.round(round, answers(round))
    first = fedavg_server(tmp_path / "cut", method=method)
    for round in range(1, stop + 1):
        first.round(round, answers(round))
    second = fedavg_server(tmp_path / "cut", method=method)
    second.strategy.resume()
    assert second.said == [f"resumed after round {stop} of 3"]
    assert second.strategy.rounds_left() == 3 - stop + 1
    assert second.ask(1) == []  # the last round's evaluation comes first
    for server_round, round in enumerate(range(stop + 1, 4), start=2):
        ((_, request), *_) = second.ask(server_round)
        assert request.config["round"] == round  # Flower counts from 1 again, clients do not
        second.take(server_round, answers(round))
    assert_same(arrays(second.strategy.weights), arrays(whole.strategy.weights))
    assert_same(arrays(second.strategy.ema), arrays(whole.strategy.ema))
    assert [r["round"] for r in second.strategy.history["rounds"]] == [1, 2, 3]


def test_resuming_with_nothing_there_starts_anew(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path)
    server.strategy.resume()
    assert server.said == []
    assert server.strategy.rounds_left() == 3


def test_average_over_rounds_by_hand(tmp_path: Path) -> None:
    """e <- d e + (1 - d) w with d = min(0.2, (1 + r) / (10 + r)): 2/11, then 0.2, 0.2."""
    server = fedavg_server(tmp_path, ema_decay=0.2)
    wanted = {k: v.astype(np.float64) for k, v in START.items()}
    for round, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):
        server.round(round, answers(round))
        mean = weighted_mean(round)
        wanted = {k: decay * wanted[k] + (1 - decay) * mean[k] for k in START}
        assert_close(arrays(server.strategy.ema), wanted)


def test_clients_train_weights_and_evaluate_their_average(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path)
    server.round(1, answers(1))
    ((_, request), *_) = server.ask(2)
    assert_same(sent_weights(request), arrays(server.strategy.weights))
    ((_, question), *_) = server.strategy.configure_evaluate(2, None, server.manager)
    assert_same(sent_weights(question), arrays(server.strategy.ema))
    assert not np.allclose(server.strategy.ema["conv.bias"], server.strategy.weights["conv.bias"])


def test_the_request_says_round_phase_and_the_pull_of_fedprox(tmp_path: Path) -> None:
    ((_, plain), *_) = fedavg_server(tmp_path).ask(2)
    assert plain.config == {"round": 2, "phase": "coarse"}
    ((_, prox), *_) = fedavg_server(tmp_path, method="fedprox", proximal_mu=0.25).ask(2)
    assert prox.config == {"round": 2, "phase": "coarse", "proximal_mu": 0.25}


def test_the_strategy_keeps_its_own_weights(tmp_path: Path) -> None:
    """Neither the arrays it was started with nor those it was sent can change it later."""
    server = fedavg_server(tmp_path, clients=(0,))
    given = drift(0)
    got = server.round(1, {0: update(0, given)})
    given["conv.bias"][:] = 99.0
    assert_same(arrays(server.strategy.weights), got)
    assert START["conv.bias"].tolist() == [1.0, -2.0]


# Who takes part.


def chosen(root: Path, round: int, *, seed: int = 0, order: Sequence[int] = range(8)) -> list[int]:
    server = fedavg_server(root, clients=order, fraction_fit=0.5, seed=seed, rounds=40)
    return [proxy.client_id for proxy, _ in server.ask(round)]


def test_participants_are_drawn_from_the_seed_and_the_round(tmp_path: Path) -> None:
    draws = [chosen(tmp_path, round) for round in range(1, 4)]
    assert draws == [chosen(tmp_path, round) for round in range(1, 4)]
    assert draws == [chosen(tmp_path, r, order=[5, 3, 7, 0, 1, 6, 2, 4]) for r in range(1, 4)]
    assert draws != [chosen(tmp_path, round, seed=1) for round in range(1, 4)]
    assert len(set(map(tuple, draws))) > 1
    assert all(len(set(draw)) == 4 and draw == sorted(draw) for draw in draws)


def test_every_client_gets_its_turn(tmp_path: Path) -> None:
    """Each round picks 4 of 8; a client is missed by 40 fair rounds once in 10^12."""
    seen = set(itertools.chain.from_iterable(chosen(tmp_path, round) for round in range(1, 41)))
    assert seen == set(range(8))


@pytest.mark.parametrize(
    ("num_clients", "fraction", "count"),
    [(5, 0.5, 3), (4, 0.5, 2), (3, 0.01, 1), (3, 1.0, 3), (10, 0.25, 3), (10, 0.24, 2)],
)
def test_share_of_clients(tmp_path: Path, num_clients: int, fraction: float, count: int) -> None:
    server = fedavg_server(tmp_path, clients=range(num_clients), fraction_fit=fraction)
    assert len(server.ask(1)) == count
    everyone = server.strategy.configure_evaluate(3, None, server.manager)
    assert [proxy.client_id for proxy, _ in everyone] == list(range(num_clients))


def test_all_clients_are_asked_in_the_order_of_their_ids(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, clients=(2, 0, 1))
    assert [proxy.client_id for proxy, _ in server.ask(1)] == [0, 1, 2]
    server.ask(2)
    assert [proxy.num_asked for proxy in server.proxies] == [1, 1, 1]  # ids are learnt once


def test_two_nodes_with_one_client_id_are_refused(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, clients=(0, 1))
    twin = fedavg_server(tmp_path, clients=(1,)).proxies[0]
    twin.cid = "another node"
    server.manager.register(twin)
    with pytest.raises(ClientFailure, match=r"two nodes have the same client id \(\[0, 1, 1\]\)"):
        server.ask(1)


def test_too_few_clients_are_refused_by_name_of_the_key(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, clients=(0, 1), min_clients=3, wait_seconds=0)
    with pytest.raises(ClientFailure, match=r"2 clients .* 3 are needed.*aggregation\.min_clients"):
        server.ask(1)


@pytest.mark.parametrize("properties", [{}, {"client_id": "zero"}])
def test_a_node_that_is_no_client_is_refused(tmp_path: Path, properties: dict) -> None:
    server = fedavg_server(tmp_path, clients=(0, 1))
    server.proxies[1].properties = properties
    with pytest.raises(ClientFailure, match="node node7 does not say which client it is"):
        server.ask(1)
