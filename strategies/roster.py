"""Which clients take part in a round, and which client each of Flower's nodes is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from fedpdm.rng import Purpose, numpy_rng

__all__ = ["ClientFailure", "Roster", "ServerSettings"]


class ClientFailure(RuntimeError):
    """A client failed and the config says to stop; names every failed client and why."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server's part of the configuration. `min_clients` nodes are waited for, `wait_seconds` at
    most; only in a `simulation` may privacy noise be seeded, and the `basis` of updates be other
    images than released ones."""

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


class Roster:
    """Client ids by node, and the clients `asked` last."""

    def __init__(self, settings: ServerSettings) -> None:
        self.ids: dict[str, int] = {}
        self.asked: set[int] = set()
        self._settings = settings

    def client_id(self, proxy: ClientProxy) -> int:
        """Whose node this is; -1 for one that was never asked."""
        return self.ids.get(proxy.cid, -1)

    def choose(
        self, round: int, manager: ClientManager, *, everyone: bool = False
    ) -> list[ClientProxy]:
        """Clients of this round in the order of their ids, drawn from the run's seed.

        `ClientFailure` if too few are connected, or a node does not say which client it is.
        """
        settings = self._settings
        if not manager.wait_for(settings.min_clients, timeout=settings.wait_seconds):
            raise ClientFailure(
                f"round {round}: {manager.num_available()} clients are connected, "
                f"{settings.min_clients} are needed; start as many nodes (in simulation: "
                f"--federation-config num-supernodes={settings.min_clients}) or set "
                "aggregation.min_clients"
            )
        proxies = dict(manager.all())
        for cid, proxy in proxies.items():
            if cid not in self.ids:
                answer = proxy.get_properties(GetPropertiesIns({}), timeout=None, group_id=round)
                known = answer.properties.get("client_id")
                if not isinstance(known, int):
                    raise ClientFailure(
                        f"round {round}: node {cid} does not say which client it is: "
                        f"{answer.status.message or known!r}"
                    )
                self.ids[cid] = known
        ids = {cid: self.ids[cid] for cid in proxies}
        if len(set(ids.values())) < len(ids):
            raise ClientFailure(
                f"round {round}: two nodes have the same client id ({sorted(ids.values())}); "
                "give each node its own partition-id"
            )
        ordered = [proxies[cid] for cid in sorted(proxies, key=lambda cid: ids[cid])]
        if not everyone and settings.fraction_fit < 1.0:
            count = max(1, math.floor(settings.fraction_fit * len(ordered) + 0.5))
            rng = numpy_rng(settings.seed, Purpose.CLIENT_SELECTION, round=round)
            picked = sorted(rng.choice(len(ordered), size=count, replace=False))
            ordered = [ordered[index] for index in picked]
        self.asked = {ids[proxy.cid] for proxy in ordered}
        return ordered
