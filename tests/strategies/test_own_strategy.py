"""A custom strategy: what it need not check itself, how it is resumed and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import FitRes

from fedpdm.config import ConfigError, config_from_mapping, config_to_yaml
from fedpdm.config.aggregation import METHODS
from fedpdm.engines.inprocess import run_in_process
from fedpdm.storage.run_directory import RunDirectory
from strategies.coarse import CoarseStrategy
from strategies.own import own_strategy
from strategies.roster import ClientFailure
from tests.support.command_line import call, forget_surroundings
from tests.support.federations import small_config
from tests.support.own_code import MODULE, write_module
from tests.support.refusals import Refuser
from tests.support.strategy_fakes import (
    START,
    Arrays,
    Server,
    arrays,
    drift,
    settings,
    tensors,
    update,
)

METHOD = f"{MODULE}:PlainMean"


class PlainMean(CoarseStrategy):
    """No check of its own."""

    def merge(self, round: int) -> dict[str, float]:
        for name in self.weights:
            every = torch.stack([update.weights[name] for update in self.updates])
            self.weights[name] = every.mean(dim=0)
        return {"updates": len(self.updates)}


def make_server(root: Path, **changes: Any) -> Server:
    said: list[str] = []
    finished: list[Any] = []
    strategy = PlainMean(
        settings=settings(**changes),
        weights=tensors(START),
        run=RunDirectory(root),
        announce=said.append,
        finish=lambda ema, history: finished.append((arrays(ema), history)),
    )
    return Server(strategy, said, finished).connect((0, 1, 2))


def without(name: str) -> Arrays:
    return {key: value for key, value in drift(1).items() if key != name}


def test_updates_come_in_the_order_of_clients_and_the_average_follows(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    got = server.round(1, {k: update(k, drift(k), num_examples=10 * k + 1) for k in (2, 0, 1)})
    decay = min(0.5, 2 / 11)
    for name, start in START.items():
        mean = np.mean([drift(k)[name].astype(np.float64) for k in (0, 1, 2)], axis=0)
        np.testing.assert_allclose(got[name], mean, rtol=1e-6, atol=1e-6)
        wanted = decay * start + (1 - decay) * mean
        np.testing.assert_allclose(server.strategy.ema[name], wanted, rtol=1e-6, atol=1e-6)
    assert server.strategy.history["rounds"][0]["updates"] == 3
    server.round(2, {k: update(k, drift(k, 2), round=2) for k in (0, 2)})
    assert server.strategy.history["rounds"][1]["updates"] == 2  # none of the round before


BAD: dict[str, tuple[Callable[[], FitRes], str]] = {
    "another client": (lambda: update(1, drift(1), says=2), "header says client 2"),
    "another count": (lambda: update(1, drift(1), counts=99), "99 examples; Flower says 10"),
    "another name": (
        lambda: update(1, {**without("conv.bias"), "other": START["conv.bias"]}),
        "conv.bias|other",
    ),
    "missing": (lambda: update(1, without("conv.bias")), "conv.bias"),
    "another shape": (
        lambda: update(1, {**drift(1), "conv.bias": np.zeros(3, dtype=np.float32)}),
        "conv.bias",
    ),
    "not finite": (
        lambda: update(1, {**drift(1), "conv.bias": np.full(2, np.nan, dtype=np.float32)}),
        "conv.bias",
    ),
    "another round": (lambda: update(1, drift(1), round=2), "made for round 2, expected 1"),
    "seeded noise": (lambda: update(1, drift(1), seeded=True), "seeded, outside simulation"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_a_subclass_without_checks_refuses_all_the_same(
    tmp_path: Path, kind: str, on_failure: str
) -> None:
    make, words = BAD[kind]
    server = make_server(tmp_path, on_failure=on_failure)
    server.ask(1)
    answers = {0: update(0, drift(0)), 1: make(), 2: update(2, drift(2))}
    if on_failure == "raise":
        with pytest.raises(ClientFailure, match=f"client 1: .*({words})"):
            server.take(1, answers)
        assert all(np.array_equal(server.strategy.weights[n], START[n]) for n in START)
        return
    server.take(1, answers)
    for name, value in arrays(server.strategy.weights).items():
        wanted = (drift(0)[name].astype(np.float64) + drift(2)[name]) / 2
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)


def test_a_long_update_is_shortened_for_every_strategy(tmp_path: Path) -> None:
    server = make_server(tmp_path, max_update_norm=0.01)
    got = server.round(1, {k: update(k, drift(k)) for k in (0, 1, 2)})
    moved = sum(float(np.square(got[n] - START[n]).sum()) for n in START) ** 0.5
    assert 0 < moved <= 0.01 * 1.0001
    assert server.strategy.history["rounds"][0]["shortened_updates"] == 3


# By name.


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the module, in which commands are run."""
    folder = tmp_path / "mine"
    write_module(folder)
    forget_surroundings(monkeypatch, folder)
    monkeypatch.chdir(folder)
    return folder


def test_a_method_of_this_package_is_no_code_of_ones_own() -> None:
    assert all(own_strategy(method) is None for method in METHODS)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (f"{MODULE}:stripes", "must be a subclass of strategies.coarse.CoarseStrategy"),
        (f"{MODULE}:NoMerge", "must define merge"),
        (f"{MODULE}:Nothing", f"module {MODULE} has no Nothing"),
        ("nowhere_at_all:Mine", "cannot be imported"),
    ],
)
def test_what_is_no_strategy_is_one_line(mine: Path, method: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^aggregation.method: '{method}'") as caught:
        own_strategy(method)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"coarse": {"training": "server"}}, "needs coarse.training: federated, got server"),
        (
            {"aggregation": {"secure": True, "max_examples": 9}, "partition": {"num_clients": 4}},
            "a server that sees only the sum cannot look at single updates",
        ),
    ],
)
def test_it_goes_with_plain_federated_updates_alone(section: dict[str, Any], line: str) -> None:
    aggregation = {**section.pop("aggregation", {}), "method": METHOD}
    with pytest.raises(ConfigError, match=r"^aggregation\.method: ") as caught:
        config_from_mapping({**section, "aggregation": aggregation})
    assert line in str(caught.value)


@pytest.mark.slow
def test_it_runs_by_name_and_its_state_survives_a_resume(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(aggregation={"method": METHOD}, evaluation={"image_metrics": False})
    run_in_process(config, mine / "whole")
    whole = RunDirectory(mine / "whole")
    rounds = whole.read_json("metrics.json")["rounds"]
    assert 0 < rounds[0]["moved"] < rounds[1]["moved"]

    class Stopped(Exception):
        """Stands for a crash after the first round."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(CoarseStrategy, "configure_evaluate", stop)
        with pytest.raises(Stopped):
            run_in_process(config, mine / "cut")
    run_in_process(config, mine / "cut", resume=True)
    cut = RunDirectory(mine / "cut")
    assert [r["moved"] for r in cut.read_json("metrics.json")["rounds"]] == [
        record["moved"] for record in rounds
    ]
    saved = [run.load_checkpoint() for run in (whole, cut)]
    assert saved[0] is not None
    assert saved[1] is not None
    assert saved[0][1].keys() == saved[1][1].keys()
    assert "extra.moved" in saved[0][1]
    assert all(torch.equal(saved[0][1][name], saved[1][1][name]) for name in saved[0][1])


@pytest.mark.slow
def test_fedpdm_run_takes_it_from_the_directory_where_it_is_started(mine: Path) -> None:
    config = small_config(run={"rounds": 1}, evaluation={"image_metrics": False})
    (mine / "digits.yaml").write_text(config_to_yaml(config))
    arguments = ("--set", f"aggregation.method={METHOD}", "--engine", "inprocess", "--out", "out")
    assert call("run", "digits.yaml", *arguments) == 0
    record = json.loads((mine / "out" / "metrics.json").read_text())["rounds"][0]
    assert record["moved"] > 0


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (":Mine", "must have the form package.module:NAME"),
        ("nowhere_at_all:Mine", "cannot be imported"),
        ("json:dumps", "must be a subclass"),
        ("fedavgg", "did you mean fedavg?"),
    ],
)
def test_fedpdm_run_refuses_before_anything_is_written(
    method: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuser = Refuser(tmp_path, capsys, monkeypatch)
    said = refuser.run_line(f"aggregation.method={method}")
    assert said.startswith("fedpdm: aggregation.method: ")
    assert line in said
