"""Which clients take part in a round, and which client each of Flower's nodes is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from fedpdm.rng import Purpose, numpy_rng
from strategies.ledgers import SeenLedgers

__all__ = ["ClientFailure", "Roster", "ServerSettings"]


LARGEST_ID = 10**6  # beyond any partition-id; ids name files


class ClientFailure(RuntimeError):
    """A client failed and the config says to stop; names every failed client and why."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server's part of the configuration. `min_clients` nodes are waited for, `wait_seconds` at
    most; only in a `simulation` may privacy noise be seeded, and the `basis` of updates be other
    images than released ones. A client with more than `max_examples` images is refused, an update
    longer than `max_update_norm` shortened. A node has `answer_seconds` to say which client it
    is. `ledgers` is the file of what clients showed of theirs (`strategies.ledgers`)."""

    rounds: int
    min_clients: int
    fraction_fit: float
    on_failure: str
    evaluate_every: int
    ema_decay: float
    seed: int
    wait_seconds: int = 86_400
    simulation: bool = False
    encoding: str = "float32"
    basis: str = "released"
    max_examples: int | None = None
    max_update_norm: float | None = None
    answer_seconds: float | None = None
    ledgers: Path | None = None


class Roster:
    """Client ids by node, the clients `asked` last, and a line for each node left out then."""

    def __init__(self, settings: ServerSettings) -> None:
        self.ids: dict[str, int] = {}
        self.asked: set[int] = set()
        self.problems: list[str] = []
        self.ledgers = SeenLedgers(settings.ledgers)
        self._settings = settings

    def client_id(self, proxy: ClientProxy) -> int:
        """Whose node this is; -1 for one that was never asked."""
        return self.ids.get(proxy.cid, -1)

    def choose(
        self, round: int, manager: ClientManager, *, everyone: bool = False
    ) -> list[ClientProxy]:
        """Clients of this round in the order of their ids, drawn from the run's seed.

        A node that does not say which client it is, says what another says, or whose ledger is not
        what it was, is left out where failures are skipped. `ClientFailure` if they are not, or too
        few are left.
        """
        settings = self._settings
        proxies = self._present(round, manager)
        self.problems = self._meet(round, proxies)
        ids = {cid: self.ids[cid] for cid in proxies if cid in self.ids}
        if self.problems and (settings.on_failure == "raise" or len(ids) < settings.min_clients):
            raise ClientFailure(f"round {round}: {'; '.join(self.problems)}")
        proxies = {cid: proxies[cid] for cid in ids}
        ordered = [proxies[cid] for cid in sorted(proxies, key=lambda cid: ids[cid])]
        if not everyone and settings.fraction_fit < 1.0:
            count = max(1, math.floor(settings.fraction_fit * len(ordered) + 0.5))
            rng = numpy_rng(settings.seed, Purpose.CLIENT_SELECTION, round=round)
            picked = sorted(rng.choice(len(ordered), size=count, replace=False))
            ordered = [ordered[index] for index in picked]
        self.asked = {ids[proxy.cid] for proxy in ordered}
        return ordered

    def _present(self, round: int, manager: ClientManager) -> dict[str, ClientProxy]:
        """Nodes by name, once there are enough; `ClientFailure` if there are not in time.

        In a deployment `all` asks who is there now. `wait_for` counts those of some seconds ago, a
        node that was just lost among them, so it does not have the last word.
        """
        settings = self._settings
        deadline = time.monotonic() + settings.wait_seconds
        left = settings.wait_seconds
        while manager.wait_for(settings.min_clients, timeout=left):
            proxies = dict(manager.all())
            if len(proxies) >= settings.min_clients:
                return proxies
            if left == 0:
                break
            left = max(0, math.ceil(deadline - time.monotonic()))
        raise ClientFailure(
            f"round {round}: {manager.num_available()} clients are connected, "
            f"{settings.min_clients} are needed; start as many nodes (in simulation: "
            f"--federation-config num-supernodes={settings.min_clients}) or set "
            "aggregation.min_clients"
        )

    def _meet(self, round: int, proxies: Mapping[str, ClientProxy]) -> list[str]:
        """Ask new nodes who they are, all at once if they are machines of their own; a line for
        each that did not say, and for those who say the same (who was here before stays)."""
        fresh = [cid for cid in proxies if cid not in self.ids]
        shown: dict[str, object] = {}

        def ask(cid: str) -> int | str:
            who = f"node {cid} does not say which client it is"
            try:
                answer = proxies[cid].get_properties(
                    GetPropertiesIns({}), timeout=self._settings.answer_seconds, group_id=round
                )
            except Exception as error:
                if self._settings.simulation:
                    raise
                return f"{who}: {' '.join(str(error).split())[:300]}"
            known = answer.properties.get("client_id")
            shown[cid] = answer.properties.get("ledger")
            if type(known) is int and 0 <= known < LARGEST_ID:
                return known
            return f"{who}: {' '.join((answer.status.message or repr(known)).split())[:300]}"

        workers = 1 if self._settings.simulation else max(1, len(fresh))
        with ThreadPoolExecutor(max_workers=workers) as executor:
            answers = list(executor.map(ask, fresh))
        claims = [
            *(self.ids[cid] for cid in proxies if cid in self.ids),
            *(answer for answer in answers if isinstance(answer, int)),
        ]
        problems = [answer for answer in answers if isinstance(answer, str)]
        for cid, answer in zip(fresh, answers, strict=True):
            if isinstance(answer, int) and claims.count(answer) == 1:
                if line := self.ledgers.check(answer, shown[cid]):
                    problems.append(f"client {answer}: {line}")
                else:
                    self.ids[cid] = answer
        if twice := sorted({claim for claim in claims if claims.count(claim) > 1}):
            problems.append(
                f"two nodes have the same client id ({sorted(claims)}): {twice}; give each node "
                "its own partition-id"
            )
        return problems
