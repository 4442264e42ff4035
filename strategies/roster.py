"""Which clients take part in a round, and which client each of Flower's nodes is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from fedpdm.rng import Purpose, numpy_rng
from fedpdm.text import line
from strategies.ledgers import SeenLedgers

__all__ = ["ClientFailure", "Roster", "ServerSettings"]


LARGEST_ID = 10**6  # beyond any partition-id; ids name files
LOOK_SECONDS = 5  # between looks at who is there while nodes that were left out are counted


class ClientFailure(RuntimeError):
    """A client failed and the config says to stop; names every failed client and why."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server's part of the configuration. `min_clients` nodes are waited for, `wait_seconds` at
    most; only in a `simulation` may privacy noise be seeded, and the `basis` of updates be other
    images than released ones. A client with more than `max_examples` images is refused, an update
    longer than `max_update_norm` shortened. A node has `answer_seconds` to say which client it
    is. `registered` says which client each node's key is, the oldest first (nothing of nodes whose
    keys say no client). `ledgers` is the file of what clients showed of theirs
    (`strategies.ledgers`)."""

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
    registered: Callable[[], Mapping[str, int]] = dict


class Roster:
    """Client ids by node, the clients `asked` last, and a line for each node left out then.

    Where keys are registered, a key is a client, whoever comes first: a node that claims another
    one is left out, which `announce` says, and ends neither the run nor the other's part in it.
    """

    def __init__(
        self, settings: ServerSettings, announce: Callable[[str], None] = lambda _: None
    ) -> None:
        self.ids: dict[str, int] = {}
        self.asked: set[int] = set()
        self.problems: list[str] = []
        self.ledgers = SeenLedgers(settings.ledgers)
        self._settings = settings
        self._announce = announce
        self._said: set[str] = set()
        self._shown: dict[str, object] = {}  # of its ledger, by each node

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
        deadline = time.monotonic() + settings.wait_seconds
        false: set[str] = set()  # nodes that claim another's client: others are waited for
        while True:
            proxies = self._present(round, manager, deadline=deadline, besides=false)
            self.problems, found = self._meet(round, proxies)
            false.update(found)
            ids = {cid: self.ids[cid] for cid in proxies if cid in self.ids}
            if not found or len(ids) >= settings.min_clients:
                break
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

    def _present(
        self, round: int, manager: ClientManager, *, deadline: float, besides: Collection[str]
    ) -> dict[str, ClientProxy]:
        """Nodes by name, `besides` those, once there are enough; `ClientFailure` if there are not
        in time.

        In a deployment `all` asks who is there now. `wait_for` counts those of some seconds ago, a
        node that was just lost among them, so it does not have the last word.
        """
        settings, others = self._settings, 0
        left = max(0, math.ceil(deadline - time.monotonic()))
        while True:
            wait = min(left, LOOK_SECONDS) if besides else left
            manager.wait_for(settings.min_clients + others, timeout=wait)
            every = dict(manager.all())
            proxies = {cid: proxy for cid, proxy in every.items() if cid not in besides}
            others = len(every) - len(proxies)
            if len(proxies) >= settings.min_clients:
                return proxies
            if left == 0:
                break
            left = max(0, math.ceil(deadline - time.monotonic()))
        raise ClientFailure(
            f"round {round}: {len(proxies)} clients are connected, "
            f"{settings.min_clients} are needed; start as many nodes (in simulation: "
            f"--federation-config num-supernodes={settings.min_clients}) or set "
            "aggregation.min_clients"
        )

    def _meet(
        self, round: int, proxies: Mapping[str, ClientProxy]
    ) -> tuple[list[str], Collection[str]]:
        """Ask new nodes who they are; a line for each that did not say, and the nodes whose key is
        another client's, or was replaced.

        Of nodes that claim one client and whose keys say none, who was here before stays.
        """
        keys = self._settings.registered()
        self.ids = {cid: k for cid, k in self.ids.items() if not _false_claim(cid, k, keys)}
        claims = {cid: self.ids[cid] for cid in proxies if cid in self.ids}
        fresh = {cid: proxy for cid, proxy in proxies.items() if cid not in claims}
        problems: list[str] = []
        false: dict[str, str] = {}
        for cid, answer in zip(fresh, self._ask(round, fresh), strict=True):
            if isinstance(answer, str):
                problems.append(answer)
            elif why := _false_claim(cid, answer, keys):
                false[cid] = why
            else:
                claims[cid] = answer
        order = list(keys)
        every = sorted(claims.values())
        for client in sorted({k for k in every if every.count(k) > 1}):
            rivals = [cid for cid, k in claims.items() if k == client]
            if not all(cid in keys for cid in rivals):
                problems.append(
                    f"two nodes have the same client id ({every}): [{client}]; give each node "
                    "its own partition-id"
                )
                left_out = [cid for cid in rivals if cid in fresh]
            else:
                left_out = sorted(rivals, key=order.index)[:-1]
                why = f"is client {client} by an older key than another node's"
                false |= dict.fromkeys(left_out, why)
            for cid in left_out:
                del claims[cid]
                self.ids.pop(cid, None)
        for cid in [cid for cid in claims if cid in fresh]:
            if changed := self.ledgers.check(claims[cid], self._shown.get(cid)):
                problems.append(f"client {claims.pop(cid)}: {changed}")
        self.ids |= claims
        for cid, why in false.items():
            self._say(f"node {cid} {why}; it is left out")
        return problems, false

    def _ask(self, round: int, nodes: Mapping[str, ClientProxy]) -> list[int | str]:
        """The client that each says it is, or a line; all at once if they are machines of their
        own."""

        def ask(cid: str) -> int | str:
            who = f"node {cid} does not say which client it is"
            try:
                answer = nodes[cid].get_properties(
                    GetPropertiesIns({}), timeout=self._settings.answer_seconds, group_id=round
                )
            except Exception as error:
                if self._settings.simulation:
                    raise
                return f"{who}: {line(error)}"
            known = answer.properties.get("client_id")
            self._shown[cid] = answer.properties.get("ledger")
            if type(known) is int and 0 <= known < LARGEST_ID:
                return known
            return f"{who}: {line(answer.status.message or repr(known))}"

        workers = 1 if self._settings.simulation else max(1, len(nodes))
        with ThreadPoolExecutor(max_workers=workers) as executor:
            return list(executor.map(ask, nodes))

    def _say(self, words: str) -> None:
        """Announce it, once a run."""
        if words not in self._said:
            self._said.add(words)
            self._announce(words)


def _false_claim(cid: str, client: int, keys: Mapping[str, int]) -> str:
    """Why this node cannot be that client, by the registered keys; nothing if it can."""
    own = keys.get(cid)
    if own is not None:
        return "" if own == client else f"is client {own} by its key and says that it is {client}"
    taken = client in keys.values()
    return f"says that it is client {client}, whose key is another node's" if taken else ""
