"""One round as Flower asks for it: who is asked, answers taken one by one, failures, evaluation.

A `RoundExchange` is Flower's `Strategy` without a model: it refuses malformed answers naming the
client and tells what happened (`strategies.rounds`). An answer is taken in when it comes
(`receive_fit`, in any order) and then emptied. What is sent and what becomes of the answers is the
subclass's part; `strategies.coarse` is that of the shared model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

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
from fedpdm.text import line
from fedpdm.wire.types import Phase
from strategies.answers import (
    ClientAnswer,
    accepted_metrics,
    check_count,
    check_evaluation,
    check_size,
    decode_arrays,
    describe_failures,
    heldout_metrics,
)
from strategies.roster import ClientFailure, Roster, ServerSettings
from strategies.rounds import RoundBook

__all__ = ["RoundExchange"]

_NOTHING = Parameters(tensors=[], tensor_type="numpy.ndarray")


class RoundExchange(Strategy):
    """See the module."""

    has_model = True  # whether there is a shared model at all

    def __init__(self, *, settings: ServerSettings, announce: Callable[[str], None]) -> None:
        self.settings = settings
        self.book = RoundBook(settings, announce)
        self._roster = Roster(settings, announce)
        self._request_bytes = 0

    @property
    def rounds_done(self) -> int:
        """Rounds of the run that have given new weights."""
        return self.book.rounds_done

    @property
    def history(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return self.book.history

    def track(self, trackers: RunTrackers) -> None:
        """Show each round, and the end, to these."""
        self.book.trackers = trackers

    def rounds_left(self) -> int:
        """Flower rounds still to run: at least one, for the final evaluation."""
        return self.book.rounds_left()

    def client_of(self, cid: str) -> int:
        """Which client a node of Flower's is; -1 for one that was never asked."""
        return self._roster.ids.get(cid, -1)

    # What a round is made of.

    @abstractmethod
    def phase(self, round: int) -> Phase:
        """What clients do in this round besides fine training: coarse, release or fine."""

    @abstractmethod
    def fit_message(self, round: int) -> Parameters:
        """What clients are sent to work on."""

    @abstractmethod
    def evaluation_message(self) -> Parameters:
        """What clients are sent to evaluate."""

    @abstractmethod
    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """Take in an answer, in any order; `wire.WireError`, and nothing, if it is malformed."""

    @abstractmethod
    def conclude(self, round: int) -> dict[str, float]:
        """Use what was accepted in the round; returns metrics."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the rounds done."""

    @abstractmethod
    def write_history(self) -> None:
        """Write `metrics.json`."""

    @abstractmethod
    def settle(self) -> None:
        """Let go of memory that is not needed until the next use."""

    @abstractmethod
    def end(self) -> None:
        """The last evaluation is in `history`: write the run's results."""

    def begin(self, round: int, clients: Collection[int]) -> None:
        """A round of training is about to be sent to these clients."""

    def largest_message(self, num_examples: int) -> int:
        """Bytes of the values that a client with so many images may send in this round."""
        return self._request_bytes

    def dismiss(self, client_id: int) -> None:
        """This client's answer was refused: there will be none."""

    def abandon(self) -> None:
        """The round has failed: forget what was accepted."""

    def fit_config(self) -> dict[str, Scalar]:
        """Further entries of the request to clients."""
        return {}

    # Flower's interface.

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        if self.rounds_done == 0:
            self.save()
        return _NOTHING  # Flower keeps what it gets here; requests are made anew

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        return None  # the server holds no images

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        round = self.book.number(server_round)
        self.book.begin(round)
        if round <= self.rounds_done:
            return []  # only its evaluation was missing
        config: dict[str, Scalar] = {
            "round": round,
            "phase": self.phase(round).value,
            **self.fit_config(),
        }
        chosen = self._roster.choose(round, client_manager)
        self.book.now.problems += self._roster.problems
        self.begin(round, self._roster.asked)
        message = self.fit_message(round)
        self.settle()  # making it has read the weights
        self._request_bytes = sum(len(tensor) for tensor in message.tensors)
        self.book.now.sent = self._request_bytes * len(chosen)
        return [(client, FitIns(message, dict(config))) for client in chosen]

    def receive_fit(self, server_round: int, proxy: ClientProxy, result: FitRes) -> None:
        """Take in one client's answer and empty it, so that its weights are not kept.

        A server that has answers one by one calls this for each before `aggregate_fit`, which
        does it for those that are left.
        """
        now = self.book.now
        now.seen.add(proxy.cid)
        client_id = self._roster.client_id(proxy)
        size = sum(len(tensor) for tensor in result.parameters.tensors)
        now.received += size
        try:
            check_count(result.num_examples, most=self.settings.max_examples)
            check_size(size, most=self.largest_message(result.num_examples))
            metrics = accepted_metrics(result.metrics, client_id=client_id, announce=self.book.say)
            if why := self._roster.ledgers.check(client_id, metrics.pop("ledger", None)):
                raise wire.WireError(why)
            answer = ClientAnswer(
                client_id=client_id, metrics=metrics, num_examples=result.num_examples
            )
            message = decode_arrays(result.parameters)
            result.parameters = _NOTHING
            self.accept(self.book.number(server_round), answer, message)
        except wire.WireError as error:
            result.parameters = _NOTHING
            now.problems.append(line(f"client {client_id}: {error}"))
            self.dismiss(client_id)
            return
        now.answers.append(answer)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        round, now = self.book.number(server_round), self.book.now
        late = [(proxy, result) for proxy, result in results if proxy.cid not in now.seen]
        for proxy, result in sorted(late, key=lambda pair: self._roster.client_id(pair[0])):
            self.receive_fit(server_round, proxy, result)
        problems = [*self._describe_failures(results, failures), *now.problems]
        answers = sorted(now.answers, key=lambda answer: answer.client_id)
        try:
            self.book.report(round, "fit", problems, num_good=len(answers))
        except ClientFailure:
            self.abandon()
            raise
        self.book.close(round, answers, problems, self.conclude(round))
        self.save()
        return _NOTHING, {}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        round = self.book.number(server_round)
        final = round == self.settings.rounds
        if not self.book.evaluates(round):
            self.book.tell()
            return []
        config: dict[str, Scalar] = {"round": round, "final": final}
        message = self.evaluation_message()
        clients = self._roster.choose(round, client_manager, everyone=True)
        size = sum(len(tensor) for tensor in message.tensors)
        self.book.sent_to_evaluate(size * len(clients))
        return [(client, EvaluateIns(message, dict(config))) for client in clients]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        round = self.book.number(server_round)
        problems = [*self._describe_failures(results, failures), *self._roster.problems]
        good = []
        for proxy, result in results:
            client_id = self._roster.client_id(proxy)
            try:
                metrics = accepted_metrics(
                    result.metrics, client_id=client_id, announce=self.book.say
                )
                check_evaluation(result, client_id=client_id, most=self.settings.max_examples)
            except wire.WireError as error:
                problems.append(line(f"client {client_id}: {error}"))
                continue
            good.append((client_id, result, metrics))
        self.book.report(round, "evaluate", problems, num_good=len(good))
        good.sort(key=lambda answer: answer[0])
        means = heldout_metrics([(result, metrics) for _, result, metrics in good])
        loss, measured = means["heldout_coarse_loss"], means if self.has_model else {}
        self.book.evaluated(measured)
        if round == self.settings.rounds:
            self.history["final"] = {
                **measured,
                "clients": [metrics for _, _, metrics in good],
            }
            self.end()
            self.save()  # last: a run whose results could not be written can be resumed
        else:
            self.write_history()
        return loss, {}

    def _describe_failures(self, results: Sequence[Any], failures: Sequence[Any]) -> list[str]:
        return describe_failures(results, failures, ids=self._roster.ids, asked=self._roster.asked)
