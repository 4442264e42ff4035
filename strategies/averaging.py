"""Streaming aggregation: a weighted mean of updates, and the server's optimiser on it.

The mean takes one update at a time, so the server never holds all of them. Its result depends on
no client's speed: updates are averaged in the order of client ids, and one that arrives early
waits on disk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

import torch

from fedpdm.config import AggregationConfig
from fedpdm.config.aggregation import ROBUST

__all__ = ["OrderedMean", "ServerOptimizer", "make_server_optimizer"]

Weights = dict[str, torch.Tensor]


class OrderedMean:
    """sum_k n_k w_k / sum_k n_k over clients in the order of their ids, updated in place.

    `keep` stores an update that came before its turn and `recall` gives it back (and forgets it).
    """

    def __init__(
        self,
        clients: Collection[int],
        *,
        keep: Callable[[int, Weights], None],
        recall: Callable[[int], Weights],
    ) -> None:
        self._waiting = sorted(clients)
        self._keep, self._recall = keep, recall
        self._early: dict[int, int] = {}
        self._mean: Weights = {}
        self._total = 0

    def add(self, client_id: int, weights: Weights, *, num_examples: int) -> None:
        """Take an update; `weights` are only read, and not kept."""
        if client_id not in self._waiting:
            raise ValueError(f"client {client_id} is not waited for")
        if client_id == self._waiting[0]:
            self._waiting.pop(0)
            self._absorb(weights, num_examples)
            self._catch_up()
        else:
            self._keep(client_id, weights)
            self._early[client_id] = num_examples

    def dismiss(self, client_id: int) -> None:
        """No update will come from this client."""
        if client_id in self._waiting:
            self._waiting.remove(client_id)
            self._catch_up()

    def finish(self) -> Weights:
        """The mean of all that came; `ValueError` if nothing did."""
        self._waiting = [client for client in self._waiting if client in self._early]
        self._catch_up()
        if not self._mean:
            raise ValueError("no update to average")
        return self._mean

    def _catch_up(self) -> None:
        while self._waiting and self._waiting[0] in self._early:
            client = self._waiting.pop(0)
            self._absorb(self._recall(client), self._early.pop(client))

    def _absorb(self, weights: Weights, num_examples: int) -> None:
        self._total += num_examples
        if not self._mean:
            self._mean = {name: tensor.clone() for name, tensor in weights.items()}
            return
        share = num_examples / self._total
        torch._foreach_lerp_(
            list(self._mean.values()), [weights[name] for name in self._mean], share
        )


class ServerOptimizer(ABC):
    """Turns the mean of a round's updates into new weights. `state` is part of a checkpoint."""

    def __init__(self, slots: Collection[str], like: Mapping[str, torch.Tensor]) -> None:
        self.state: dict[str, Weights] = {
            slot: {name: torch.zeros_like(tensor) for name, tensor in like.items()}
            for slot in slots
        }

    @abstractmethod
    def step(self, round: int, weights: Weights, mean: Weights) -> Weights:
        """New weights from those of before and the mean update; both may be changed."""


class _Mean(ServerOptimizer):
    """FedAvg (McMahan et al. 2017, Algorithm 1); FedProx and robust means are the same here."""

    def step(self, round: int, weights: Weights, mean: Weights) -> Weights:
        return mean


class _Momentum(ServerOptimizer):
    """FedAvgM (Hsu et al. 2019, section 4.3): v <- beta v + (w - mean), w <- w - rate v."""

    def __init__(self, like: Weights, *, rate: float, beta: float) -> None:
        super().__init__(("momentum",), like)
        self._rate, self._beta = rate, beta

    def step(self, round: int, weights: Weights, mean: Weights) -> Weights:
        for name, momentum in self.state["momentum"].items():
            momentum.mul_(self._beta).add_(weights[name]).sub_(mean[name])
            mean[name] = weights[name].sub(momentum, alpha=self._rate)
        return mean


class _Adam(ServerOptimizer):
    """FedAdam (Reddi et al. 2021, Algorithm 2), delta the mean update less the weights.

    With the bias correction of Flower's FedAdam, in which the first round counts as the second
    step of Kingma and Ba 2015.
    """

    beta_2, tau = 0.99, 1e-3

    def __init__(self, like: Weights, *, rate: float, beta_1: float) -> None:
        super().__init__(("m", "v"), like)
        self._rate, self._beta_1 = rate, beta_1

    def step(self, round: int, weights: Weights, mean: Weights) -> Weights:
        correction = math.sqrt(1 - self.beta_2 ** (round + 1)) / (1 - self._beta_1 ** (round + 1))
        for name, first in self.state["m"].items():
            second = self.state["v"][name]
            delta = mean[name].sub_(weights[name])
            first.mul_(self._beta_1).add_(delta, alpha=1 - self._beta_1)
            second.mul_(self.beta_2).addcmul_(delta, delta, value=1 - self.beta_2)
            scale = second.sqrt().add_(self.tau)
            mean[name] = weights[name].addcdiv(first, scale, value=self._rate * correction)
        return mean


def make_server_optimizer(section: AggregationConfig, like: Weights) -> ServerOptimizer:
    """The one that `aggregation.method` names, for weights of these names and shapes."""
    if section.method in ("fedavg", "fedprox", *ROBUST):
        return _Mean((), like)
    if section.method == "fedavgm":
        rate = 1.0 if section.server_lr is None else section.server_lr
        return _Momentum(like, rate=rate, beta=section.momentum)
    if section.method == "fedadam":
        rate = 0.01 if section.server_lr is None else section.server_lr
        return _Adam(like, rate=rate, beta_1=section.momentum)
    raise ValueError(f"aggregation.method: unknown method {section.method!r}")
