"""Robust means and the norm bound: their arithmetic, what a lying client can do, and refusals."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedpdm.config import AggregationConfig, ConfigError
from fedpdm.storage.run_directory import RunDirectory
from strategies.robust import RobustMean, shorten
from tests.support.federations import small_config
from tests.support.strategy_fakes import START, Arrays, Server, arrays, drift, fedavg_server, update

CLIENTS = range(7)
LIAR = 3
METHODS: Mapping[str, dict[str, Any]] = {
    "median": {},
    "trimmed_mean": {"trimmed_share": 0.3},  # two of seven at each end
    "krum": {"num_malicious": 2},
    "multi-krum": {"num_malicious": 2, "krum_keep": 4},
}


def server(root: Path, kind: str, **changes: Any) -> Server:
    method = kind.removeprefix("multi-")
    options = {**METHODS.get(kind, {}), **changes}
    return fedavg_server(root, clients=CLIENTS, method=method, **options)


def counts(client: int) -> int:
    return 5 + 3 * client


def flat(named: Arrays) -> np.ndarray:
    return np.concatenate([named[name].astype(np.float64).ravel() for name in sorted(START)])


def lie(scale: float = 1000.0) -> Arrays:
    """The honest mean update with its sign turned, many times as long."""
    honest = [drift(k) for k in CLIENTS if k != LIAR]
    return {
        name: (
            START[name] - scale * (np.mean([h[name] for h in honest], axis=0) - START[name])
        ).astype(np.float32)
        for name in START
    }


def by_hand(kind: str, sent: Mapping[int, Arrays]) -> np.ndarray:
    """The robust mean of flat updates in float64, by numpy, scipy and the definition of Krum."""
    rows = np.stack([flat(sent[k]) for k in sorted(sent)])
    if kind == "median":
        return np.median(rows, axis=0)
    if kind == "trimmed_mean":
        return np.asarray(stats.trim_mean(rows, METHODS[kind]["trimmed_share"], axis=0))
    n, f = len(rows), METHODS[kind]["num_malicious"]
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    # Blanchard et al. 2017, section 4: the sum over the n - f - 2 closest others.
    scores = np.sort(distances + np.diag(np.full(n, np.inf)), axis=1)[:, : n - f - 2].sum(axis=1)
    best = np.argsort(scores)[: METHODS[kind].get("krum_keep", 1)]
    weights = np.array([counts(sorted(sent)[k]) for k in best], dtype=np.float64)
    return (weights[:, None] * rows[best]).sum(axis=0) / weights.sum()


def round_of(made: Server, sent: Mapping[int, Arrays], round: int = 1) -> Arrays:
    return made.round(
        round, {k: update(k, w, round=round, num_examples=counts(k)) for k, w in sent.items()}
    )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("lying", [False, True])
def test_the_arithmetic_is_that_of_the_definitions(tmp_path: Path, kind: str, lying: bool) -> None:
    sent = {k: drift(k) for k in CLIENTS}
    if lying:
        sent[LIAR] = lie()
    got = round_of(server(tmp_path, kind), sent)
    np.testing.assert_allclose(flat(got), by_hand(kind, sent), rtol=2e-6, atol=2e-6)
    assert {name: (v.dtype, v.shape) for name, v in got.items()} == {
        name: (np.float32, v.shape) for name, v in START.items()
    }
    assert not (tmp_path / "server" / "updates" / "000000.safetensors").exists()


@pytest.mark.parametrize("kind", ["fedavg", *METHODS])
def test_one_liar_wrecks_the_plain_mean_alone(tmp_path: Path, kind: str) -> None:
    """The honest updates are about 0.1 long in each number; the lie is a thousand times that."""
    sent = {k: drift(k) for k in CLIENTS}
    honest = np.stack([flat(sent[k]) for k in CLIENTS if k != LIAR])
    sent[LIAR] = lie()
    moved = np.abs(flat(round_of(server(tmp_path, kind), sent)) - flat(START)).max()
    reach = np.abs(honest - flat(START)).max()
    assert moved <= reach if kind != "fedavg" else moved > 20 * reach


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "krum"])
def test_claimed_images_give_no_weight(tmp_path: Path, kind: str) -> None:
    made = [server(tmp_path / name, kind) for name in ("modest", "boasting")]
    sent = {k: drift(k) for k in CLIENTS}
    results = [
        one.round(
            1, {k: update(k, w, num_examples=10**9 if k == most else 5) for k, w in sent.items()}
        )
        for one, most in zip(made, (-1, LIAR), strict=True)
    ]
    np.testing.assert_array_equal(flat(results[0]), flat(results[1]))


@pytest.mark.parametrize("kind", METHODS)
def test_any_order_of_arrival_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    sent = {k: drift(k) for k in CLIENTS}
    orders = list(itertools.permutations(CLIENTS))[:: 7 * 6 * 5 * 4]
    results = [
        flat(round_of(server(tmp_path / str(i), kind), {k: sent[k] for k in order}))
        for i, order in enumerate(orders)
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_updates_wait_on_disk_until_the_round_is_over() -> None:
    held: dict[int, Any] = {}
    mean = RobustMean(AggregationConfig(method="median"), keep=held.__setitem__, recall=held.pop)
    for k in CLIENTS:
        mean.add(k, {"w": torch.full((2,), float(k))}, num_examples=1)
    assert sorted(held) == list(CLIENTS)
    assert not any(isinstance(value, torch.Tensor) for value in vars(mean).values())
    assert mean.finish()["w"].tolist() == [3.0, 3.0]
    assert held == {}


def test_a_robust_run_can_be_resumed(tmp_path: Path) -> None:
    sent = {r: {k: drift(k, r) for k in CLIENTS} for r in (1, 2)}
    whole = server(tmp_path / "whole", "median")
    round_of(whole, sent[1])
    wanted = round_of(whole, sent[2], round=2)
    round_of(server(tmp_path / "cut", "median"), sent[1])
    resumed = server(tmp_path / "cut", "median")
    resumed.strategy.resume()
    resumed.ask(2)
    resumed.take(2, {k: update(k, w, round=2) for k, w in sent[2].items()})
    np.testing.assert_array_equal(flat(arrays(resumed.strategy.weights)), flat(wanted))


# --- Bounds against the number of clients ---------------------------------------------------

FEW: dict[str, tuple[dict[str, Any], int, str]] = {
    "median": ({}, 2, "median needs at least 3 updates in a round, got 2"),
    "trimmed_mean": ({"trimmed_share": 0.2}, 4, "0.2 of 4 updates in a round cuts off none"),
    "krum": ({"num_malicious": 1}, 4, "krum with 1 needs at least 5 updates in a round, got 4"),
}


@pytest.mark.parametrize("method", FEW)
def test_too_few_answers_stop_the_round(tmp_path: Path, method: str) -> None:
    """Also where failures are skipped: fewer updates would not be protected."""
    options, left, words = FEW[method]
    made = fedavg_server(tmp_path, clients=CLIENTS, method=method, on_failure="skip", **options)
    made.ask(1)
    results = {k: update(k, drift(k), round=1 if k < left else 9) for k in CLIENTS}
    with pytest.raises(ValueError, match=words):
        made.take(1, results)
    np.testing.assert_array_equal(made.strategy.weights["conv.bias"], START["conv.bias"])
    assert made.strategy.rounds_done == 0


@pytest.mark.parametrize("method", FEW)
def test_too_few_clients_are_refused_by_the_config(method: str) -> None:
    options, num_clients, words = FEW[method]
    section = {"method": method, **options}
    with pytest.raises(ConfigError, match=f"^aggregation.*{words}"):
        small_config(partition={"num_clients": num_clients}, aggregation=section)
    small_config(partition={"num_clients": num_clients + 1}, aggregation=section)
    with pytest.raises(ConfigError, match="updates in a round"):  # most clients sit out
        small_config(
            partition={"num_clients": 10}, aggregation={**section, "fraction_fit": num_clients / 10}
        )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"method": "krum", "krum_keep": 5}, "krum_keep: must be at most 4, .* got 5"),
        ({"method": "krum", "num_malicious": -1}, "num_malicious: must be at least 0"),
        ({"method": "trimmed_mean", "trimmed_share": 0.5}, "trimmed_share: must be less than 0.5"),
        ({"method": "bulyan"}, "aggregation.method: must be one of"),
        ({"max_update_norm": 0.0}, "max_update_norm: must be greater than 0"),
        ({"max_examples": 0}, "max_examples: must be at least 1"),
    ],
)
def test_keys_are_checked(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(partition={"num_clients": 5}, aggregation=section)


@pytest.mark.parametrize("section", [{"method": "median"}, {"max_update_norm": 1.0}])
def test_protection_that_would_do_nothing_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs coarse\.training: federated, got server"):
        small_config(coarse={"training": "server"}, aggregation=section)


# --- The norm bound -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.0, 0.2, 0.999, 1.0, 1.001, 40.0, 1e30])
def test_updates_are_shortened_to_the_bound(length: float) -> None:
    rng = np.random.default_rng(0)
    ways = {name: rng.standard_normal(array.shape) for name, array in START.items()}
    size = math.sqrt(sum(float((way**2).sum()) for way in ways.values()))
    received = {n: torch.from_numpy(a.copy()) for n, a in START.items()}
    sent = {n: received[n] + torch.from_numpy(ways[n] * length / size).float() for n in START}
    actual = {n: sent[n].double().numpy() - START[n] for n in START}
    norm = math.sqrt(sum(float((a**2).sum()) for a in actual.values()))
    before = {n: t.clone() for n, t in sent.items()}
    kept, reported = shorten(sent, received, max_norm=1.0)
    assert reported == pytest.approx(norm, rel=1e-12)
    factor = min(1.0, 1.0 / norm) if norm else 1.0
    for name in START:
        wanted = START[name] + factor * actual[name]
        np.testing.assert_allclose(kept[name].numpy(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(sent[name], before[name])  # they lie in the message's memory
    assert (kept is sent) == (norm <= 1.0)


def test_a_bounded_liar_moves_the_mean_by_no_more_than_the_bound(tmp_path: Path) -> None:
    made = server(tmp_path, "fedavg", max_update_norm=0.5)
    sent = {k: drift(k) for k in CLIENTS}
    sent[LIAR] = lie()
    weights = np.array([counts(k) for k in CLIENTS], dtype=np.float64)
    steps = np.stack([flat(sent[k]) - flat(START) for k in CLIENTS])
    steps *= np.minimum(1.0, 0.5 / np.linalg.norm(steps, axis=1))[:, None]
    wanted = flat(START) + (weights[:, None] * steps).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(flat(round_of(made, sent)), wanted, rtol=2e-6, atol=2e-6)
    record = RunDirectory(tmp_path).read_json("metrics.json")["rounds"][0]
    assert record["shortened_updates"] == 1
    assert record["failed"] == []
    json.dumps(record, allow_nan=False)
