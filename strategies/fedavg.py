"""Federated averaging of the coarse model.

Every update is checked by name, shape and dtype and averaged as it comes (`strategies.averaging`):
FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al. 2019), FedAdam (Reddi et al. 2021), FedProx (Li et
al. 2020); or kept for a robust mean (`strategies.robust`). The tests hold the arithmetic to the
papers' formulas and to Flower's own strategies.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from flwr.common import NDArrays, Scalar

from fedpdm import wire
from fedpdm.config import AggregationConfig
from fedpdm.config.aggregation import ROBUST
from strategies.answers import ClientAnswer
from strategies.averaging import OrderedMean, make_server_optimizer
from strategies.coarse import CoarseStrategy, Weights
from strategies.robust import RobustMean, shorten

__all__ = ["CoarseFedAvg"]


class CoarseFedAvg(CoarseStrategy):
    """Aggregates coarse updates; each weighs as many images as its client has released."""

    def __init__(self, *, aggregation: AggregationConfig, **options: Any) -> None:
        super().__init__(**options)
        self._aggregation = aggregation
        self._optimizer = make_server_optimizer(aggregation, self.weights)
        self._mean: OrderedMean | RobustMean | None = None
        self._num_shortened = 0

    @property
    def section(self) -> AggregationConfig:
        """How updates are aggregated."""
        return self._aggregation

    def phase(self, round: int) -> str:
        return "coarse"

    def fit_config(self) -> dict[str, Scalar]:
        if self._aggregation.method == "fedprox":
            return {"proximal_mu": self._aggregation.proximal_mu}
        return {}

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._run.drop_updates()
        self._num_shortened = 0
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

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        update = wire.decode_update(
            message,
            like=self.weights,
            round=round,
            who=f"client {answer.client_id}",
            encoding=self.settings.encoding,
            basis=self.settings.basis,
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
        weights = dict(update.weights)
        if (bound := self._aggregation.max_update_norm) is not None:
            weights, norm = shorten(weights, self.weights, max_norm=bound)
            self._num_shortened += norm > bound
        assert self._mean is not None
        self._mean.add(answer.client_id, weights, num_examples=update.num_examples)

    def conclude(self, round: int) -> dict[str, float]:
        assert self._mean is not None
        try:
            mean, self._mean = self._mean.finish(), None
        except ValueError as error:
            raise wire.WireError(f"round {round}: {error}") from None
        self._step(round, mean)
        if self._aggregation.max_update_norm is not None:
            return {"shortened_updates": self._num_shortened}
        return {}

    def _step(self, round: int, mean: Weights) -> None:
        """New weights and average from the mean of a round's updates, which may be changed."""
        self.weights = self._optimizer.step(round, self.weights, mean)
        decay = min(self.settings.ema_decay, (1.0 + round) / (10.0 + round))
        for name, tensor in self.weights.items():
            self.ema[name] = torch.lerp(tensor, self.ema[name], decay)

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
