"""What every strategy of this project shares: only the coarse model is the server's business.

A `CoarseStrategy` holds the coarse weights by name and their average over rounds (`ema`), decodes
and checks every update, writes a checkpoint after each round and goes on from it. A custom
strategy is a subclass with one method, `merge`: a round's updates become new weights.

Whatever a strategy does with updates is post-processing of what clients have released. How a round
is asked for and taken in is in `strategies.exchange`, what is counted of it in `strategies.rounds`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from flwr.common import FitIns, NDArrays, Parameters
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from fedpdm import wire
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.types import CoarseUpdate, Phase
from strategies.answers import ClientAnswer, encode_arrays
from strategies.exchange import RoundExchange
from strategies.robust import shorten
from strategies.roster import ServerSettings

__all__ = ["CoarseStrategy"]

Weights = dict[str, torch.Tensor]


class CoarseStrategy(RoundExchange):
    """See the module. `finish` is called once, with the final EMA weights and all metrics."""

    def __init__(
        self,
        *,
        settings: ServerSettings,
        weights: Weights,
        run: RunDirectory,
        announce: Callable[[str], None],
        finish: Callable[[Weights, dict[str, Any]], None],
    ) -> None:
        super().__init__(settings=settings, announce=announce)
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.ema = dict(self.weights)
        self._run = run
        self._finish = finish
        self._updates: dict[int, CoarseUpdate] = {}
        self._num_shortened = 0

    # What a subclass decides.

    @abstractmethod
    def merge(self, round: int) -> dict[str, float]:
        """Turn the round's `updates` into new `self.weights`; returns metrics.

        `wire.WireError` if they do not make up new weights.
        """

    def average(self, round: int) -> None:
        """Move `self.ema` towards the new weights: the decay grows to `settings.ema_decay`."""
        decay = min(self.settings.ema_decay, (1.0 + round) / (10.0 + round))
        for name, tensor in self.weights.items():
            self.ema[name] = torch.lerp(tensor, self.ema[name], decay)

    def take(self, update: CoarseUpdate) -> None:
        """Take in a checked update, in any order; by default it is kept in memory."""
        self._updates[update.client_id] = update

    def extra_state(self) -> Weights:
        """Further tensors of a checkpoint: state that must survive a resume."""
        return {}

    def load_extra_state(self, tensors: Weights) -> None:
        """Inverse of `extra_state`."""

    @property
    def updates(self) -> list[CoarseUpdate]:
        """The round's updates that were kept, in the order of client ids."""
        return [self._updates[client] for client in sorted(self._updates)]

    # A round of updates.

    def phase(self, round: int) -> Phase:
        return Phase.COARSE

    def fit_message(self, round: int) -> Parameters:
        """The coarse weights."""
        return self._message(self.weights)

    def evaluation_message(self) -> Parameters:
        """The average of the coarse weights."""
        return self._message(self.ema)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        self._updates, self._num_shortened = {}, 0
        return super().configure_fit(server_round, parameters, client_manager)

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """Decode the update, check it against what Flower says of its sender, and `take` it.

        A longer update than `settings.max_update_norm` is shortened to it.
        """
        who = f"client {answer.client_id}"
        if self.phase(round) is not Phase.COARSE:
            if message:
                raise wire.WireError(f"{who} sent a message where none was asked for")
            return
        update = wire.decode_update(
            message,
            like=self.weights,
            round=round,
            who=who,
            encoding=self.settings.encoding,
            basis=self.settings.basis,
        )
        if update.client_id != answer.client_id or update.num_examples != answer.num_examples:
            raise wire.WireError(
                f"update of {who}: header says client {update.client_id}, "
                f"{update.num_examples} examples; Flower says {answer.num_examples}"
            )
        if update.seeded and not self.settings.simulation:
            raise wire.WireError(
                f"update of {who}: made from a release whose noise is seeded, outside simulation"
            )
        if (bound := self.settings.max_update_norm) is not None:
            weights, norm = shorten(dict(update.weights), self.weights, max_norm=bound)
            update = dataclasses.replace(update, weights=weights)
            self._num_shortened += norm > bound
        self.take(update)

    def conclude(self, round: int) -> dict[str, float]:
        """`merge`, then `average`; returns metrics."""
        metrics = self.merge(round)
        self._updates = {}
        self.average(round)
        if self.settings.max_update_norm is not None:
            metrics = {**metrics, "shortened_updates": self._num_shortened}
        return metrics

    # The run directory.

    def resume(self) -> None:
        """Go on from the run's checkpoint, if there is one."""
        checkpoint = self._run.load_checkpoint()
        if checkpoint is None:
            return
        rounds_done, tensors, history = checkpoint
        self.book.go_on(rounds_done, history)
        if rounds_done == 0:
            return
        self._restore(tensors)
        rest = {
            name.removeprefix("extra."): tensor
            for name, tensor in tensors.items()
            if name.startswith("extra.")
        }
        self.load_extra_state(rest)

    def save(self) -> None:
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        tensors |= {f"extra.{name}": tensor for name, tensor in self.extra_state().items()}
        self._run.save_checkpoint(self.rounds_done, tensors, self.history)
        del tensors
        self.settle()
        if self.rounds_done:
            self.write_history()

    def settle(self) -> None:
        """Let go of weights and EMA until they are used: they are mapped from the checkpoint."""
        checkpoint = self._run.load_checkpoint(check=False)
        if checkpoint is not None:
            self._restore(checkpoint[1])
        _release_free_memory()

    def write_history(self) -> None:
        self._run.write_json("metrics.json", self.history)

    def end(self) -> None:
        self._finish(self.ema, self.history)
        if self.book.trackers is not None:
            self.book.trackers.finish(self.ema, self.history)

    def _restore(self, tensors: Weights) -> None:
        for prefix, target in (("weights.", self.weights), ("ema.", self.ema)):
            for name in target:
                target[name] = tensors[prefix + name]

    def _message(self, weights: Weights) -> Parameters:
        return encode_arrays(wire.encode_model(weights, encoding=self.settings.encoding))


def _release_free_memory() -> None:
    """Return freed memory at once where the C library is glibc, which else keeps a model's tensors.

    Per thread it keeps what was freed for later; a server that averages in several threads then
    holds several models' worth of nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
