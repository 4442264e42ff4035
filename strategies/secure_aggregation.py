"""Secure aggregation: the server learns the weighted mean of a round's updates and no single one,
or the total of class statistics.

Flower's `SecAggPlusWorkflow` runs each round in place of plain requests: keys are exchanged, shares
of them handed round, the model sent and masked updates collected, shares of the masks' seeds asked
back (four messages to each client). What it hands to the strategy is the mean; header, metrics and
number of images of each client come with it in the clear.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import FitRes, NDArrays, Parameters, Scalar
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server import ClientManager, LegacyContext
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.superlink.grid import InMemoryGrid

from fedpdm import wire
from fedpdm.config import AggregationConfig
from fedpdm.text import line
from fedpdm.wire.summands import (
    MODULUS,
    SumError,
    SumTerms,
    mean_update,
    summand_shapes,
    update_terms,
)
from strategies.answers import ClientAnswer, decode_arrays
from strategies.coarse import CoarseStrategy
from strategies.fedavg import CoarseFedAvg
from strategies.roster import ClientFailure
from strategies.streaming import Failures, FitResult, StreamingServer

__all__ = ["SecureFedAvg", "SecureRounds", "SecureServer", "WatchedGrid"]

# What a client's answer to each stage must hold, in equally long lists where they are lists.
_ANSWERS: Mapping[str, Mapping[str, type | tuple[type]]] = {
    Stage.SETUP: {Key.PUBLIC_KEY_1: bytes, Key.PUBLIC_KEY_2: bytes},
    Stage.SHARE_KEYS: {Key.DESTINATION_LIST: (int,), Key.CIPHERTEXT_LIST: (bytes,)},
    Stage.COLLECT_MASKED_VECTORS: {Key.MASKED_PARAMETERS: (bytes,)},
    Stage.UNMASK: {Key.NODE_ID_LIST: (int,), Key.SHARE_LIST: (bytes,)},
}


class SecureRounds(CoarseStrategy):
    """A strategy whose rounds a `SecureServer` runs: it is given the same sum with each answer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_asked = 0
        self.counts: list[int] = []  # what those in the sum weigh
        self.sum: NDArrays = []
        self._adds_up = False

    @property
    @abstractmethod
    def section(self) -> AggregationConfig:
        """How updates are aggregated."""

    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the arrays that a client sends in this round, Flower's weight first."""

    @abstractmethod
    def terms(self, num_clients: int) -> SumTerms:
        """What Flower's protocol is told."""

    def is_secure(self, round: int) -> bool:
        """Whether there is something to add up in a round."""
        return True

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._adds_up = self.is_secure(round)
        if self._adds_up and len(clients) < 3:
            raise ClientFailure(
                f"round {round}: secure aggregation needs at least 3 clients, "
                f"{len(clients)} take part"
            )
        super().begin(round, clients)
        self.counts, self.sum, self.num_asked = [], [], len(clients)

    def dismiss(self, client_id: int) -> None:
        """Its update is in the sum all the same."""

    def abandon(self) -> None:
        super().abandon()
        self.sum = []

    def largest_message(self, num_examples: int) -> int:
        """Of what the workflow hands over, float64, with a frame around each array."""
        if not self._adds_up:
            return super().largest_message(num_examples)
        return sum(8 * int(np.prod(shape)) + 256 for shape in self.shapes())

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        if not self._adds_up:
            super().accept(round, answer, message)
            return
        if answer.num_examples < 1:
            raise wire.WireError(f"num_examples must be at least 1, got {answer.num_examples}")
        self.counts.append(answer.num_examples)
        self.sum = message  # the same for all

    def conclude_secure(
        self, server_round: int, results: list[FitResult], grid: WatchedGrid
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """`aggregate_fit` with what the grid has seen: bytes, and who failed why.

        A client whose answer is refused here is in the sum already, so the round stops.
        """
        now, round = self.book.now, self.book.number(server_round)
        known = len(now.problems)  # of nodes that were not asked
        for proxy, result in results:
            self.receive_fit(server_round, proxy, result)
        if refused := now.problems[known:]:
            raise ClientFailure(f"round {round} fit: {refused[0]}")
        now.received, now.sent = grid.received, grid.sent
        now.problems += grid.problems
        return self.aggregate_fit(server_round, results, [])

    def give_up(self, server_round: int, problems: Collection[str]) -> None:
        """`ClientFailure`: the workflow ended without a sum."""
        self.abandon()
        why = list(problems) or ["secure aggregation stopped before there was a sum"]
        self.book.report(self.book.number(server_round), "fit", why, num_good=0)


class SecureFedAvg(SecureRounds, CoarseFedAvg):
    """Takes the mean of a round's updates from a `SecureServer`."""

    @property
    def section(self) -> AggregationConfig:
        return self._aggregation

    def shapes(self) -> list[tuple[int, ...]]:
        return summand_shapes(self.weights)

    def terms(self, num_clients: int) -> SumTerms:
        return update_terms(self.section, num_clients)

    def merge(self, round: int) -> dict[str, float]:
        try:
            if not self.sum:
                raise SumError("no update to average")
            change = mean_update(self.sum, self.weights, self.section, self.counts)
        except SumError as error:
            raise wire.WireError(f"round {round}: {error}") from None
        self.sum = []
        mean = {name: (self.weights[name] + change[name]).float() for name in self.weights}
        self._step(round, mean)
        return {}


class WatchedGrid:
    """Flower's grid, with a look at every answer: what is malformed becomes an error of its node.

    `problems` has one line for each client that failed or did not answer; bytes are of keys, shares
    and arrays as sent.
    """

    def __init__(self, grid: Any, strategy: SecureRounds) -> None:
        self._grid, self._strategy = grid, strategy
        self._shapes = strategy.shapes()
        self.problems: list[str] = []
        self.sent = self.received = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As `flwr.serverapp.Grid`; without the answers that are malformed."""
        asked = list(messages)
        self.sent += sum(_num_bytes(message.content) for message in asked)
        waiting = {message.metadata.dst_node_id for message in asked}
        stage = str(asked[0].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        good = []
        for reply in self._grid.send_and_receive(asked, timeout=timeout):
            node = reply.metadata.src_node_id
            if node not in waiting:
                continue
            waiting.discard(node)
            if reply.has_error():
                self._note(node, reply.error.reason or "failed")
                continue
            self.received += _num_bytes(reply.content)
            if wrong := self._fault(stage, reply):
                self._note(node, wrong)
            else:
                good.append(reply)
        for node in sorted(waiting):
            self._note(node, "no answer in time")
        return good

    def _note(self, node: int, why: str) -> None:
        client = self._strategy.client_of(str(node))
        self.problems.append(line(f"client {client}: {why}"))

    def _fault(self, stage: str, reply: Message) -> str:
        """What is wrong with an answer to a stage, in a few words; nothing if it is fine."""
        record = reply.content.config_records.get(RECORD_KEY_CONFIGS)
        if record is None:
            return f"sent no answer to stage {stage} of secure aggregation"
        lengths = set()
        for name, kind in _ANSWERS[stage].items():
            value = record.get(name)
            if isinstance(kind, tuple):
                if not isinstance(value, list) or any(type(part) is not kind[0] for part in value):
                    return f"sent no list of {kind[0].__name__} as {name}"
                lengths.add(len(value))
            elif type(value) is not kind:
                return f"sent no {kind.__name__} as {name}"
        if len(lengths) > 1:
            return f"sent lists of different lengths in stage {stage}"
        if stage == Stage.COLLECT_MASKED_VECTORS:
            return self._masked_fault(record)
        return ""

    def _masked_fault(self, record: ConfigRecord) -> str:
        """Refuses by size before anything is decoded."""
        parts: Any = record[Key.MASKED_PARAMETERS]
        if len(parts) != len(self._shapes):
            return f"sent {len(parts)} masked arrays, expected {len(self._shapes)}"
        for part, shape in zip(parts, self._shapes, strict=True):
            if len(part) > 8 * int(np.prod(shape)) + 256:
                return f"sent a masked array of {len(part)} bytes for shape {shape}"
            try:
                (array,) = decode_arrays(Parameters([part], tensor_type="numpy.ndarray"))
            except wire.WireError as error:
                return f"sent a masked array that is none: {error}"
            if array.dtype != np.int64 or array.shape != shape:
                return f"sent a masked array of {array.dtype} {array.shape}, expected int64 {shape}"
        return ""


class SecureServer(StreamingServer):
    """A `StreamingServer` whose rounds of training are Flower's SecAgg+ workflow."""

    def __init__(self, *, client_manager: ClientManager, strategy: SecureRounds) -> None:
        super().__init__(client_manager=client_manager, strategy=strategy)
        self._secure = strategy

    def fit_round(
        self, server_round: int, timeout: float | None
    ) -> tuple[Parameters | None, dict[str, Scalar], tuple[list[FitResult], Failures]] | None:
        """One round, to the end or with `ClientFailure`."""
        if not self._secure.is_secure(self._secure.book.number(server_round)):
            return super().fit_round(server_round, timeout)
        requests = self._secure.configure_fit(server_round, self.parameters, self._client_manager)
        if not requests:
            return None
        inner = getattr(requests[0][0], "grid", None)
        if inner is None:
            raise ClientFailure("secure aggregation needs clients behind Flower's messages")
        if isinstance(inner, InMemoryGrid):
            inner.pull_interval = 0.02
        grid = WatchedGrid(inner, self._secure)
        handed = _Handover(requests)
        section, terms = self._secure.section, self._secure.terms(len(requests))
        workflow = SecAggPlusWorkflow(
            num_shares=1.0,  # everyone's neighbour is everyone
            reconstruction_threshold=section.secure_threshold,
            max_weight=terms.max_weight,
            clipping_range=terms.clipping_range,
            quantization_range=terms.target_range,
            modulus_range=MODULUS,
            timeout=timeout,
        )
        empty = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
        context = LegacyContext(
            empty,
            strategy=cast(Strategy, handed),
            client_manager=self._client_manager,
        )
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord(
            {WorkflowKey.CURRENT_ROUND: server_round}
        )
        context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
        try:
            workflow(grid, context)  # type: ignore[arg-type]
        except (ValueError, KeyError, IndexError, TypeError, ArithmeticError) as error:
            grid.problems.append(line(f"secure aggregation: {type(error).__name__}: {error}"))
        if handed.results is None:
            self._secure.give_up(server_round, grid.problems)
            return None
        parameters, metrics = self._secure.conclude_secure(server_round, handed.results, grid)
        return parameters, metrics, (handed.results, [])


class _Handover:
    """What the workflow takes for a strategy: it gives requests and keeps results."""

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests
        self.results: list[tuple[ClientProxy, FitRes]] | None = None

    def configure_fit(self, *_: Any) -> list[Any]:
        return self._requests

    def aggregate_fit(
        self, server_round: int, results: list[FitResult], failures: Any
    ) -> tuple[None, dict[str, Scalar]]:
        self.results = results
        return None, {}


def _num_bytes(content: RecordDict) -> int:
    """Bytes of the arrays, keys and shares of a message."""
    total = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    for record in content.config_records.values():
        for value in record.values():
            parts = value if isinstance(value, list) else [value]
            total += sum(len(part) for part in parts if isinstance(part, bytes))
    return total
