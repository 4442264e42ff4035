"""Federated averaging of the coarse model, by Flower's own strategies.

Messages carry names; Flower's aggregators take positional lists. This strategy checks every
update by name, shape and dtype, hands the arrays to Flower sorted by name and client, and puts the
names back on the result. Arithmetic is Flower's: FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al.
2019), FedAdam (Reddi et al. 2021; Flower adds Adam's bias
correction, which their Algorithm 2 lacks), FedProx (Li et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from flwr.common import (
    Code,
    FitRes,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from fedpdm import wire
from fedpdm.config import AggregationConfig
from strategies.answers import ClientAnswer
from strategies.coarse import CoarseStrategy, Weights

__all__ = ["CoarseFedAvg", "make_aggregator"]


def make_aggregator(section: AggregationConfig, weights: Weights) -> FedAvg:
    """The Flower strategy that `aggregation.method` names, started at `weights`."""
    initial = ndarrays_to_parameters([weights[name].numpy() for name in sorted(weights)])
    common: dict[str, Any] = {
        "initial_parameters": initial,
        "fit_metrics_aggregation_fn": lambda _: {},
    }
    if section.method == "fedavg":
        return FedAvg(**common)
    if section.method == "fedprox":
        return FedProx(proximal_mu=section.proximal_mu, **common)
    if section.method == "fedavgm":
        rate = 1.0 if section.server_lr is None else section.server_lr
        return FedAvgM(server_learning_rate=rate, server_momentum=section.momentum, **common)
    if section.method == "fedadam":
        rate = 0.01 if section.server_lr is None else section.server_lr
        return FedAdam(eta=rate, beta_1=section.momentum, beta_2=0.99, tau=1e-3, **common)
    raise ValueError(f"aggregation.method: unknown method {section.method!r}")


class CoarseFedAvg(CoarseStrategy):
    """Aggregates coarse updates; each weighs as many images as its client has released."""

    def __init__(self, *, aggregation: AggregationConfig, **options: Any) -> None:
        super().__init__(**options)
        self._aggregation = aggregation
        self._aggregator = make_aggregator(aggregation, self.weights)

    def phase(self, round: int) -> str:
        return "coarse"

    def fit_config(self) -> dict[str, Scalar]:
        if self._aggregation.method == "fedprox":
            return {"proximal_mu": self._aggregation.proximal_mu}
        return {}

    def check(self, round: int, answer: ClientAnswer) -> None:
        update = wire.decode_update(
            answer.message, like=self.weights, round=round, who=f"client {answer.client_id}"
        )
        if update.client_id != answer.client_id or update.num_examples != answer.num_examples:
            raise wire.WireError(
                f"update of client {answer.client_id}: header says client {update.client_id}, "
                f"{update.num_examples} examples; Flower says {answer.num_examples}"
            )
        if update.seeded and not self.settings.simulation:
            raise wire.WireError(
                f"update of client {answer.client_id}: made from a release whose noise is seeded, "
                "outside simulation"
            )

    def absorb(self, round: int, answers: Sequence[ClientAnswer]) -> dict[str, float]:
        names = sorted(self.weights)
        results: list[tuple[ClientProxy, FitRes]] = []
        for answer in answers:
            update = wire.decode_update(
                answer.message, like=self.weights, round=round, who=f"client {answer.client_id}"
            )
            arrays = [update.weights[name].numpy() for name in names]
            result = FitRes(
                status=Status(Code.OK, ""),
                parameters=ndarrays_to_parameters(arrays),
                num_examples=update.num_examples,
                metrics={},
            )
            results.append((_NO_PROXY, result))
        parameters, _ = self._aggregator.aggregate_fit(round, results, [])
        if parameters is None:
            raise wire.WireError(f"round {round}: nothing to aggregate")
        decay = min(self.settings.ema_decay, (1.0 + round) / (10.0 + round))
        means = [array.astype("float32") for array in parameters_to_ndarrays(parameters)]
        if isinstance(self._aggregator, FedAdam):
            # It goes on in float64; from what clients get, a resumed run takes the same steps.
            self._aggregator.current_weights = means
        for name, array in zip(names, means, strict=True):
            self.weights[name] = torch.from_numpy(array.copy())
            self.ema[name] = torch.lerp(self.weights[name], self.ema[name], decay)
        return {}

    # Flower's adaptive strategies keep their moments in attributes; a checkpoint takes them along.

    def extra_state(self) -> Weights:
        state: Weights = {}
        for slot in ("m_t", "v_t", "momentum_vector"):
            arrays = getattr(self._aggregator, slot, None)
            if arrays:
                for name, array in zip(sorted(self.weights), arrays, strict=True):
                    state[f"{slot}.{name}"] = torch.tensor(array)
        return state

    def load_extra_state(self, tensors: Weights) -> None:
        self._aggregator = make_aggregator(self._aggregation, self.weights)
        for slot in ("m_t", "v_t", "momentum_vector"):
            arrays = [
                tensors[f"{slot}.{name}"].numpy()
                for name in sorted(self.weights)
                if f"{slot}.{name}" in tensors
            ]
            if arrays:
                setattr(self._aggregator, slot, arrays)


_NO_PROXY: Any = None
