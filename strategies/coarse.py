"""What every strategy of this project shares: only the coarse model is the server's business.

A `CoarseStrategy` holds the coarse weights by name, asks clients for a phase of work, refuses
malformed answers naming the client, writes a checkpoint after each round and goes on from it.
Answers are taken in one by one (`receive_fit`, in any order) and not kept. How they become new
weights is the subclasses' part (`accept`, `conclude`).
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    NDArrays,
    Parameters,
    Scalar,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from fedpdm import wire
from fedpdm.memory import release_free_memory
from fedpdm.runs import RunDirectory
from fedpdm.trackers import RunTrackers
from strategies.answers import (
    ClientAnswer,
    accepted_metrics,
    check_size,
    decode_arrays,
    describe_failures,
    encode_arrays,
    mean_metrics,
    one_line,
    round_line,
)
from strategies.roster import ClientFailure, Roster, ServerSettings

__all__ = ["CoarseStrategy"]

Weights = dict[str, torch.Tensor]
_NOTHING = Parameters(tensors=[], tensor_type="numpy.ndarray")


class CoarseStrategy(Strategy):
    """See the module. `finish` is called once, with the final EMA weights and all metrics."""

    has_model = True  # whether there is a shared model at all

    def __init__(
        self,
        *,
        settings: ServerSettings,
        weights: Weights,
        run: RunDirectory,
        announce: Callable[[str], None],
        finish: Callable[[Weights, dict[str, Any]], None],
    ) -> None:
        self.settings = settings
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.ema = dict(self.weights)
        self.history: dict[str, Any] = {"rounds": []}
        self.rounds_done = 0
        self._run = run
        self._announce = announce
        self._finish = finish
        self.trackers: RunTrackers | None = None  # see each round and the end
        self._roster = Roster(settings)
        self._seen: set[str] = set()  # of this round: nodes that answered, good answers, others
        self._answers: list[ClientAnswer] = []
        self._problems: list[str] = []
        self._received = self._sent = self._request_bytes = 0
        self._first_round = 1
        self._started = time.perf_counter()
        self._round_started = self._started

    # What subclasses decide.

    @abstractmethod
    def phase(self, round: int) -> str:
        """What clients do in this round besides fine training: coarse, release or fine."""

    @abstractmethod
    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """Take in an answer, in any order; `wire.WireError`, and nothing, if it is malformed."""

    @abstractmethod
    def conclude(self, round: int) -> dict[str, float]:
        """Turn what was accepted into new `self.weights` and `self.ema`; returns metrics."""

    def begin(self, round: int, clients: Collection[int]) -> None:
        """A round of training is about to be sent to these clients."""

    def largest_message(self, num_examples: int) -> int:
        """Bytes of the values that a client with so many images may send in this round."""
        return self._request_bytes

    def dismiss(self, client_id: int) -> None:
        """This client's answer was refused: there will be none."""

    def abandon(self) -> None:
        """The round has failed: forget what was accepted."""

    def extra_state(self) -> Weights:
        """Further tensors of a checkpoint."""
        return {}

    def load_extra_state(self, tensors: Weights) -> None:
        """Inverse of `extra_state`."""

    def fit_config(self) -> dict[str, Scalar]:
        """Further entries of the request to clients."""
        return {}

    def fit_message(self, round: int) -> Parameters:
        """What clients are sent to work on: the coarse weights."""
        return self._message(self.weights)

    def evaluation_message(self) -> Parameters:
        """What clients are sent to evaluate: the average of the coarse weights."""
        return self._message(self.ema)

    def client_of(self, cid: str) -> int:
        """Which client a node of Flower's is; -1 for one that was never asked."""
        return self._roster.ids.get(cid, -1)

    # Resuming.

    def resume(self) -> None:
        """Go on from the run's checkpoint, if there is one."""
        checkpoint = self._run.load_checkpoint()
        if checkpoint is None:
            return
        self.rounds_done, tensors, self.history = checkpoint
        if self.rounds_done == 0:
            return
        self._take(tensors)
        rest = {
            name.removeprefix("extra."): tensor
            for name, tensor in tensors.items()
            if name.startswith("extra.")
        }
        self.load_extra_state(rest)
        self._announce(f"resumed after round {self.rounds_done} of {self.settings.rounds}")
        self._first_round = self.rounds_done + 1

    def rounds_left(self) -> int:
        """Flower rounds still to run: at least one, for the final evaluation."""
        return max(1, self.settings.rounds - self.rounds_done)

    def _settle(self) -> None:
        """Let go of weights and EMA until they are used: they are mapped from the checkpoint."""
        checkpoint = self._run.load_checkpoint()
        if checkpoint is not None:
            self._take(checkpoint[1])
        release_free_memory()

    def _take(self, tensors: Weights) -> None:
        for prefix, target in (("weights.", self.weights), ("ema.", self.ema)):
            for name in target:
                target[name] = tensors[prefix + name]

    def _checkpoint(self) -> None:
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        tensors |= {f"extra.{name}": tensor for name, tensor in self.extra_state().items()}
        self._run.save_checkpoint(self.rounds_done, tensors, self.history)
        del tensors
        self._settle()
        if self.rounds_done:
            self._run.write_json("metrics.json", self.history)

    # Flower's interface.

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        if self.rounds_done == 0:
            self._checkpoint()
        return _NOTHING  # Flower keeps what it gets here; requests are made of `self.weights`

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        return None  # the server holds no images

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        round = self._round(server_round)
        self._round_started = time.perf_counter()
        if round > self.settings.rounds:
            return []  # only the final evaluation was missing
        config: dict[str, Scalar] = {
            "round": round,
            "phase": self.phase(round),
            **self.fit_config(),
        }
        chosen = self._roster.choose(round, client_manager)
        self._answers, self._problems, self._received = [], list(self._roster.problems), 0
        self._seen = set()
        self.begin(round, self._roster.asked)
        message = self.fit_message(round)
        self._settle()  # making it has read the weights
        self._request_bytes = sum(len(tensor) for tensor in message.tensors)
        self._sent = self._request_bytes * len(chosen)
        return [(client, FitIns(message, dict(config))) for client in chosen]

    def receive_fit(self, server_round: int, proxy: ClientProxy, result: FitRes) -> None:
        """Take in one client's answer and empty it, so that its weights are not kept.

        A server that has answers one by one calls this for each before `aggregate_fit`, which
        does it for those that are left.
        """
        self._seen.add(proxy.cid)
        client_id = self._roster.client_id(proxy)
        size = sum(len(tensor) for tensor in result.parameters.tensors)
        self._received += size
        try:
            self._check_count(result.num_examples)
            check_size(size, most=self.largest_message(result.num_examples))
            answer = ClientAnswer(
                client_id=client_id,
                metrics=accepted_metrics(result.metrics, client_id=client_id),
                num_examples=result.num_examples,
            )
            message = decode_arrays(result.parameters)
            result.parameters = _NOTHING
            self.accept(self._round(server_round), answer, message)
        except wire.WireError as error:
            result.parameters = _NOTHING
            self._problems.append(one_line(f"client {client_id}: {error}"))
            self.dismiss(client_id)
            return
        self._answers.append(answer)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        round = self._round(server_round)
        late = [(proxy, result) for proxy, result in results if proxy.cid not in self._seen]
        for proxy, result in sorted(late, key=lambda pair: self._roster.client_id(pair[0])):
            self.receive_fit(server_round, proxy, result)
        problems = [*self._describe_failures(results, failures), *self._problems]
        answers = sorted(self._answers, key=lambda answer: answer.client_id)
        try:
            self._report_problems(round, "fit", problems, num_good=len(answers))
        except ClientFailure:
            self.abandon()
            raise
        metrics = self.conclude(round)
        self.rounds_done = round
        self.history["rounds"].append(
            {
                "round": round,
                **mean_metrics(answers, seconds=time.perf_counter() - self._round_started),
                **metrics,
                "seconds": time.perf_counter() - self._round_started,
                "bytes_down": self._sent,
                "bytes_up": self._received,
                "clients": [dict(answer.metrics) for answer in answers],
                "failed": problems,
            }
        )
        self._checkpoint()
        return _NOTHING, {}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        round = min(self._round(server_round), self.settings.rounds)
        final = round == self.settings.rounds
        if not final and round % self.settings.evaluate_every:
            self._tell(self.history["rounds"][-1])
            return []
        config: dict[str, Scalar] = {"round": round, "final": final}
        message = self.evaluation_message()
        clients = self._roster.choose(round, client_manager, everyone=True)
        if self.history["rounds"]:
            sent = sum(len(tensor) for tensor in message.tensors) * len(clients)
            self.history["rounds"][-1]["bytes_down"] += sent
        return [(client, EvaluateIns(message, dict(config))) for client in clients]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        round = min(self._round(server_round), self.settings.rounds)
        problems = [*self._describe_failures(results, failures), *self._roster.problems]
        good = []
        for proxy, result in results:
            client_id = self._roster.client_id(proxy)
            try:
                self._check_count(result.num_examples)
                metrics = accepted_metrics(result.metrics, client_id=client_id)
                if result.num_examples < 1:
                    count = result.num_examples
                    raise wire.WireError(f"num_examples must be at least 1, got {count}")
                if not math.isfinite(result.loss):
                    raise wire.WireError(f"held-out loss of client {client_id} is {result.loss}")
            except wire.WireError as error:
                problems.append(one_line(f"client {client_id}: {error}"))
                continue
            good.append((client_id, result, metrics))
        self._report_problems(round, "evaluate", problems, num_good=len(good))
        good.sort(key=lambda answer: answer[0])
        counts = np.array([result.num_examples for _, result, _ in good], dtype=np.float64)
        losses = np.array([result.loss for _, result, _ in good], dtype=np.float64)
        loss = float((counts * losses).sum() / counts.sum())
        measured = {"heldout_coarse_loss": loss} if self.has_model else {}
        record = self.history["rounds"][-1]
        record |= measured
        record["seconds"] = time.perf_counter() - self._round_started
        self._tell(record)
        if round == self.settings.rounds:
            self.history["final"] = {
                **measured,
                "clients": [metrics for _, _, metrics in good],
            }
            self._finish(self.ema, self.history)
            if self.trackers is not None:
                self.trackers.finish(self.ema, self.history)
            self._checkpoint()  # last: a run whose results could not be written can be resumed
        else:
            self._run.write_json("metrics.json", self.history)
        return loss, {}

    # Within.

    def _round(self, server_round: int) -> int:
        """Flower counts rounds of this process; the run's rounds go on from the checkpoint."""
        return self._first_round - 1 + server_round

    def _check_count(self, num_examples: int) -> None:
        """`wire.WireError` for more images than a client may have: they would weigh too much."""
        most = self.settings.max_examples
        if most is not None and num_examples > most:
            raise wire.WireError(
                f"num_examples must be at most aggregation.max_examples = {most}, "
                f"got {num_examples}"
            )

    def _message(self, weights: Weights) -> Parameters:
        return encode_arrays(wire.encode_model(weights, encoding=self.settings.encoding))

    def _describe_failures(self, results: Sequence[Any], failures: Sequence[Any]) -> list[str]:
        return describe_failures(results, failures, ids=self._roster.ids, asked=self._roster.asked)

    def _report_problems(
        self, round: int, what: str, problems: Sequence[str], *, num_good: int
    ) -> None:
        for problem in problems:
            self._announce(f"round {round} {what} failed: {problem}")
        if problems and (self.settings.on_failure == "raise" or num_good == 0):
            raise ClientFailure(f"round {round} {what}: {'; '.join(problems)}")

    def _tell(self, record: Mapping[str, Any]) -> None:
        """Show a round, with the time that the rest will take at the pace so far."""
        rounds_here = self.rounds_done - self._first_round + 1
        pace = (time.perf_counter() - self._started) / max(1, rounds_here)
        left = pace * (self.settings.rounds - self.rounds_done)
        self._announce(round_line(record, rounds=self.settings.rounds, seconds_left=left))
        if self.trackers is not None:
            self.trackers.round(record)
