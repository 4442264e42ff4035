"""The server of a private network: the step that it takes, and participants that mean harm."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import FitRes, parameters_to_ndarrays

from fedpdm import wire
from fedpdm.privacy.mechanism import GradientParameters, ReleasedGradient, largest_total
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.build import GAUSSIANS, NETWORK, named_part
from fedpdm.setup.run_setup import RunSetup, set_up
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import LONGEST
from fedpdm.wire.types import CoarseUpdate, Phase
from strategies.network import CoarseNetwork
from strategies.roster import ClientFailure
from tests.support.gradient_toys import (
    MECHANISM,
    QUIET,
    first_weights,
    network_config,
)
from tests.support.release_toys import image_set
from tests.support.statistics_toys import asked as asked_for_sums
from tests.support.strategy_fakes import Server, arrays, fit_result, settings

COUNTS = {0: 30, 1: 20, 2: 50}  # images of each client
FIRST = 4  # the run's first round of gradients, of three


@pytest.fixture(scope="module")
def setup() -> RunSetup:
    return set_up(network_config(coarse={"weight_decay": 0.1}, network={"clip_norm": 0.25}))


def plan_of(setup: RunSetup) -> GradientParameters:
    plan = setup.release_plan.gradients
    assert plan is not None
    return plan


def server_of(setup: RunSetup, root: Path, **changes: Any) -> Server:
    """A server whose rounds of sums are over: its next one is the first of gradients."""
    said: list[str] = []
    finished: list[Any] = []
    options = {"rounds": 7, "evaluate_every": 99, "simulation": True, "on_failure": "skip"}
    strategy = CoarseNetwork(
        setup=setup,
        settings=settings(**{**options, **changes}),
        weights={},
        run=RunDirectory(root),
        announce=said.append,
        finish=lambda ema, history: finished.append((arrays(ema), history)),
    )
    fresh = first_weights(setup)
    strategy._trainer.restart(fresh, step=0, what="test")
    strategy.weights = {GAUSSIANS + "means": torch.zeros(3)}
    strategy._take()
    strategy.average(FIRST - 1)
    strategy.book.go_on(FIRST - 1, {"rounds": [{"seconds": 0.0}] * 3})
    server = Server(strategy, said, finished).connect(list(COUNTS))
    said.clear()
    return server


def size_of(setup: RunSetup) -> int:
    return sum(w.numel() for w in first_weights(setup).values())


def flat(weights: dict[str, Any], prefix: str = NETWORK) -> np.ndarray:
    parts = [np.asarray(w, dtype=np.float64).ravel() for w in named_part(weights, prefix).values()]
    return np.concatenate(parts)


def total_of(setup: RunSetup, client: int, number: int = 1) -> np.ndarray:
    rng = np.random.default_rng((client, number))
    return rng.integers(-90_000, 90_000, size_of(setup))


def honest(setup: RunSetup, client: int, number: int = 1) -> ReleasedGradient:
    whole = total_of(setup, client, number)
    return MECHANISM.noised(whole, plan_of(setup), number=number, noise=QUIET)


def answer(client: int, released: Any, *, says: int | None = None) -> FitRes:
    packed = wire.encode_release(released, client_id=client if says is None else says)
    return fit_result(packed, COUNTS[client], {"client_id": client})


# --- The step ----------------------------------------------------------------------------------


class Adam:
    """AdamW in float64, by its paper (Loshchilov and Hutter 2019), with this project's beta2."""

    def __init__(self, weights: np.ndarray, *, lr: float, decay: float) -> None:
        self.weights, self.lr, self.decay, self.t = weights, lr, decay, 0
        self.m = self.v = np.zeros_like(weights)

    def step(self, gradient: np.ndarray) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.99 * self.v + 0.01 * gradient**2
        m, v = self.m / (1.0 - 0.9**self.t), self.v / (1.0 - 0.99**self.t)
        self.weights = self.weights * (1.0 - self.lr * self.decay)
        self.weights = self.weights - self.lr * m / (np.sqrt(v) + 1e-8)


def test_a_step_is_adam_with_the_mean_clipped_gradient(setup: RunSetup, tmp_path: Path) -> None:
    """sum C / (sqrt(L) q N) of the clients that answered, whatever order they come in."""
    server, plan = server_of(setup, tmp_path), plan_of(setup)
    own, wrong = (Adam(flat(server.strategy.weights), lr=1e-3, decay=0.1) for _ in range(2))
    average = own.weights
    steps = math.sqrt(math.floor((4096 / plan.noise_multiplier) ** 2))
    for number, clients in ((1, (2, 0, 1)), (2, (1, 2)), (3, (0, 1, 2))):
        requests = server.ask(number)
        sent = wire.decode_model(parameters_to_ndarrays(requests[0][1].parameters))
        np.testing.assert_allclose(flat(dict(sent), ""), own.weights, rtol=2e-4, atol=1e-6)
        assert requests[0][1].config["phase"] == "gradient"
        assert len(requests) == 3
        server.take(number, {k: answer(k, honest(setup, k, number)) for k in clients})
        total = np.sum([total_of(setup, k, number) for k in clients], axis=0)
        images = sum(COUNTS[k] for k in clients)
        gradient = total * 0.25 / (steps * 0.3 * images)
        own.step(gradient)
        wrong.step(gradient * images / 100)  # planted: the mean over all images of all clients
        decay = min(0.999, (1 + number) / (10 + number))
        average = decay * average + (1.0 - decay) * own.weights
        np.testing.assert_allclose(flat(server.strategy.weights), own.weights, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(flat(server.strategy.ema), average, rtol=2e-4, atol=1e-6)
        record = server.strategy.history["rounds"][-1]
        assert record["network_steps"] == number
        assert record["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        noise = plan.noise_multiplier * 0.25 * math.sqrt(len(clients) * len(total))
        assert record["gradient_noise"] == pytest.approx(noise / (0.3 * images), rel=1e-6)
    assert server.strategy.phase(7) is Phase.FINE
    assert server.strategy.weights[GAUSSIANS + "means"].tolist() == [0.0] * 3
    assert np.abs(wrong.weights - own.weights).max() > 1e-4


def test_a_server_that_starts_again_goes_on_with_its_moments(
    setup: RunSetup, tmp_path: Path
) -> None:
    ends = []
    for stops in (False, True):
        root = tmp_path / str(stops)
        server = server_of(setup, root)
        server.ask(1)
        server.take(1, {k: answer(k, honest(setup, k, 1)) for k in COUNTS})
        if stops:
            server = server_of(setup, root)
            server.strategy.resume()
            assert server.strategy.rounds_done == FIRST
        number = 1 if stops else 2
        server.ask(number)
        server.take(number, {k: answer(k, honest(setup, k, 2)) for k in COUNTS})
        ends.append((flat(server.strategy.weights), flat(server.strategy.ema)))
    np.testing.assert_array_equal(ends[0], ends[1])


# --- Participants that mean harm ---------------------------------------------------------------


def with_plan(setup: RunSetup, **changes: Any) -> ReleasedGradient:
    """An honest sum that says that it is of another plan."""
    plan = dataclasses.replace(plan_of(setup), **changes)
    return dataclasses.replace(honest(setup, 1), parameters=plan, event=MECHANISM.event(plan))


def with_total(setup: RunSetup, total: torch.Tensor) -> ReleasedGradient:
    return dataclasses.replace(honest(setup, 1), total=total)


def spoiled(setup: RunSetup, value: int) -> torch.Tensor:
    total = honest(setup, 1).total.clone()
    total[77] = value
    return total


def most(setup: RunSetup) -> int:
    return largest_total(plan_of(setup), COUNTS[1])


def sums(setup: RunSetup, root: Path) -> FitRes:
    """Class statistics, which were asked for in earlier rounds."""
    return answer(1, ReleaseStore(root).obtain(image_set(6), asked_for_sums(0)))


def update(setup: RunSetup) -> FitRes:
    made = CoarseUpdate(
        weights=first_weights(setup), num_examples=20, client_id=1, round=FIRST, seeded=False
    )
    return fit_result(wire.encode_update(made), 20, {"client_id": 1})


HOSTILE: dict[str, tuple[Callable[[RunSetup, Path], FitRes], str]] = {
    "short": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total[:-1])),
        "must be 42435 numbers of at least 1 image, got 42434 of 20",
    ),
    "empty": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total[:0])), "got 0 of 20"
    ),
    "long": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total.repeat(2))), "bytes, where at most"
    ),
    "a little long": (
        lambda s, _: answer(1, with_total(s, torch.cat([honest(s, 1).total, torch.ones(1).int()]))),
        "got 42436 of 20",
    ),
    "next round": (lambda s, _: answer(1, honest(s, 1, 2)), "round 2 of .*expected round 1 of"),
    "no round": (lambda s, _: answer(1, honest(s, 1, 0)), "round 0 of .*expected round 1 of"),
    "beyond the plan": (
        lambda s, _: answer(1, dataclasses.replace(honest(s, 1), round=torch.tensor([9]))),
        r"round must be in \[0, 3\]",
    ),
    "clip norm": (lambda s, _: answer(1, with_plan(s, clip_norm=1.0)), "clip_norm=1.0.*expected"),
    "less noise": (
        lambda s, _: answer(1, with_plan(s, noise_multiplier=0.9 * plan_of(s).noise_multiplier)),
        "round 1 of .*, expected round 1 of",
    ),
    "no noise": (
        lambda s, _: answer(1, with_plan(s, noise_multiplier=1e-300)),
        "noise_multiplier must be at least 0.001",
    ),
    "another run": (lambda s, _: answer(1, with_plan(s, run="x" * 5000)), "run='xxx"),
    "huge": (
        lambda s, _: answer(1, with_total(s, spoiled(s, most(s) + 1))),
        "a sum of 20 gradients must be within",
    ),
    "lowest": (
        lambda s, _: answer(1, with_total(s, spoiled(s, -(2**31)))), "got 2147483648"
    ),
    "floats": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total.float())), "total int32"
    ),
    "64 bits": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total.long())),
        "total int32|bytes, where at most",
    ),
    "a table": (
        lambda s, _: answer(1, with_total(s, honest(s, 1).total[None])), "one dimension"
    ),
    "another client": (lambda s, _: answer(1, honest(s, 1), says=2), "header says client 2"),
    "class statistics": (sums, "made by mechanism 'statistics', expected network"),
    "a model": (lambda s, _: update(s), "expected a release message|bytes, where at most"),
    "nothing": (lambda s, _: fit_result([], 20, {"client_id": 1}), "client 1: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_round_goes_on_without_a_hostile_answer(
    setup: RunSetup, tmp_path: Path, kind: str
) -> None:
    make, words = HOSTILE[kind]
    server = server_of(setup, tmp_path / "run")
    server.ask(1)
    bad = make(setup, tmp_path / "sums")
    server.take(1, {1: bad, **{k: answer(k, honest(setup, k)) for k in (0, 2)}})
    (line,) = server.said
    assert line.startswith("round 4 fit failed: client 1: ")
    assert re.search(words, line), line
    assert line.isprintable()
    assert len(line) < LONGEST + 50
    wanted = two_alone(setup, tmp_path / "two")
    np.testing.assert_array_equal(flat(server.strategy.weights), wanted)


_ALONE: list[np.ndarray] = []


def two_alone(setup: RunSetup, root: Path) -> np.ndarray:
    """The weights after a round of clients 0 and 2."""
    if not _ALONE:
        server = server_of(setup, root)
        server.ask(1)
        server.take(1, {k: answer(k, honest(setup, k)) for k in (0, 2)})
        _ALONE.append(flat(server.strategy.weights))
    return _ALONE[0]


def test_where_failures_stop_a_run_nothing_is_taken(setup: RunSetup, tmp_path: Path) -> None:
    server = server_of(setup, tmp_path / "strict", on_failure="raise")
    before = flat(server.strategy.weights)
    server.ask(1)
    with pytest.raises(ClientFailure, match=r"client 1: .*expected round 1 of"):
        server.take(1, {1: answer(1, honest(setup, 1, 2)), 0: answer(0, honest(setup, 0))})
    np.testing.assert_array_equal(flat(server.strategy.weights), before)
    alone = server_of(setup, tmp_path / "nobody")
    alone.ask(1)
    with pytest.raises(ClientFailure, match="client 1: "):  # a mean of no images
        alone.take(1, {1: answer(1, honest(setup, 1, 2))})
    np.testing.assert_array_equal(flat(alone.strategy.weights), before)


def test_seeded_noise_is_for_simulations(setup: RunSetup, tmp_path: Path) -> None:
    server = server_of(setup, tmp_path, simulation=False)
    server.ask(1)
    real = dataclasses.replace(
        honest(setup, 0), seeded=False,
        noise_source="operating-system entropy, ChaCha20, 256-bit key",
    )  # fmt: skip
    server.take(1, {0: answer(0, real), 1: answer(1, honest(setup, 1))})
    (line,) = server.said
    assert line.endswith("client 1: release of client 1: its noise is seeded, outside simulation")
    assert server.strategy.history["rounds"][-1]["network_steps"] == 1


def test_the_largest_honest_sum_is_taken(setup: RunSetup, tmp_path: Path) -> None:
    """Machines may round the plan's noise differently in the last digit."""
    server = server_of(setup, tmp_path)
    server.ask(1)
    edge = with_total(setup, spoiled(setup, -most(setup)))
    near = dataclasses.replace(
        plan_of(setup), noise_multiplier=plan_of(setup).noise_multiplier * (1.0 + 1e-12)
    )
    edge = dataclasses.replace(edge, parameters=near, event=MECHANISM.event(near))
    server.take(1, {1: answer(1, edge)})
    assert server.said == []
    assert server.strategy.history["rounds"][-1]["network_steps"] == 1
