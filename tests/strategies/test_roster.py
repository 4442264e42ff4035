"""Which nodes take part in a round of a deployed federation, when some do not say who they are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from flwr.common import GetPropertiesRes
from flwr.server import SimpleClientManager

from strategies.roster import ClientFailure, Roster
from tests.support.strategy_fakes import FakeProxy, settings


class SilentProxy(FakeProxy):
    """A node whose app fails, or that does not answer in time: Flower raises its error."""

    def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> GetPropertiesRes:
        super().get_properties(ins, timeout, group_id)
        raise ValueError(f"Message contains an Error\n(reason: timeout {timeout})")


def roster_of(
    *proxies: FakeProxy, names: tuple[str, ...] = (), **changes: Any
) -> tuple[Roster, SimpleClientManager]:
    manager = SimpleClientManager()
    for index, proxy in enumerate(proxies):
        proxy.cid = names[index] if names else f"n{index}"
        manager.register(proxy)
    return Roster(settings(**{"on_failure": "skip", "answer_seconds": 7.0, **changes})), manager


def test_a_node_that_does_not_say_who_it_is_is_left_out_and_asked_again() -> None:
    silent = SilentProxy(1)
    roster, manager = roster_of(FakeProxy(0), silent, FakeProxy(2))
    for round in (1, 2):
        chosen = roster.choose(round, manager)
        assert [proxy.cid for proxy in chosen] == ["n0", "n2"]
        assert roster.asked == {0, 2}
        assert roster.problems == [
            "node n1 does not say which client it is: Message contains an Error (reason: timeout "
            "7.0)"
        ]
        assert silent.num_asked == round
    assert manager.all()["n0"].num_asked == 1
    silent.__class__ = FakeProxy  # it has recovered
    assert [proxy.cid for proxy in roster.choose(3, manager)] == ["n0", "n1", "n2"]
    assert roster.problems == []


def test_such_a_node_stops_the_run_where_failures_do() -> None:
    roster, manager = roster_of(FakeProxy(0), SilentProxy(1), on_failure="raise")
    with pytest.raises(ClientFailure, match="round 4: node n1 does not say which client it is"):
        roster.choose(4, manager)


def test_too_few_that_say_who_they_are_stop_the_run() -> None:
    roster, manager = roster_of(FakeProxy(0), SilentProxy(1), min_clients=2)
    with pytest.raises(ClientFailure, match="node n1 does not say which client it is"):
        roster.choose(1, manager)


def test_of_two_new_nodes_with_one_identity_neither_takes_part() -> None:
    roster, manager = roster_of(FakeProxy(0), FakeProxy(5), FakeProxy(5))
    assert [proxy.cid for proxy in roster.choose(1, manager)] == ["n0"]
    (problem,) = roster.problems
    assert problem.startswith("two nodes have the same client id ([0, 5, 5]): [5]")


def test_who_was_there_before_keeps_the_identity() -> None:
    roster, manager = roster_of(FakeProxy(0), FakeProxy(5))
    roster.choose(1, manager)
    late = FakeProxy(5)
    late.cid = "late"
    manager.register(late)
    assert [proxy.cid for proxy in roster.choose(2, manager)] == ["n0", "n1"]
    assert "two nodes have the same client id ([0, 5, 5]): [5]" in roster.problems[0]
    manager.unregister(manager.all()["n1"])  # its machine was replaced
    assert [proxy.cid for proxy in roster.choose(3, manager)] == ["n0", "late"]
    assert roster.problems == []


def test_a_node_that_was_just_lost_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's `all` looks who is there, `wait_for` does not: the lost node is waited for."""
    lost = FakeProxy(1)
    roster, manager = roster_of(FakeProxy(0), lost, min_clients=2)
    plain, timers = manager.all, list[threading.Timer]()

    def all_now() -> Any:
        if not timers:
            manager.unregister(lost)
            timers.append(threading.Timer(0.3, manager.register, [lost]))
            timers[0].start()
        return plain()

    monkeypatch.setattr(manager, "all", all_now)
    assert [proxy.cid for proxy in roster.choose(2, manager)] == ["n0", "n1"]
    assert len(timers) == 1


def test_a_node_that_stays_lost_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = FakeProxy(1)
    roster, manager = roster_of(FakeProxy(0), lost, min_clients=2, wait_seconds=1)
    plain = manager.all

    def all_now() -> Any:
        manager.unregister(lost)
        return plain()

    monkeypatch.setattr(manager, "all", all_now)
    with pytest.raises(ClientFailure, match="round 2: 1 clients are connected, 2 are needed"):
        roster.choose(2, manager)


def test_deployed_nodes_are_asked_at_the_same_time() -> None:
    """Each answers only when all have been asked; one after the other they would wait for ever."""
    together = threading.Barrier(3, timeout=20.0)

    class Patient(FakeProxy):
        def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> GetPropertiesRes:
            together.wait()
            return super().get_properties(ins, timeout, group_id)

    roster, manager = roster_of(*(Patient(k) for k in range(3)))
    assert len(roster.choose(1, manager)) == 3


def test_simulated_nodes_are_asked_one_by_one() -> None:
    """They share a process and its memory; what one raises is an error of ours."""
    inside = threading.Lock()

    class Alone(FakeProxy):
        def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> GetPropertiesRes:
            assert inside.acquire(blocking=False)
            try:
                return super().get_properties(ins, timeout, group_id)
            finally:
                inside.release()

    roster, manager = roster_of(*(Alone(k) for k in range(4)), simulation=True)
    assert len(roster.choose(1, manager)) == 4
    roster, manager = roster_of(SilentProxy(0), simulation=True)
    with pytest.raises(ValueError, match="Message contains an Error"):
        roster.choose(1, manager)


# --- Registered keys: a key is a client -------------------------------------------------------


def registered(
    *claims: int, keys: Mapping[str, int], **changes: Any
) -> tuple[Roster, SimpleClientManager, list[str]]:
    """A roster of nodes n0, n1, ... that claim these clients, and what it announces."""
    said: list[str] = []
    roster, manager = roster_of(
        *map(FakeProxy, claims), **{"registered": lambda: keys, "min_clients": 2, **changes}
    )
    roster.__init__(roster._settings, said.append)  # type: ignore[misc]
    return roster, manager, said


def chosen(roster: Roster, round: int, manager: SimpleClientManager) -> list[str]:
    return [proxy.cid for proxy in roster.choose(round, manager)]


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_a_false_claim_ends_neither_the_run_nor_the_honest_client(on_failure: str) -> None:
    """n0, whose key is client 1's, claims client 0 before n1, which is client 0, is there."""
    keys = {"n0": 1, "n1": 0, "n2": 2}
    roster, manager, said = registered(0, 2, keys={"n0": 1, "n1": 2}, min_clients=1)
    assert chosen(roster, 1, manager) == ["n1"]
    roster, manager, said = registered(0, 0, 2, keys=keys, on_failure=on_failure)
    for round in (1, 2, 3):
        assert chosen(roster, round, manager) == ["n1", "n2"]
        assert roster.problems == []
        assert roster.asked == {0, 2}
    assert said == ["node n0 is client 1 by its key and says that it is 0; it is left out"]
    manager.all()["n0"].properties["client_id"] = 1  # it has come to its senses
    assert chosen(roster, 4, manager) == ["n1", "n0", "n2"]


def test_a_key_that_says_no_client_may_not_be_a_registered_one() -> None:
    roster, manager, said = registered(0, 0, 7, keys={"n1": 0})
    assert chosen(roster, 1, manager) == ["n1", "n2"]
    assert said == ["node n0 says that it is client 0, whose key is another node's; it is left out"]
    manager.unregister(manager.all()["n1"])
    late = FakeProxy(9)
    late.cid = "late"
    manager.register(late)
    assert chosen(roster, 2, manager) == ["n2", "late"]  # nor when that one is away


def test_who_claimed_first_gives_way_to_a_key_that_is_registered_later() -> None:
    keys: dict[str, int] = {}
    roster, manager, said = registered(0, 1, keys=keys)
    assert chosen(roster, 1, manager) == ["n0", "n1"]
    honest = FakeProxy(0)
    honest.cid = "honest"
    keys["honest"] = 0
    manager.register(honest)
    assert chosen(roster, 2, manager) == ["honest", "n1"]
    assert roster.client_id(manager.all()["n0"]) == -1
    assert len(said) == 1


def test_of_two_keys_of_one_client_the_newest_counts() -> None:
    """A key that was replaced, and perhaps is in other hands, gives way."""
    keys = {"n0": 0, "n1": 1}
    roster, manager, said = registered(0, 1, keys=keys, on_failure="raise")
    assert chosen(roster, 1, manager) == ["n0", "n1"]
    newer = FakeProxy(0)
    newer.cid = "newer"
    keys["newer"] = 0
    manager.register(newer)
    assert chosen(roster, 2, manager) == ["newer", "n1"]
    assert said == ["node n0 is client 0 by an older key than another node's; it is left out"]


def test_honest_clients_are_waited_for_beside_a_false_claim() -> None:
    """The node that claims falsely does not count as one of those that are needed."""
    roster, manager, said = registered(0, 0, keys={"n0": 1, "n1": 0, "n2": 2}, wait_seconds=60)
    late = FakeProxy(2)
    late.cid = "n2"
    timer = threading.Timer(0.3, manager.register, [late])
    timer.start()
    assert chosen(roster, 1, manager) == ["n1", "n2"]
    timer.join()
    assert len(said) == 1


def test_a_false_claim_alone_is_no_client() -> None:
    roster, manager, _ = registered(0, 0, keys={"n0": 1, "n1": 0}, wait_seconds=1)
    with pytest.raises(ClientFailure, match="round 1: 1 clients are connected, 2 are needed"):
        roster.choose(1, manager)
