"""Faults of a deployed federation, with real processes, gRPC and TLS.

`make deploy-test` (tests/deployment/deploy_run.py) kills a participant and the coordinator; here
participants are slow, silent, cut off, full, wrong, or two of a kind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedpdm.config import RunConfig
from fedpdm.privacy.releases import ReleaseStore
from tests.support.federations import small_config
from tests.support.real_nodes import (
    Node,
    deployed,
    real_federation,
    share_out,
    wait_until,
)
from tests.support.wires import Cable

pytestmark = [pytest.mark.flower, pytest.mark.slow]

SKIP: dict[str, Any] = {"on_failure": "skip", "min_clients": 1}


def split(
    folder: Path, clients: int, rounds: int, **sections: dict[str, Any]
) -> tuple[RunConfig, list[Path]]:
    """A config and data for this many nodes; evaluated after the last round alone."""
    simulated = small_config(
        run={"rounds": rounds},
        data={"max_images": 60 * clients},
        partition={"num_clients": clients, "kind": "iid"} | NO_MAJORITY,
        evaluation={"image_metrics": False, "every": rounds},
    )
    return deployed(simulated, folder, **sections), share_out(simulated, folder)


NO_MAJORITY = {"majority_classes": None, "majority_ratio": None}


def rounds_of(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.json"
    return list(json.loads(path.read_text())["rounds"]) if path.exists() else []


def present(record: dict[str, Any]) -> list[int]:
    return [metrics["client_id"] for metrics in record["clients"]]


def assert_noised_once(node: Node) -> None:
    store = ReleaseStore(node.store)
    assert store.spent(delta=1e-5).releases_per_image == 1
    assert len(store.ledger().releases()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where this machine lets us make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root")
    if (made := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"mount: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_run_goes_on_without_participants_that_fail(tmp_path: Path, small_disk: Path) -> None:
    """Of five nodes one has a full disk, one the wrong data, one other code, two are one client, of
    which the one whose key was registered last takes part."""
    root = tmp_path / "federation"
    with real_federation(root) as federation:
        config, parts = split(root / "data", 4, 2, aggregation=SKIP)
        wrong = small_config(data={"name": "digits", "coloring": "none", "max_images": 60})
        grey = share_out(wrong, root / "grey")[0]
        good = federation.node("good", 0, parts[0])
        full = federation.node("full", 1, parts[1], **{"store-dir": str(small_disk / "store")})
        bad = [
            federation.node("wrong-data", 2, grey),
            federation.node("other-code", 3, parts[3], **{"installed-code": "0" * 64}),
            federation.node("an-older-key", 0, parts[0]),
        ]
        federation.start()
        nodes = [good, full, *bad]
        for node in nodes:
            node.start()
        wait_until(lambda: all(node.joined() for node in nodes), "all nodes are online")
        run = federation.run(config, root / "run")
        assert run.code(900) == 0, run.output()
        output = run.output()
        rounds = rounds_of(root / "run")
        assert [present(record) for record in rounds] == [[0], [0]]
        assert_noised_once(good)
        for line in (
            "client 1: failed; client 1 shows the details to its owner alone",
            "code: its digest is not one that this node allows (client 3)",
            "is client 0 by an older key than another node's; it is left out",
        ):
            assert line in output
        assert "client 2: " in output
        # The owner of the full disk is told. The release fitted on it, so it was made, and reused
        # in round 2; no half-written round counts.
        assert "cannot be written: no space left on the device" in full.output()
        assert_noised_once(full)
        assert not list(full.store.glob("runs/*/rounds/[0-9]*"))
        assert not any("Traceback" in line for line in output.splitlines())


@pytest.mark.faults
def test_slow_silent_and_cut_off_participants_come_back(tmp_path: Path) -> None:
    """Round 1: participant 2 stops answering. Round 2: the network of participant 1 is cut and
    healed; it was slow all the time. Round 3: the coordinator's operator presses Ctrl-C, and
    resumes. Who was away takes part again, and nobody noises an image twice."""
    root = tmp_path / "federation"
    with real_federation(root) as federation, Cable(federation.fleet_port, seconds=0.05) as cable:
        # Long enough for honest work on a loaded machine: a silent node costs all of it.
        config, parts = split(root / "data", 3, 4, aggregation={**SKIP, "round_timeout": 150.0})
        nodes = [federation.node(f"node-{k}", k, part) for k, part in enumerate(parts)]
        nodes[1].address = f"127.0.0.1:{cable.port}"
        federation.start()
        for node in nodes:
            node.start()
        wait_until(lambda: all(node.joined() for node in nodes), "all nodes are online")
        out = root / "run"
        run = federation.run(config, out)

        def in_round(done: int, node: Node) -> bool:
            return len(rounds_of(out)) == done and bool(node.working("train"))

        def await_round(done: int, node: Node) -> None:
            wait_until(lambda: in_round(done, node), f"round {done + 1} goes on", unless=run.ended)

        stopped: list[psutil.Process] = []

        def over_without_2() -> bool:
            """Whether round 1 is over; until then participant 2 is kept from working."""
            for process in nodes[2].working("train"):
                if process not in stopped:
                    process.send_signal(signal.SIGSTOP)
                    stopped.append(process)
            return len(rounds_of(out)) == 1

        wait_until(over_without_2, "round 1 is over", unless=run.ended)
        assert present(rounds_of(out)[0]) == [0, 1]
        assert "client 2" in " ".join(rounds_of(out)[0]["failed"])
        for process in stopped:
            process.send_signal(signal.SIGCONT)

        await_round(1, nodes[1])
        cable.cut()
        assert not nodes[1].process_ended(10.0)
        cable.heal()
        await_round(2, nodes[0])
        run.process.send_signal(signal.SIGINT)
        assert run.code() == 130, run.output()
        assert "interrupted; nothing is lost" in run.output()
        before = rounds_of(out)

        again = federation.run(None, out)
        assert again.code(900) == 0, again.output()
        assert "resumed after round " in again.output()
        rounds = rounds_of(out)
        assert rounds[: len(before)] == before
        assert [record["round"] for record in rounds] == [1, 2, 3, 4]
        assert present(rounds[-1]) == [0, 1, 2], [record["failed"] for record in rounds]
        for node in nodes:
            assert_noised_once(node)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Three network namespaces on one bridge, 10.39.7.1 to 3: hosts of their own, as root."""
    names = [f"fedpdm{os.getpid()}n{k}" for k in (1, 2, 3)]
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root, ip and tc")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            first = names[0]
            ip("-n", first, "link", "add", "br0", "type", "bridge")
            ip("-n", first, "addr", "add", "10.39.7.1/24", "dev", "br0")
            ip("-n", first, "link", "set", "br0", "up")
            for k, name in enumerate(names[1:], start=2):
                ip("-n", first, "link", "add", f"v{k}", "type", "veth",
                   "peer", "name", "eth0", "netns", name)  # fmt: skip
                ip("-n", first, "link", "set", f"v{k}", "master", "br0", "up")
                ip("-n", name, "addr", "add", f"10.39.7.{k}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.faults
@pytest.mark.parametrize("netem", [False, True])
def test_hosts_with_latency_loss_and_a_cable_that_is_pulled(
    tmp_path: Path, hosts: list[str], netem: bool
) -> None:
    """In round 1 a host's link is down for 20 seconds; with `netem`, 80 ms and 2 % loss besides."""
    for host in hosts[1:] if netem else ():
        made = subprocess.run(
            ["ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "eth0", "root", "netem",
             "delay", "80ms", "20ms", "loss", "2%"],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"tc netem: {made.stderr.strip()}")
    root = tmp_path / "federation"
    prefixes = {
        name: ["ip", "netns", "exec", host]
        for name, host in zip(("coordinator", "node-0", "node-1"), hosts, strict=True)
    }
    with real_federation(root, host="10.39.7.1", prefixes=prefixes) as federation:
        config, parts = split(root / "data", 2, 2, aggregation={**SKIP, "round_timeout": 300.0})
        nodes = [federation.node(f"node-{k}", k, part) for k, part in enumerate(parts)]
        federation.start()
        for node in nodes:
            node.start()
        wait_until(lambda: all(node.joined() for node in nodes), "both nodes are online")
        run = federation.run(config, root / "run")
        wait_until(lambda: nodes[1].working("train"), "round 1 goes on", unless=run.ended)
        ip("-n", hosts[2], "link", "set", "eth0", "down")
        assert not nodes[1].process_ended(20.0)
        ip("-n", hosts[2], "link", "set", "eth0", "up")
        assert run.code(900) == 0, run.output()
        rounds = rounds_of(root / "run")
        assert [record["round"] for record in rounds] == [1, 2]
        assert present(rounds[-1]) == [0, 1], [record["failed"] for record in rounds]
        for node in nodes:
            assert_noised_once(node)
