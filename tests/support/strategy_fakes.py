"""A server's counterpart by hand: proxies that only say who they are, and answers to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common import (
    Code,
    EvaluateRes,
    FitIns,
    FitRes,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from fedpdm import wire
from fedpdm.config import AggregationConfig
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.types import CoarseUpdate
from strategies.coarse import CoarseStrategy
from strategies.fedavg import CoarseFedAvg
from strategies.roster import ServerSettings

Arrays = Mapping[str, np.ndarray]
START: Arrays = {
    "conv.weight": np.array([[0.5, -1.0, 2.0], [0.25, 3.0, -0.125]], dtype=np.float32),
    "conv.bias": np.array([1.0, -2.0], dtype=np.float32),
}
FINE = Status(Code.OK, "")


class FakeProxy(ClientProxy):
    """Answers `get_properties` alone; a node's id says nothing about its client's."""

    def __init__(self, client_id: int) -> None:
        super().__init__(f"node{(7 * client_id) % 11}")
        self.client_id = client_id
        self.num_asked = 0
        self.properties: dict[str, Any] = {"client_id": client_id}

    def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> GetPropertiesRes:
        self.num_asked += 1
        return GetPropertiesRes(FINE, self.properties)

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("strategies send nothing themselves")

    get_parameters = fit = evaluate = reconnect = _refuse


class Server:
    """One strategy and its clients, with all that it told and wrote."""

    def __init__(self, strategy: CoarseStrategy, said: list[str], finished: list[Any]) -> None:
        self.strategy, self.said, self.finished = strategy, said, finished
        self.manager = SimpleClientManager()
        self.proxies: list[FakeProxy] = []

    def connect(self, client_ids: Sequence[int]) -> Server:
        for client_id in client_ids:
            self.proxies.append(FakeProxy(client_id))
            self.manager.register(self.proxies[-1])
        return self

    def ask(self, server_round: int) -> list[tuple[FakeProxy, FitIns]]:
        """The requests of a round, by client id."""
        requests: Any = self.strategy.configure_fit(server_round, EMPTY, self.manager)
        return list(requests)

    def take(
        self, server_round: int, results: Mapping[int, FitRes], failures: Sequence[Any] = ()
    ) -> None:
        """Hand over answers in the order of `results`."""
        pairs = [(self.proxy(client_id), result) for client_id, result in results.items()]
        self.strategy.aggregate_fit(server_round, pairs, list(failures))

    def proxy(self, client_id: int) -> FakeProxy:
        return next(p for p in self.proxies if p.client_id == client_id)

    def round(self, server_round: int, results: Mapping[int, FitRes]) -> Arrays:
        """Ask and take; the new weights."""
        self.ask(server_round)
        self.take(server_round, results)
        return arrays(self.strategy.weights)


EMPTY = Parameters(tensors=[], tensor_type="numpy.ndarray")


def settings(**changes: Any) -> ServerSettings:
    values: dict[str, Any] = {
        "rounds": 3,
        "min_clients": 1,
        "fraction_fit": 1.0,
        "on_failure": "raise",
        "evaluate_every": 1,
        "ema_decay": 0.5,
        "seed": 0,
    }
    return ServerSettings(**{**values, **changes})


def fedavg_server(
    root: Path, *, clients: Sequence[int] = (0, 1, 2), method: str = "fedavg", **changes: Any
) -> Server:
    """A `CoarseFedAvg` on `START`; `changes` are of `AggregationConfig` or `ServerSettings`."""
    own = AggregationConfig.__dataclass_fields__.keys() - ServerSettings.__dataclass_fields__.keys()
    chosen = {name: changes.pop(name) for name in list(changes) if name in own}
    said: list[str] = []
    finished: list[Any] = []
    strategy = CoarseFedAvg(
        aggregation=AggregationConfig(method=method, **chosen),
        settings=settings(**changes),
        weights=tensors(START),
        run=RunDirectory(root),
        announce=said.append,
        finish=lambda ema, history: finished.append((arrays(ema), history)),
    )
    return Server(strategy, said, finished).connect(clients)


def tensors(named: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in named.items()}


def arrays(named: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in named.items()}


def fit_result(
    message: Sequence[np.ndarray], num_examples: int, metrics: Mapping[str, Any]
) -> FitRes:
    parameters = ndarrays_to_parameters(list(message))
    return FitRes(FINE, parameters, num_examples, dict(metrics))


def update(
    client_id: int,
    weights: Arrays,
    *,
    round: int = 1,
    num_examples: int = 10,
    metrics: Mapping[str, Any] | None = None,
    says: int | None = None,
    counts: int | None = None,
    seeded: bool = False,
) -> FitRes:
    """A client's coarse update; its header may say another client or another count."""
    sent = CoarseUpdate(
        weights=tensors(weights),
        num_examples=num_examples if counts is None else counts,
        client_id=client_id if says is None else says,
        round=round,
        seeded=seeded,
    )
    default = {"client_id": client_id, "coarse_loss": 0.5, "num_released": num_examples}
    return fit_result(
        wire.encode_update(sent), num_examples, default if metrics is None else metrics
    )


def drift(client_id: int, round: int = 1) -> Arrays:
    """Weights that a client could send: start plus seeded noise of about 0.1."""
    rng = np.random.default_rng((client_id, round))
    return {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in START.items()
    }


def evaluation(sender: int, loss: float, count: int, **metrics: Any) -> EvaluateRes:
    content = {"client_id": sender, "heldout_coarse_loss": loss, "num_heldout": count}
    return EvaluateRes(FINE, loss, count, {**content, **metrics})


def sent_weights(request: Any) -> Arrays:
    """The named weights of a request."""
    return arrays(wire.decode_model(parameters_to_ndarrays(request.parameters)))
