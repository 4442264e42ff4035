"""Answers that a server must not absorb, and what it does about each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Parameters, Status

from fedpdm import wire
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.mechanism import SeededNoise, release
from fedpdm.storage.run_directory import RunDirectory
from strategies.roster import ClientFailure
from tests.support.strategy_fakes import (
    START,
    Arrays,
    Server,
    arrays,
    drift,
    evaluation,
    fedavg_server,
    fit_result,
    update,
)


def changed(name: str, value: np.ndarray) -> Arrays:
    return {**drift(1), name: value}


def spoiled(value: float) -> Arrays:
    weights = dict(drift(1))
    weights["conv.weight"] = weights["conv.weight"].copy()
    weights["conv.weight"][1, 2] = value
    return weights


def without(name: str) -> Arrays:
    return {key: array for key, array in drift(1).items() if key != name}


def a_release() -> FitRes:
    released = release(
        torch.zeros(10, 3, 4, 4),
        torch.zeros(10, dtype=torch.int64),
        schedule=make_schedule("linear", num_steps=1000, beta_start=1e-4, beta_end=0.02),
        t0=500,
        clip_norm=1.0,
        shift=0.0,
        noise=SeededNoise(np.random.SeedSequence(0)),
    )
    return fit_result(wire.encode_release(released, client_id=1), 10, {"client_id": 1})


def raw_parameters(data: bytes) -> FitRes:
    parameters = Parameters(tensors=[data], tensor_type="numpy.ndarray")
    return FitRes(Status(Code.OK, ""), parameters, 10, {"client_id": 1})


def positional() -> FitRes:
    """Weights as Flower's own examples send them: a list by position, names lost."""
    return fit_result([drift(1)[name] for name in sorted(START)], 10, {"client_id": 1})


def with_metrics(**metrics: Any) -> FitRes:
    return update(1, drift(1), metrics={"client_id": 1, **metrics})


# What client 1 sends instead of its update -> words of the refusal, besides "client 1".
BAD: dict[str, tuple[Callable[[], FitRes], str]] = {
    "nan": (lambda: update(1, spoiled(math.nan)), "conv.weight has values that are not finite"),
    "infinite": (lambda: update(1, spoiled(-math.inf)), "conv.weight has values that are not fin"),
    "missing name": (lambda: update(1, without("conv.bias")), "missing conv.bias"),
    "extra name": (lambda: update(1, changed("fine.bias", START["conv.bias"])), "unexpected fine"),
    "renamed": (lambda: update(1, {"w": START["conv.weight"], "b": START["conv.bias"]}), "missing"),
    "shape": (lambda: update(1, changed("conv.bias", np.zeros(3, np.float32))), r"got .*\(3,\)"),
    "turned": (lambda: update(1, changed("conv.weight", START["conv.weight"].T)), r"\(3, 2\)"),
    "dtype": (lambda: update(1, changed("conv.bias", np.zeros(2))), "torch.float64"),
    "earlier round": (lambda: update(1, drift(1), round=0), "made for round 0, expected 1"),
    "later round": (lambda: update(1, drift(1), round=2), "made for round 2, expected 1"),
    "another's update": (lambda: update(1, drift(1), says=2), "header says client 2"),
    "other count": (lambda: update(1, drift(1), counts=11), "11 examples; Flower says 10"),
    "no example": (lambda: update(1, drift(1), num_examples=0), "num_examples must be at least 1"),
    "negative count": (lambda: update(1, drift(1), num_examples=-5), "num_examples must be at lea"),
    "a release": (a_release, "expected a coarse-update message"),
    "seeded": (lambda: update(1, drift(1), seeded=True), "seeded, outside simulation"),
    "nothing": (lambda: fit_result([], 10, {"client_id": 1}), "got 0 arrays"),
    "positional weights": (positional, "got 2 arrays"),
    "noise": (lambda: fit_result([np.arange(64, dtype=np.uint8)], 10, {}), "malformed message"),
    "not an array": (lambda: raw_parameters(b"no array at all"), "not an array"),
    "empty tensor": (lambda: raw_parameters(b""), "not an array"),
    "zip archive": (lambda: raw_parameters(b"PK\x03\x04" + bytes(64)), "not an array"),
    "unlisted metric": (lambda: with_metrics(mean_pixel=0.5), "metric mean_pixel of client 1"),
    "metric type": (lambda: with_metrics(coarse_loss="low"), "coarse_loss of client 1 must be fl"),
    "another's metrics": (lambda: with_metrics(client_id=2), "metrics say client 2"),
    "its own error": (
        lambda: fit_result([], 0, {"client_id": 1, "error": "disk full"}),
        "client 1: disk full",
    ),
}


def with_bad(server: Server, bad: FitRes) -> None:
    server.ask(1)
    good = {k: update(k, drift(k), num_examples=n) for k, n in ((0, 30), (2, 10))}
    server.take(1, {0: good[0], 1: bad, 2: good[2]})


@pytest.mark.parametrize("kind", BAD)
def test_bad_answer_stops_the_run_and_names_the_client(tmp_path: Path, kind: str) -> None:
    make, words = BAD[kind]
    server = fedavg_server(tmp_path)
    with pytest.raises(ClientFailure, match=words) as caught:
        with_bad(server, make())
    assert "client 1" in str(caught.value)
    assert "client 0" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.strategy.rounds_done == 0
    assert np.array_equal(server.strategy.weights["conv.bias"], START["conv.bias"])
    assert list(tmp_path.iterdir()) == []  # nothing of the refused round is kept


def test_updates_of_a_simulation_are_seeded_and_absorbed(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, simulation=True)
    server.round(1, {k: update(k, drift(k), seeded=True) for k in (0, 1, 2)})
    assert server.strategy.rounds_done == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_bad_answer_is_left_out_when_failures_are_skipped(tmp_path: Path, kind: str) -> None:
    make, _ = BAD[kind]
    server = fedavg_server(tmp_path, on_failure="skip")
    with_bad(server, make())
    for name, got in arrays(server.strategy.weights).items():
        wanted = 0.75 * drift(0)[name].astype(np.float64) + 0.25 * drift(2)[name]
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    record = RunDirectory(tmp_path).read_json("metrics.json")["rounds"][0]
    assert [metrics["client_id"] for metrics in record["clients"]] == [0, 2]
    assert len(record["failed"]) == 1
    assert "client 1" in record["failed"][0]
    assert server.said == [f"round 1 fit failed: {record['failed'][0]}"]


def test_the_good_answer_of_client_1_is_accepted(tmp_path: Path) -> None:
    """The tables above refuse for the fault alone."""
    server = fedavg_server(tmp_path)
    with_bad(server, update(1, drift(1)))
    assert server.strategy.history["rounds"][0]["failed"] == []


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_if_all_clients_fail_the_run_stops(tmp_path: Path, on_failure: str) -> None:
    server = fedavg_server(tmp_path, on_failure=on_failure)
    server.ask(1)
    bad = {k: update(k, drift(k), round=9) for k in (0, 1, 2)}
    with pytest.raises(ClientFailure) as caught:
        server.take(1, bad)
    assert all(f"client {k}" in str(caught.value) for k in (0, 1, 2))


def failures(server: Server) -> list[Any]:
    """Failures as Flower reports them: an answer with an error status, or an exception."""
    parameters = Parameters(tensors=[], tensor_type="")
    lost = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no fit here"), parameters, 0, {})
    return [(server.proxy(1), lost), RuntimeError("node 42\ntimed out")]


def test_flower_failures_count_too(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, on_failure="skip")
    server.ask(1)
    server.take(1, {0: update(0, drift(0))}, failures(server))
    failed = server.strategy.history["rounds"][0]["failed"]
    assert failed == ["client 1: no fit here", "client 2: node 42 timed out"]
    strict = fedavg_server(tmp_path / "strict")
    strict.ask(1)
    with pytest.raises(ClientFailure, match="client 1: no fit here; client 2: node 42 timed out"):
        strict.take(1, {0: update(0, drift(0))}, failures(strict))


def test_an_exception_may_be_of_any_silent_client(tmp_path: Path) -> None:
    """Flower's exceptions carry no client; those that have answered are not suspected."""
    server = fedavg_server(tmp_path)
    server.ask(1)
    with pytest.raises(ClientFailure, match=r"fit: client 0 or client 2: TimeoutError$"):
        server.take(1, {1: update(1, drift(1))}, [TimeoutError()])


def test_a_round_without_any_answer_stops_the_run(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, on_failure="skip")
    server.ask(1)
    with pytest.raises(ValueError, match="round 1: no update to average"):
        server.take(1, {})


# Evaluation.


def evaluate(server: Server, results: dict[int, Any], round: int = 1) -> float | None:
    pairs = [(server.proxy(k), result) for k, result in results.items()]
    return server.strategy.aggregate_evaluate(round, pairs, [])[0]


def trained(root: Path, **changes: Any) -> Server:
    server = fedavg_server(root, **changes)
    server.round(1, {k: update(k, drift(k)) for k in (0, 1, 2)})
    return server


def test_held_out_loss_is_weighted_by_images(tmp_path: Path) -> None:
    server = trained(tmp_path)
    loss = evaluate(server, {2: evaluation(2, 4.0, 10), 0: evaluation(0, 1.0, 30)})
    assert loss == pytest.approx((4.0 * 10 + 1.0 * 30) / 40, rel=1e-12)
    assert server.strategy.history["rounds"][0]["heldout_coarse_loss"] == loss
    assert "final" not in server.strategy.history
    assert server.finished == []


BAD_EVALUATIONS = {
    "its own error": (evaluation(1, 0.0, 0, error="no images"), "client 1: no images"),
    "nan": (evaluation(1, math.nan, 10), "loss of client 1 must be at most 1e.12, got nan"),
    "infinite": (evaluation(1, math.inf, 10), "loss of client 1 must be at most 1e.12, got inf"),
    "no image": (evaluation(1, 1.0, 0), "client 1: num_examples must be at least 1, got 0"),
    "negative": (evaluation(1, 1.0, -3), "client 1: num_examples must be at least 1, got -3"),
    "unlisted metric": (evaluation(1, 1.0, 10, pixels=3), "metric pixels of client 1"),
    "another's metrics": (evaluation(1, 1.0, 10, client_id=0), "metrics say client 0"),
}


@pytest.mark.parametrize("kind", BAD_EVALUATIONS)
def test_bad_evaluation_is_refused_or_left_out(tmp_path: Path, kind: str) -> None:
    bad, words = BAD_EVALUATIONS[kind]
    server = trained(tmp_path)
    with pytest.raises(ClientFailure, match=words):
        evaluate(server, {0: evaluation(0, 2.0, 10), 1: bad})
    lenient = trained(tmp_path / "skip", on_failure="skip")
    assert evaluate(lenient, {0: evaluation(0, 2.0, 10), 1: bad}) == 2.0
    assert "client 1" in next(line for line in lenient.said if "evaluate failed" in line)
    with pytest.raises(ClientFailure, match=words):
        evaluate(lenient, {1: bad})


def test_the_last_evaluation_finishes_the_run_once(tmp_path: Path) -> None:
    server = trained(tmp_path, rounds=1)
    questions: Any = server.strategy.configure_evaluate(1, None, server.manager)
    assert [dict(ins.config) for _, ins in questions] == [{"round": 1, "final": True}] * 3
    evaluate(server, {2: evaluation(2, 1.5, 10), 0: evaluation(0, 1.5, 10)})
    ((ema, history),) = server.finished
    assert ema.keys() == START.keys()
    assert [metrics["client_id"] for metrics in history["final"]["clients"]] == [0, 2]
    stored = RunDirectory(tmp_path).load_checkpoint()
    assert stored is not None
    assert stored[2]["final"]["heldout_coarse_loss"] == 1.5


def test_a_run_whose_results_cannot_be_written_is_not_finished(tmp_path: Path) -> None:
    server = trained(tmp_path, rounds=1)

    def no_space(ema: Any, history: Any) -> None:
        raise OSError(28, "no space left")

    server.strategy._finish = no_space
    with pytest.raises(OSError, match="no space left"):
        evaluate(server, {0: evaluation(0, 1.5, 10)})
    stored = RunDirectory(tmp_path).load_checkpoint()
    assert stored is not None
    assert "final" not in stored[2]  # `RunDirectory.check` would refuse to resume


def test_a_run_cut_before_its_last_evaluation_resumes_with_that_alone(tmp_path: Path) -> None:
    trained(tmp_path, rounds=1)
    server = fedavg_server(tmp_path, rounds=1)
    server.strategy.resume()
    assert server.strategy.rounds_left() == 1
    assert server.ask(1) == []
    questions: Any = server.strategy.configure_evaluate(1, None, server.manager)
    assert all(ins.config["final"] is True for _, ins in questions)
    evaluate(server, {0: evaluation(0, 1.5, 10)})
    assert len(server.finished) == 1


def test_evaluations_come_every_so_many_rounds_and_at_the_end(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, rounds=5, evaluate_every=2)
    asked = []
    for round in range(1, 6):
        server.round(round, {k: update(k, drift(k), round=round) for k in (0, 1, 2)})
        if server.strategy.configure_evaluate(round, None, server.manager):
            asked.append(round)
            evaluate(server, {0: evaluation(0, 1.0, 10)}, round)
    assert asked == [2, 4, 5]
    assert [line.split()[1] for line in server.said] == [f"{r}/5" for r in range(1, 6)]
