"""What every strategy of this project shares: only the coarse model is the server's business.

A `CoarseStrategy` holds the coarse weights by name, asks clients for a phase of work, refuses
malformed answers naming the client, writes a checkpoint after each round and goes on from it.
Answers are taken in one by one (`receive_fit`, in any order) and not kept. How they become new
weights is the subclasses' part (`accept`, `conclude`). What is counted and said of a round is in
`strategies.rounds`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

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
from fedpdm.reporting.trackers import RunTrackers
from fedpdm.storage.run_directory import RunDirectory
from strategies.answers import (
    ClientAnswer,
    accepted_metrics,
    check_count,
    check_evaluation,
    check_size,
    decode_arrays,
    describe_failures,
    encode_arrays,
    mean_loss,
    one_line,
)
from strategies.memory import release_free_memory
from strategies.roster import ClientFailure, Roster, ServerSettings
from strategies.rounds import RunAccount

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
        self.account = RunAccount(settings, announce)
        self._run = run
        self._finish = finish
        self._roster = Roster(settings)
        self._request_bytes = 0

    @property
    def rounds_done(self) -> int:
        """Rounds of the run that have given new weights."""
        return self.account.rounds_done

    @property
    def history(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return self.account.history

    def track(self, trackers: RunTrackers) -> None:
        """Show each round, and the end, to these."""
        self.account.trackers = trackers

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
        rounds_done, tensors, history = checkpoint
        self.account.go_on(rounds_done, history)
        if rounds_done == 0:
            return
        self._take(tensors)
        rest = {
            name.removeprefix("extra."): tensor
            for name, tensor in tensors.items()
            if name.startswith("extra.")
        }
        self.load_extra_state(rest)

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
        round = self.account.number(server_round)
        self.account.begin()
        if round > self.settings.rounds:
            return []  # only the final evaluation was missing
        config: dict[str, Scalar] = {
            "round": round,
            "phase": self.phase(round),
            **self.fit_config(),
        }
        chosen = self._roster.choose(round, client_manager)
        self.account.now.problems += self._roster.problems
        self.begin(round, self._roster.asked)
        message = self.fit_message(round)
        self._settle()  # making it has read the weights
        self._request_bytes = sum(len(tensor) for tensor in message.tensors)
        self.account.now.sent = self._request_bytes * len(chosen)
        return [(client, FitIns(message, dict(config))) for client in chosen]

    def receive_fit(self, server_round: int, proxy: ClientProxy, result: FitRes) -> None:
        """Take in one client's answer and empty it, so that its weights are not kept.

        A server that has answers one by one calls this for each before `aggregate_fit`, which
        does it for those that are left.
        """
        now = self.account.now
        now.seen.add(proxy.cid)
        client_id = self._roster.client_id(proxy)
        size = sum(len(tensor) for tensor in result.parameters.tensors)
        now.received += size
        try:
            check_count(result.num_examples, most=self.settings.max_examples)
            check_size(size, most=self.largest_message(result.num_examples))
            answer = ClientAnswer(
                client_id=client_id,
                metrics=accepted_metrics(result.metrics, client_id=client_id),
                num_examples=result.num_examples,
            )
            message = decode_arrays(result.parameters)
            result.parameters = _NOTHING
            self.accept(self.account.number(server_round), answer, message)
        except wire.WireError as error:
            result.parameters = _NOTHING
            now.problems.append(one_line(f"client {client_id}: {error}"))
            self.dismiss(client_id)
            return
        now.answers.append(answer)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        round, now = self.account.number(server_round), self.account.now
        late = [(proxy, result) for proxy, result in results if proxy.cid not in now.seen]
        for proxy, result in sorted(late, key=lambda pair: self._roster.client_id(pair[0])):
            self.receive_fit(server_round, proxy, result)
        problems = [*self._describe_failures(results, failures), *now.problems]
        answers = sorted(now.answers, key=lambda answer: answer.client_id)
        try:
            self.account.report(round, "fit", problems, num_good=len(answers))
        except ClientFailure:
            self.abandon()
            raise
        self.account.close(round, answers, problems, self.conclude(round))
        self._checkpoint()
        return _NOTHING, {}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        round = min(self.account.number(server_round), self.settings.rounds)
        final = round == self.settings.rounds
        if not final and round % self.settings.evaluate_every:
            self.account.tell()
            return []
        config: dict[str, Scalar] = {"round": round, "final": final}
        message = self.evaluation_message()
        clients = self._roster.choose(round, client_manager, everyone=True)
        size = sum(len(tensor) for tensor in message.tensors)
        self.account.sent_to_evaluate(size * len(clients))
        return [(client, EvaluateIns(message, dict(config))) for client in clients]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        round = min(self.account.number(server_round), self.settings.rounds)
        problems = [*self._describe_failures(results, failures), *self._roster.problems]
        good = []
        for proxy, result in results:
            client_id = self._roster.client_id(proxy)
            try:
                metrics = accepted_metrics(result.metrics, client_id=client_id)
                check_evaluation(result, client_id=client_id, most=self.settings.max_examples)
            except wire.WireError as error:
                problems.append(one_line(f"client {client_id}: {error}"))
                continue
            good.append((client_id, result, metrics))
        self.account.report(round, "evaluate", problems, num_good=len(good))
        good.sort(key=lambda answer: answer[0])
        loss = mean_loss([result for _, result, _ in good])
        measured = {"heldout_coarse_loss": loss} if self.has_model else {}
        self.account.evaluated(measured)
        if round == self.settings.rounds:
            self.history["final"] = {
                **measured,
                "clients": [metrics for _, _, metrics in good],
            }
            self._finish(self.ema, self.history)
            if self.account.trackers is not None:
                self.account.trackers.finish(self.ema, self.history)
            self._checkpoint()  # last: a run whose results could not be written can be resumed
        else:
            self._run.write_json("metrics.json", self.history)
        return loss, {}

    # Within.

    def _message(self, weights: Weights) -> Parameters:
        return encode_arrays(wire.encode_model(weights, encoding=self.settings.encoding))

    def _describe_failures(self, results: Sequence[Any], failures: Sequence[Any]) -> list[str]:
        return describe_failures(results, failures, ids=self._roster.ids, asked=self._roster.asked)
