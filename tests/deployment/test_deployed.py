"""A deployed federation of real processes: what its transport is, and that it does what the
simulation does. One run, looked at from all sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedpdm.config import RunConfig
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.noise import SystemNoise
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.client_store import read_tensors
from tests.support.command_line import call, without_advice
from tests.support.federations import small_config
from tests.support.real_nodes import (
    Node,
    RealFederation,
    deployed,
    key_name,
    make_certificates,
    make_node_key,
    real_federation,
    share_out,
    wait_until,
)
from tests.support.wires import Cable

pytestmark = [pytest.mark.flower, pytest.mark.slow]

SIMULATED = small_config(
    run={"rounds": 2, "seed": 3},
    data={"max_images": 120},
    partition={"num_clients": 2},
    evaluation={"every": 2, "image_metrics": False},
)


@dataclass
class Finished:
    """A run of two nodes that has ended; the federation is still there."""

    federation: RealFederation
    nodes: list[Node]
    config: RunConfig
    out: Path
    outside: Cable
    inside: Cable
    code: int
    output: str
    peers: set[int] = field(default_factory=set)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Node 0's traffic goes through two cables: one sees the network's bytes, one behind TLS."""
    root = tmp_path_factory.mktemp("deployed")
    with real_federation(root) as federation:
        certificates = make_certificates(root / "certificates")
        parts = share_out(SIMULATED, root / "data")
        config = deployed(SIMULATED, root / "data")
        nodes = [federation.node(f"clinic-{k}", k, part) for k, part in enumerate(parts)]
        federation.start()
        with (
            Cable(federation.fleet_port, certificates=certificates) as inside,
            Cable(inside.port) as outside,
        ):
            nodes[0].address = f"127.0.0.1:{outside.port}"
            for node in nodes:
                node.start()
            run = federation.run(config, root / "run")
            wait_until(
                lambda: (root / "run/metrics.json").exists(), "round 1 is over", unless=run.ended
            )
            peers = {
                c.raddr.port
                for process in nodes[1].family()
                for c in psutil.net_connections("tcp")
                if c.pid == process.pid and c.raddr and c.status == psutil.CONN_ESTABLISHED
            }
            code = run.code()
            yield Finished(
                federation, nodes, config, root / "run", outside, inside, code, run.output(), peers
            )


def test_the_run_ends_with_0_and_says_what_happened(finished: Finished) -> None:
    assert finished.code == 0, finished.output
    for line in ("nodes: 2 of 2 online", "round 1/2  shared model knows ", "round 2/2  shared mod"):
        assert line in finished.output
    assert "MB up" in finished.output
    assert "s left" in finished.output
    assert "locally differentially private" in " ".join(finished.output.split())
    assert "SIMULATION" not in finished.output


def test_nodes_speak_grpc_over_tls(finished: Finished) -> None:
    """Behind TLS there is HTTP/2 with gRPC's content type and Flower's Fleet service."""
    plain = bytes(finished.inside.sent)
    assert finished.inside.protocols == {"h2"}
    assert plain.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # RFC 9113, section 3.4
    for part in (b"application/grpc", b"/flwr.proto.Fleet/"):
        assert part in plain
    assert b"grpc-status" in finished.inside.received
    network = bytes(finished.outside.sent)
    assert len(network) > 4 * 42_000  # an update has 42,000 numbers of four bytes
    assert network[:2] == b"\x16\x03"  # a TLS handshake record (RFC 8446, section 5.1)
    for part in (b"PRI * HTTP/2.0", b"application/grpc", b"flwr.proto"):
        assert part not in network
    assert finished.federation.fleet_port in finished.peers  # node 1: no cable


def simulate(finished: Finished, out: Path, releases: Path | None) -> dict[str, torch.Tensor]:
    run_in_process(SIMULATED, out, resume=False, releases=releases)
    return read_tensors(out / "coarse.safetensors")[0]


def test_deployed_and_simulated_coarse_weights_are_the_same(
    finished: Finished, tmp_path: Path
) -> None:
    """Bit for bit, on the same releases. A deployed node's noise comes from the operating system,
    so that no seed repeats it; the simulation is handed what the nodes have released. With noise of
    its own it gets other weights."""
    for node in finished.nodes:
        target = tmp_path / "releases" / str(node.config["partition-id"])
        shutil.copytree(node.store / "releases", target / "releases")
        shutil.copy(node.store / "ledger.jsonl", target)
    ours = read_tensors(finished.out / "coarse.safetensors")[0]
    same = simulate(finished, tmp_path / "same", tmp_path / "releases")
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    other = simulate(finished, tmp_path / "other", None)
    assert not any(torch.equal(ours[name], other[name]) for name in ours if ours[name].ndim > 1)
    for metric in ("coarse_loss", "heldout_coarse_loss"):
        rounds = [
            json.loads((out / "metrics.json").read_text())["rounds"][-1][metric]
            for out in (finished.out, tmp_path / "same")
        ]
        assert rounds[0] == pytest.approx(rounds[1], rel=1e-6)


def test_every_image_was_noised_once_by_the_operating_system(finished: Finished) -> None:
    for node in finished.nodes:
        store = ReleaseStore(node.store)
        assert store.spent(delta=1e-5).releases_per_image == 1
        (record,) = store.ledger().releases()
        assert (record.seeded, record.noise_source) == (False, SystemNoise.description)
    assert not (finished.out / "clients").exists()  # the coordinator holds nothing of theirs


def test_the_coordinator_keeps_the_marks_of_all_ledgers(finished: Finished) -> None:
    """In its state directory: the next run's server finds them there."""
    seen = json.loads((finished.federation.state / "ledgers.json").read_text())
    marks = {
        str(node.config["partition-id"]): ReleaseStore(node.store).ledger().marks
        for node in finished.nodes
    }
    assert seen == marks
    assert all(len(each) == 2 * 16 for each in seen.values())  # opened, released


def test_status_says_nodes_rounds_bytes_and_losses(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("federation", "status", "--state", finished.federation.state, "--json") == 0
    status: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status["running"]
    assert status["pid"] == finished.federation.superlink_pid()
    assert [(node["name"], node["status"]) for node in status["nodes"]] == [
        (key_name("clinic-0", 0), "online"),
        (key_name("clinic-1", 1), "online"),
    ]
    (run,) = status["runs"]
    assert (run["status"], run["out"]) == ("finished:completed", str(finished.out))
    progress = run["progress"]
    assert (progress["rounds_done"], progress["rounds"], progress["finished"]) == (2, 2, True)
    rounds = json.loads((finished.out / "metrics.json").read_text())["rounds"]
    assert progress["bytes_up"] == sum(record["bytes_up"] for record in rounds) > 2 * 2 * 4 * 42_000
    assert progress["coarse_loss"] == rounds[-1]["coarse_loss"]
    capsys.readouterr()
    assert call("federation", "status", "--state", finished.federation.state) == 0
    text = capsys.readouterr().out
    assert "nodes: 2 of 2 online" in text
    assert "round 2 of 2, shared model knows" in text


def test_bad_input_ends_with_2_and_one_line(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = finished.federation
    monkeypatch.chdir(federation.root)
    state = ("--state", federation.state)
    experiment = federation.root / "run.yaml"
    for arguments, line in (
        (("start", *state, "--fleet", "127.0.0.1:1"), "the SuperLink runs already"),
        (("run", experiment, *state, "--out", finished.out), "this run has finished"),
        (("run", "--resume", *state, "--out", finished.out), "this run has finished"),
        (("run", experiment, *state, "--out", "x", "--set", "run.rounds=0"), "run.rounds: must be"),
        (("status", "--state", federation.root / "none"), "federation.json is missing"),
    ):
        capsys.readouterr()
        assert call("federation", *arguments) == 2
        printed = capsys.readouterr()
        output = without_advice(printed.out + printed.err)
        assert line in output
        assert output.count("\n") == 1, output


def test_a_failed_run_ends_with_1_and_one_line(finished: Finished) -> None:
    """The same images at another epsilon would be a second release: the nodes refuse."""
    config = deployed(SIMULATED, finished.federation.root / "data", privacy={"epsilon": 3.0})
    before = [ReleaseStore(node.store).ledger().head for node in finished.nodes]
    run = finished.federation.run(config, finished.federation.root / "second")
    assert run.code() == 1, run.output()
    last = without_advice(run.output()).splitlines()[-1]
    assert last.startswith("fedpdm: the run ended as 'finished:failed': ")
    assert "client 0: failed; client 0 shows the details to its owner alone" in last
    assert last.endswith("--resume continues it")
    assert [ReleaseStore(node.store).ledger().head for node in finished.nodes] == before


def test_an_unregistered_key_is_not_let_in(finished: Finished, tmp_path: Path) -> None:
    stranger = finished.federation.node(
        "stranger", 0, Path(str(finished.nodes[0].config["data-dir"]))
    )
    stranger.key = make_node_key(tmp_path / "key")  # not the one that could be registered
    process = stranger.start().process
    assert process is not None
    assert process.wait(120) != 0
    assert not stranger.store.exists()
