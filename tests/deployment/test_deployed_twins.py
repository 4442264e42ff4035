"""Two participants with one identity: the same key twice, and a key that says another client.

Real processes, gRPC with TLS, registered keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpdm.privacy.ledger import Record
from fedpdm.privacy.releases import ReleaseStore
from tests.deployment.test_deployed_faults import (
    SKIP,
    assert_noised_once,
    present,
    rounds_of,
    split,
)
from tests.support.real_nodes import Node, real_federation, wait_until

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.faults]

# A copy that is let in within 3 seconds of the loss hides it from Flower, which would then wait.
PATIENT = {**SKIP, "min_clients": 2, "round_timeout": 240.0}


def records(node: Node) -> tuple[Record, ...]:
    return tuple(ReleaseStore(node.store).ledger().records)


def assert_turned_away(node: Node) -> None:
    """It ends by itself, was never let in, and has written nothing."""
    assert node.process_ended(180.0), node.output()
    assert node.process is not None
    assert node.process.returncode != 0
    assert not node.joined()


def test_one_key_is_one_participant(tmp_path: Path) -> None:
    """While a node is online, a copy of it is turned away, and changes nothing for the node. When
    the node's machine is lost in a round, the copy is let in after a minute and goes on with the
    node's store; then it is the node that is turned away."""
    root = tmp_path / "federation"
    with real_federation(root) as federation:
        config, parts = split(root / "data", 2, 3, aggregation=PATIENT)
        first, second = (federation.node(f"node-{k}", k, part) for k, part in enumerate(parts))
        federation.start()
        for node in (first, second):
            node.start()
        wait_until(lambda: first.joined() and second.joined(), "both nodes are online")
        copy = second.twin("copy", **{"store-dir": str(root / "store-of-the-copy")})
        assert_turned_away(copy.start())
        assert not copy.store.exists()

        out = root / "run"
        run = federation.run(config, out)
        wait_until(
            lambda: len(rounds_of(out)) == 1 and second.working("train"),
            "round 2 goes on",
            unless=run.ended,
        )
        assert present(rounds_of(out)[0]) == [0, 1]
        before = records(second)
        second.kill()
        heir = second.twin("heir")
        heir.start_again()
        assert run.code(900) == 0, run.output()
        wait_until(heir.joined, "the copy is online")
        assert_turned_away(second.twin("back-again").start())

        rounds = rounds_of(out)
        assert [record["round"] for record in rounds] == [1, 2, 3]
        assert present(rounds[-1]) == [0, 1], [record["failed"] for record in rounds]
        for node in (first, second):
            assert_noised_once(node)
        assert records(heir) == before  # the release of round 1 served the copy, nothing was added


def test_a_key_is_a_client_whoever_claims_first(tmp_path: Path) -> None:
    """The holder of client 2's key says that it is client 1. It is there before client 1, and in a
    run that stops at failures; that run, and client 1, go on, and the log names it."""
    root = tmp_path / "federation"
    with real_federation(root) as federation:
        strict: dict[str, Any] = {"on_failure": "raise", "min_clients": 2}
        config, parts = split(root / "data", 3, 2, aggregation=strict)
        first, second = (federation.node(f"node-{k}", k, parts[k]) for k in (0, 1))
        liar = federation.node("node-2", 2, parts[1], **{"partition-id": 1})
        federation.start()
        liar.start()
        wait_until(liar.joined, "the liar is online")
        out = root / "run"
        run = federation.run(config, out)
        first.start()
        wait_until(first.joined, "client 0 is online", unless=run.ended)
        second.start()
        assert run.code(900) == 0, run.output()
        rounds = rounds_of(out)
        assert [present(record) for record in rounds] == [[0, 1]] * 2
        assert [record["failed"] for record in rounds] == [[], []]
        (node,) = [n for n in federation.status()["nodes"] if n["name"] == "node-2"]
        line = f"node {node['node_id']} is client 2 by its key and says that it is 1"
        assert run.output().count(f"{line}; it is left out") == 1
        for each in (first, second):
            assert_noised_once(each)
        assert not (liar.store.exists() and ReleaseStore(liar.store).ledger().releases())
