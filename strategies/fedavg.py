"""Federated averaging of the coarse model.

Updates are averaged as they come (`strategies.averaging`): FedAvg (McMahan et al. 2017), FedAvgM
(Hsu et al. 2019), FedAdam (Reddi et al. 2021), FedProx (Li et al. 2020); or kept for a robust mean
(`strategies.robust`). The tests hold the arithmetic to the papers' formulas and to Flower's own
strategies.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flwr.common import Scalar

from fedpdm import wire
from fedpdm.config import AggregationConfig
from fedpdm.config.aggregation import ROBUST
from fedpdm.wire.types import CoarseUpdate
from strategies.averaging import OrderedMean, make_server_optimizer
from strategies.coarse import CoarseStrategy, Weights
from strategies.robust import RobustMean

__all__ = ["CoarseFedAvg"]


class CoarseFedAvg(CoarseStrategy):
    """Aggregates coarse updates; each weighs as many images as its client has released."""

    def __init__(self, *, aggregation: AggregationConfig, **options: Any) -> None:
        super().__init__(**options)
        self._aggregation = aggregation
        self._optimizer = make_server_optimizer(aggregation, self.weights)
        self._mean: OrderedMean | RobustMean | None = None

    @property
    def section(self) -> AggregationConfig:
        """How updates are aggregated."""
        return self._aggregation

    def fit_config(self) -> dict[str, Scalar]:
        if self._aggregation.method == "fedprox":
            return {"proximal_mu": self._aggregation.proximal_mu}
        return {}

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._run.drop_updates()
        keep, recall = self._run.keep_update, self._run.take_update
        if self._aggregation.method in ROBUST:
            self._mean = RobustMean(self._aggregation, keep=keep, recall=recall)
        else:
            self._mean = OrderedMean(clients, keep=keep, recall=recall)

    def dismiss(self, client_id: int) -> None:
        assert self._mean is not None
        self._mean.dismiss(client_id)

    def abandon(self) -> None:
        self._mean = None
        self._run.drop_updates()

    def take(self, update: CoarseUpdate) -> None:
        assert self._mean is not None
        self._mean.add(update.client_id, dict(update.weights), num_examples=update.num_examples)

    def merge(self, round: int) -> dict[str, float]:
        assert self._mean is not None
        try:
            mean, self._mean = self._mean.finish(), None
        except ValueError as error:
            raise wire.WireError(f"round {round}: {error}") from None
        self._step(round, mean)
        return {}

    def _step(self, round: int, mean: Weights) -> None:
        """New weights from the mean of a round's updates, which may be changed."""
        self.weights = self._optimizer.step(round, self.weights, mean)

    def extra_state(self) -> Weights:
        return {
            f"{slot}.{name}": tensor
            for slot, tensors in self._optimizer.state.items()
            for name, tensor in tensors.items()
        }

    def load_extra_state(self, tensors: Weights) -> None:
        for slot, state in self._optimizer.state.items():
            for name in state:
                state[name] = tensors[f"{slot}.{name}"]
