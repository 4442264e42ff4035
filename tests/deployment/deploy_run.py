"""`make deploy-test`: a federation of real processes that loses a participant and its coordinator.

One coordinator and three participants on loopback, each with a directory of its own: gRPC with TLS,
registered keys, MNIST at 16x16 (or scikit-learn's digits where `FEDPDM_DATA` has none). Participant
1 is killed in the middle of a round and started again, then the coordinator is killed in the middle
of a round, started again, and the run resumed. All that is typed is a `fedpdm` command, and is
shown with what it prints; what must hold at the end is checked. Exit code 0 if it does.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedpdm.config import ConfigError, RunConfig, config_from_mapping, config_to_yaml
from fedpdm.data.loading import load_split
from fedpdm.engines.deployed.coordinator import run_progress
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.reporting.shared_words import shared_words
from tests.support.real_nodes import (
    RealFederation,
    RunningCommand,
    deployed,
    family,
    kill_all,
    real_federation,
    share_out,
    wait_until,
)

CLIENTS, ROUNDS = 3, 4
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": ROUNDS, "seed": 0},
    "partition": {"num_clients": CLIENTS, "kind": "iid"},
    "privacy": {"epsilon": 10.0, "clip_norm": 8.0, "shift": -1.0},
    "coarse": {"preset": "micro", "steps_per_round": 20, "batch_size": 32, "warmup_steps": 10},
    "fine": {"preset": "micro", "steps_per_round": 20, "batch_size": 32, "warmup_steps": 10},
    "aggregation": {"on_failure": "skip", "min_clients": 2, "round_timeout": 1800.0},
    "evaluation": {"every": ROUNDS, "image_metrics": False},
}


def simulated_config() -> RunConfig:
    """Whose split of MNIST, or of digits, the participants are given."""
    data: dict[str, Any] = {"name": "mnist", "max_images": 900, "resolution": 16}
    config = config_from_mapping({"name": "hospitals", "data": data, **SECTIONS})
    try:
        load_split(config, "test")
    except (ConfigError, FileNotFoundError, ValueError):
        data = {"name": "digits", "max_images": 900}
        config = config_from_mapping({"name": "hospitals", "data": data, **SECTIONS})
    return config


class Session:
    """Types commands, and shows them with what they print, places written as `~`."""

    def __init__(self, federation: RealFederation) -> None:
        self.federation = federation
        self.begun = time.monotonic()
        self.shown: dict[Path, int] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:4.0f} s] {text}", flush=True)

    def type(self, *arguments: Any, background: bool = False) -> RunningCommand:
        line = shlex.join(map(str, arguments)).replace(str(self.federation.root), "~")
        print(f"\n$ fedpdm {line}{' &' if background else ''}", flush=True)
        return self.federation.fedpdm(*arguments)

    def show(self, command: RunningCommand) -> None:
        """What the command has printed since this was last asked."""
        text = command.output()
        new = text[self.shown.get(command.path, 0) :]
        self.shown[command.path] = len(text)
        print(new.replace(str(self.federation.root), "~"), end="", flush=True)

    def done(self, *arguments: Any, code: int = 0) -> RunningCommand:
        command = self.type(*arguments)
        return self.ended(command, code)

    def ended(self, command: RunningCommand, code: int = 0) -> RunningCommand:
        got = command.code(1800.0)
        self.show(command)
        if got:
            print(f"(exit code {got})", flush=True)
        assert got == code, f"exit code {got}, expected {code}"
        return command


def prepare(session: Session, root: Path) -> tuple[Path, list[Path]]:
    """Certificates, data and the experiment; its path, and the participants' data."""
    simulated = simulated_config()
    parts = share_out(simulated, root / "data")
    session.say(f"{simulated.data.name}, shared out over {CLIENTS} participants")
    config = deployed(simulated, root / "data")
    experiment = root / "hospitals.yaml"
    experiment.write_text(config_to_yaml(config), encoding="utf-8")
    session.done("certificates", "ca", "--out", root / "ca")
    session.done(
        "certificates", "server", "--ca", root / "ca", "--out", root / "coordinator/certificates",
        "--name", "127.0.0.1",
    )  # fmt: skip
    for client in range(CLIENTS):
        session.done(
            "certificates", "node", "--ca", root / "ca", "--out", root / "keys",
            "--client", client,
        )  # fmt: skip
    return experiment, parts


def node_arguments(federation: RealFederation, client: int, data: Path) -> list[Any]:
    root = federation.root
    return [
        "--coordinator", f"{federation.host}:{federation.fleet_port}",
        "--certificate", root / "keys" / f"node-{client}.crt",
        "--data", data,
        "--store", root / f"store-{client}",
    ]  # fmt: skip


def client_app(node: RunningCommand) -> psutil.Process | None:
    """The process in which this participant works on a message, if it does."""
    for process in family(node.process.pid):
        try:
            if "flwr-clientapp" in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def in_round(out: Path, done: int, node: RunningCommand) -> Callable[[], bool]:
    """Whether `done` rounds are finished, and the participant works on the next."""
    return lambda: (
        (out / "metrics.json").exists()
        and run_progress(out).rounds_done == done
        and client_app(node) is not None
    )


def play(session: Session, root: Path) -> None:
    """The whole story; `AssertionError` where something is not as it must be."""
    federation, out = session.federation, root / "run"
    experiment, parts = prepare(session, root)
    session.done(
        "federation", "start", "--state", federation.state, "--node-keys", federation.keys,
        "--fleet", f"{federation.host}:{federation.fleet_port}",
        "--control", f"{federation.host}:{federation.control_port}",
    )  # fmt: skip
    session.done("node", "invite", experiment, "--out", federation.keys / "invitation.json")
    nodes: list[RunningCommand] = []
    for client, data in enumerate(parts):
        arguments = node_arguments(federation, client, data)
        check = session.type("node", "check", *arguments, "--accept")
        assert check.code(600.0) == 0, check.output()
        if client == 0:
            session.show(check)
        else:
            print("(the same for this participant's data)")
        nodes.append(session.type("node", "start", *arguments, background=True))

    options = ["--state", federation.state]
    run = session.type("federation", "run", experiment, *options, "--out", out, background=True)
    wait_until(in_round(out, 1, nodes[1]), "round 2 goes on", seconds=1200, unless=run.ended)
    session.show(run)
    session.say("SIGKILL to participant 1 and all its processes, in round 2")
    kill_all(family(nodes[1].process.pid))
    nodes[1] = session.type(
        "node", "start", *node_arguments(federation, 1, parts[1]), background=True
    )
    wait_until(in_round(out, 2, nodes[0]), "round 3 goes on", seconds=1200, unless=run.ended)
    session.show(run)
    session.say("SIGKILL to the coordinator's SuperLink and all its processes, in round 3")
    kill_all(family(federation.superlink_pid()))
    session.ended(run, code=1)
    session.done("federation", "status", *options, code=1)
    session.done("federation", "start", *options)
    run = session.type("federation", "run", "--resume", *options, "--out", out)
    session.ended(run)
    session.done("federation", "status", *options)
    check_all(session, out)
    session.done("ledger", root / "store-1")
    session.done("federation", "stop", *options)


def check_all(session: Session, out: Path) -> None:
    """Every round is there, nothing was noised twice, and who was killed is back."""
    from fedpdm.storage.run_directory import RunDirectory

    history = RunDirectory(out).read_json("metrics.json")
    rounds = history["rounds"]
    assert [record["round"] for record in rounds] == list(range(1, ROUNDS + 1))
    present = [[metrics["client_id"] for metrics in record["clients"]] for record in rounds]
    assert present[0] == [0, 1, 2], present
    assert present[1] == [0, 2], present
    assert len(rounds[1]["failed"]) == 1, rounds[1]["failed"]
    assert "client 1" in rounds[1]["failed"][0]
    assert 1 in present[-1], f"participant 1 did not come back: {present}"
    for client in range(CLIENTS):
        store = ReleaseStore(out.parent / f"store-{client}")
        spent = store.spent(delta=1e-5)
        assert spent.releases_per_image == 1, f"client {client}: {spent}"
        assert not any(record.seeded for record in store.ledger().releases())
    first, last = rounds[0]["coarse_loss"], rounds[-1]["coarse_loss"]
    # Against noise of unit size: 1 is what little training gives, more says that it went wrong.
    assert 0.0 < last < 1.1, f"the coarse loss is {last}, after {first} in round 1"
    session.say(
        f"checked: rounds 1 to {ROUNDS}; participants per round {present}; every image noised "
        f"once; coarse loss {first:.4f} to {last:.4f}; {', '.join(shared_words(rounds[-1]))}"
    )


def _leave(*_: object) -> None:
    """End as after Ctrl-C, with all processes."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the directories for a look")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, _leave)
    root = Path(tempfile.mkdtemp(prefix="fedpdm-deploy-"))
    begun = time.monotonic()
    try:
        with real_federation(root) as federation:
            play(Session(federation), root)
    except AssertionError as error:
        print(f"deploy-test FAILED: {error} (left in {root})", file=sys.stderr)
        return 1
    if not options.keep:
        shutil.rmtree(root, ignore_errors=True)
    print(f"deploy-test passed in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
