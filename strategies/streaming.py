"""Flower's server, except that a client's answer is taken in when it comes and then let go.

Flower's own `Server` collects all answers of a round before it shows them to the strategy, which
costs as many copies of the model as there are clients.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from flwr.common import Code, FitIns, FitRes, Parameters, Scalar
from flwr.server import ClientManager, Server
from flwr.server.client_proxy import ClientProxy
from flwr.superlink.grid import InMemoryGrid

from strategies.coarse import CoarseStrategy

__all__ = ["StreamingServer"]

FitResult = tuple[ClientProxy, FitRes]
Failures = list[FitResult | BaseException]


class StreamingServer(Server):
    """A `Server` for a `CoarseStrategy`."""

    def __init__(self, *, client_manager: ClientManager, strategy: CoarseStrategy) -> None:
        super().__init__(client_manager=client_manager, strategy=strategy)
        self._coarse = strategy

    def fit_round(
        self, server_round: int, timeout: float | None
    ) -> tuple[Parameters | None, dict[str, Scalar], tuple[list[FitResult], Failures]] | None:
        """One round of training; what it returns of clients' answers has no weights any more."""
        instructions = self._coarse.configure_fit(
            server_round, self.parameters, self._client_manager
        )
        if not instructions:
            return None

        for proxy in [proxy for proxy, _ in instructions]:  # no name may outlive the message
            # Flower's simulation looks for each answer ten times a second: for a few clients with
            # rounds of seconds, too seldom.
            if isinstance(grid := getattr(proxy, "grid", None), InMemoryGrid):
                grid.pull_interval = min(0.1, max(0.02, len(instructions) / 1000))
        turn = threading.Lock()

        def ask(proxy: ClientProxy, request: FitIns) -> FitResult | BaseException:
            try:
                answer = proxy.fit(request, timeout=timeout, group_id=server_round)
            except Exception as error:
                return error
            if answer.status.code == Code.OK:
                with turn:
                    self._coarse.receive_fit(server_round, proxy, answer)
            return proxy, answer

        results: list[FitResult] = []
        failures: Failures = []
        with ThreadPoolExecutor(max_workers=self.max_workers) as executor:
            futures = [executor.submit(ask, *instruction) for instruction in instructions]
            del instructions  # with the message, once all have it
            for future in futures:
                outcome = future.result()
                if isinstance(outcome, BaseException) or outcome[1].status.code != Code.OK:
                    failures.append(outcome)
                else:
                    results.append(outcome)
        parameters, metrics = self._coarse.aggregate_fit(server_round, results, failures)
        return parameters, metrics, (results, failures)
