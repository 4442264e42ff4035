"""Robust means: of a round's updates, one that a few lying clients cannot move far.

The arithmetic is Flower's own (`flwr.server.strategy.aggregate`): the coordinate-wise median and
trimmed mean (Yin et al. 2018, Algorithm 1), Krum and Multi-Krum (Blanchard et al. 2017, section 4).
Clients count alike whatever number of images they claim, but for the mean of Multi-Krum's chosen.

All updates of a round are needed at once, so they wait on disk and are mapped from there. Of n
updates of M bytes, whose largest tensor has L, a server then holds: n M of file pages, which the
system may drop, and for median and trimmed mean, which go tensor by tensor, M and a few times n L;
for Krum, which compares whole updates, another 2 n M. The streaming mean of FedAvg
(`strategies.averaging`) needs M, whatever n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from flwr.common import NDArrays
from flwr.server.strategy.aggregate import (
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)

from fedpdm.config import AggregationConfig, ConfigError
from fedpdm.config.aggregation import check_counts

__all__ = ["RobustMean", "shorten"]

Weights = dict[str, torch.Tensor]


class RobustMean:
    """A round's updates, kept as `strategies.averaging.OrderedMean` keeps those that come early.

    `keep` stores an update and `recall` gives it back (and forgets it).
    """

    def __init__(
        self,
        section: AggregationConfig,
        *,
        keep: Callable[[int, Weights], None],
        recall: Callable[[int], Weights],
    ) -> None:
        self._section = section
        self._keep, self._recall = keep, recall
        self._counts: dict[int, int] = {}

    def add(self, client_id: int, weights: Weights, *, num_examples: int) -> None:
        """Take an update; `weights` are only read, and not kept in memory."""
        self._keep(client_id, weights)
        self._counts[client_id] = num_examples

    def dismiss(self, client_id: int) -> None:
        """No update will come from this client."""

    def finish(self) -> Weights:
        """The robust mean of all that came, whatever the order; `ValueError` if they are too few
        for the method to protect anything."""
        if not self._counts:
            raise ValueError("no update to average")
        try:
            check_counts(self._section, num_updates=len(self._counts))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        clients = sorted(self._counts)
        updates = {client: self._recall(client) for client in clients}
        names = list(updates[clients[0]])
        if self._section.method == "krum":
            arrays: list[tuple[NDArrays, int]] = [
                ([updates[client][name].numpy() for name in names], self._counts[client])
                for client in clients
            ]
            return dict(zip(names, self._krum(arrays), strict=True))
        return {name: self._one([updates[c][name].numpy() for c in clients]) for name in names}

    def _one(self, values: list[np.ndarray]) -> torch.Tensor:
        """Median or trimmed mean of one tensor of every client."""
        results: list[tuple[NDArrays, int]] = [([value], 1) for value in values]
        if self._section.method == "median":
            (mean,) = aggregate_median(results)
        else:
            (mean,) = aggregate_trimmed_avg(results, self._section.trimmed_share)
        return _float32(mean)

    def _krum(self, results: list[tuple[NDArrays, int]]) -> list[torch.Tensor]:
        keep = self._section.krum_keep
        chosen = aggregate_krum(results, self._section.num_malicious, keep if keep > 1 else 0)
        return [_float32(array) for array in chosen]


def _float32(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own memory; numpy's means of zero-dimensional arrays are plain numbers."""
    return torch.from_numpy(np.array(array, dtype=np.float32))


def shorten(weights: Weights, received: Weights, *, max_norm: float) -> tuple[Weights, float]:
    """(w_received + u min(1, max_norm / ||u||_2) with the update u = w - w_received, ||u||_2).

    The norm is of all tensors together, in float64. An update that fits is returned as it is;
    otherwise the tensors are new (Sun et al. 2019, section 4.2: norm thresholding).
    """
    squares = sum(
        float((value.double() - received[name]).square().sum()) for name, value in weights.items()
    )
    norm = squares**0.5
    if norm <= max_norm:
        return weights, norm
    scale = max_norm / norm
    return {
        name: (received[name] + (value.double() - received[name]) * scale).float()
        for name, value in weights.items()
    }, norm
