"""The in-process engine: Flower's own server loop over clients that live in this process.

For tests, debugging and machines without Ray. `server_components` and `client_fn` are the very
functions that `flwr run` calls; only the transport differs: a client's method is called instead of
sending a message (for secure aggregation, its app with a copy of the message). One client works at
a time, in the order of client ids.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.client import Client
from flwr.common import (
    Context,
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    ReconnectIns,
    RecordDict,
)
from flwr.server.client_proxy import ClientProxy
from flwr.supercore.task_identity import TaskIdentity

from clients.client_app import app, client_fn
from fedpdm.config import RunConfig, config_to_json
from fedpdm.storage.holding import held
from strategies.coarse import CoarseStrategy
from strategies.server_app import server_components

__all__ = ["run_in_process"]


class _LocalGrid:
    """Flower's grid, as far as its secure aggregation uses it: an app call for each message."""

    def __init__(self, contexts: Mapping[int, Context]) -> None:
        self._contexts = contexts

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [self._answer(copy.deepcopy(message)) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as a node does: the server gets its text
            return Message(Error(code=0, reason=str(error)), reply_to=message)


class _LocalProxy(ClientProxy):
    """A client of this process; made anew for each message, as Flower does."""

    def __init__(self, context: Context, grid: _LocalGrid) -> None:
        super().__init__(str(context.node_id))
        self._context = context
        self.node_id, self.grid = context.node_id, grid

    def _client(self) -> Client:
        return client_fn(self._context)

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        return self._client().get_properties(ins)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        return self._client().get_parameters(ins)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        return self._client().fit(ins)

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        return self._client().evaluate(ins)

    def reconnect(
        self, ins: ReconnectIns, timeout: float | None, group_id: int | None
    ) -> DisconnectRes:
        return DisconnectRes(reason="")


def run_in_process(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    releases: Path | None = None,
    allow_new_release: bool = False,
    strategy: type[CoarseStrategy] | None = None,
) -> None:
    """Run a whole federation here; results are under `out` when it returns.

    `releases` is where clients keep their releases (default: in the run directory),
    `allow_new_release` lets them noise released images once more. `strategy` takes the place of the
    one that the config names (see `strategies.server_app.build_strategy`).

    Raises what the server raises: `ConfigError` for a run directory of another config or one that
    another process works in, `ClientFailure` for a failed client.
    """
    flat: dict[str, Any] = {
        "resolved-config": config_to_json(config),
        "run-dir": str(out.absolute()),
        "resume": resume,
        "release-dir": str(releases.absolute()) if releases else "",
        "allow-new-release": allow_new_release,
    }

    def context(node_id: int, node_config: dict[str, Any]) -> Context:
        return Context(
            run_id=0, node_id=node_id, node_config=node_config, state=RecordDict(), run_config=flat
        )

    with held(out):
        components = server_components(context(0, {}), strategy=strategy)
        server, rounds = components.server, components.config
        assert server is not None
        assert rounds is not None
        num_clients = config.partition.num_clients
        contexts = {
            index + 1: context(index + 1, {"partition-id": index, "num-partitions": num_clients})
            for index in range(num_clients)
        }
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0  # of what it sends
        grid = _LocalGrid(contexts)
        for own in contexts.values():
            server.client_manager().register(_LocalProxy(own, grid))
        server.set_max_workers(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)  # the strategy says what matters
        server.fit(rounds.num_rounds, rounds.round_timeout)
