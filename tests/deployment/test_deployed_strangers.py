"""Who is turned away at the coordinator's door: real SuperNodes, a real SuperLink.

What is wrong with each of them alone keeps it out: the member that is let in beside them has the
same data, address and options. (A key that was never registered is in `test_deployed`.)
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from tests.deployment.test_deployed import SIMULATED
from tests.support.command_line import without_advice
from tests.support.real_nodes import Node, make_certificates, real_federation, share_out, wait_until
from tests.support.wires import Cable

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.faults]


def assert_kept_out(node: Node, seconds: float = 180.0) -> None:
    """It ends by itself, was never let in, and has done nothing."""
    assert node.process_ended(seconds), node.output()
    assert node.process is not None
    assert node.process.returncode != 0
    assert not node.joined()
    assert not node.store.exists()


def first_record(data: bytes) -> bytes:
    """The first TLS record of these bytes (RFC 8446, section 5.1)."""
    return data[: 5 + int.from_bytes(data[3:5], "big")]


def replay(port: int, recorded: bytes) -> tuple[bytes, bytes]:
    """Send a recorded connection again: what the server says to its ClientHello, and to the rest.

    `TimeoutError` if the server does not end the connection within ten seconds.
    """
    hello = first_record(recorded)
    with socket.create_connection(("127.0.0.1", port), 30) as end:
        end.settimeout(10.0)
        end.sendall(hello)
        greeting = end.recv(1 << 16)
        rest = bytearray()
        with contextlib.suppress(ConnectionError):  # it may not wait for all of it
            end.sendall(recorded[len(hello) :])
            while piece := end.recv(1 << 16):
                rest += piece
    return greeting, bytes(rest)


def test_strangers_are_kept_out_and_replayed_traffic_does_nothing(tmp_path: Path) -> None:
    root = tmp_path / "federation"
    with real_federation(root) as federation:
        data = share_out(SIMULATED, root / "data")[0]
        member = federation.node("member", 0, data)
        removed = federation.node("removed", 1, data)
        federation.start()
        federation.done(
            "federation", "start", "--state", federation.state, "--remove-node", "node-1-removed"
        )
        other = make_certificates(tmp_path / "other")
        plain = member.twin("plain", **{"store-dir": str(root / "store-plain")})
        plain.leave_out = ("TLS",)
        keyless = federation.node("keyless", 1, data)
        keyless.leave_out = ("key",)
        deceived = member.twin("deceived", **{"store-dir": str(root / "store-deceived")})
        deceived.authority = other / "ca.crt"
        strangers = [removed, plain, keyless, deceived]
        for node in strangers:
            node.start()
        for node in strangers:
            assert_kept_out(node)
        with Cable(federation.fleet_port) as cable:
            member.address = f"127.0.0.1:{cable.port}"
            member.start()
            wait_until(member.joined, "the member is online")
            time.sleep(5.0)  # it asks for messages
            recorded = bytes(cable.sent)
            assert len(recorded) > 1000
            greeting, rest = replay(federation.fleet_port, recorded)
        assert greeting[0] == 0x16  # a ServerHello: new keys, which nothing that was recorded fits
        assert len(rest) < 100  # what is left of the handshake, and at most an alert
        status = federation.status()
        assert [(n["name"], n["status"]) for n in status["nodes"]] == [("node-0-member", "online")]


def test_a_certificate_that_expires_lets_nobody_in_any_more(tmp_path: Path) -> None:
    """The coordinator's certificate ends while its SuperLink runs: who is there stays, nobody is
    let in, and the SuperLink is not started with it again."""
    root = tmp_path / "federation"
    with real_federation(root) as federation:
        data = share_out(SIMULATED, root / "data")[0]
        seconds = 120.0
        made = time.monotonic()
        make_certificates(root / "certificates", hours=(-1, seconds / 3600))
        member, late = federation.node("member", 0, data), federation.node("late", 1, data)
        federation.start()
        member.start()
        wait_until(member.joined, "the member is online", seconds=seconds)
        time.sleep(max(0.0, made + seconds + 2.0 - time.monotonic()))
        assert_kept_out(late.start())
        assert "CERTIFICATE_VERIFY_FAILED" in late.output() or "expired" in late.output()
        assert not member.process_ended(1.0)
        federation.done("federation", "stop", "--state", federation.state)
        output = federation.done("federation", "start", "--state", federation.state, code=2)
        assert without_advice(output).count("\n") == 1
        assert "ca.crt: is valid from " in output
        assert "this clock says" in output
