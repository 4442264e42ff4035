"""`fedpdm federation` without Flower's processes: what is refused, and how it is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedpdm.config import ConfigError
from fedpdm.deployment.registered import registered_clients
from fedpdm.engines import flowercli
from fedpdm.engines.causes import last_error
from fedpdm.engines.deployed.control import Node
from fedpdm.engines.deployed.coordinator import LogTail, node_lines, run_progress
from fedpdm.engines.deployed.preflight import check_deployed_run
from fedpdm.engines.deployed.status import describe, status_of
from fedpdm.engines.flowercli import RunFailed
from fedpdm.engines.superlink import SuperLink
from fedpdm.engines.superlink_settings import SuperLinkSettings, answers, split_address
from fedpdm.reporting.run_files import RunLog
from fedpdm.setup.flower_config import FEDERATION_VARIABLE
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import call, without_advice
from tests.support.federations import small_config
from tests.support.real_nodes import free_port, make_certificates, make_node_key

DEPLOYED = small_config(run={"simulation": False}, data={"max_images": None})


def start(state: Path, certificates: Path, *more: Any) -> int:
    return call(
        "federation", "start", "--state", state, "--certificates", certificates,
        "--fleet", f"127.0.0.1:{free_port()}", "--control", f"127.0.0.1:{free_port()}", *more,
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line on standard error of a command that ended with 2."""
    assert code == 2
    error = without_advice(capsys.readouterr().err)
    assert error.count("\n") == 1, error
    assert error.startswith("fedpdm: ")
    return error


# --- Before anything is started -------------------------------------------------------------


def test_missing_certificates_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, start(tmp_path / "state", tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere' / 'ca.crt'}: is not a file that can be read" in line


def test_a_key_of_another_certificate_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_certificates(tmp_path / "certificates")
    other = make_certificates(tmp_path / "other")
    (folder / "server.key").write_bytes((other / "server.key").read_bytes())
    line = refused(capsys, start(tmp_path / "state", folder))
    assert f"{folder / 'server.pem'}: does not go with {folder / 'server.key'}" in line


@pytest.mark.parametrize("hours", [(-48, -24), (24, 48)])
def test_certificates_of_another_time_are_refused(
    tmp_path: Path, hours: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_certificates(tmp_path / "certificates", hours=hours)
    line = refused(capsys, start(tmp_path / "state", folder))
    assert f"{folder / 'ca.crt'}: is valid from " in line
    assert "this clock says" in line


def settings_of(folder: Path, **changes: Any) -> SuperLinkSettings:
    values = {
        "fleet": "127.0.0.1:9092",
        "control": "127.0.0.1:8000",
        "ca": str(folder / "ca.crt"),
        "certificate": str(folder / "server.pem"),
        "key": str(folder / "server.key"),
    }
    return SuperLinkSettings(**{**values, **changes})


def test_a_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_certificates(tmp_path / "certificates")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = start(tmp_path / "state", folder, "--fleet", f"127.0.0.1:{port}")
    line = refused(capsys, code)
    assert f"--fleet: 127.0.0.1:{port}: Address already in use" in line
    assert not (tmp_path / "state" / "superlink.pid").exists()


@pytest.mark.parametrize("address", ["", "9092", "host:", "host:0", "host:65536", "host:http"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--fleet: must be HOST:PORT with a port in \[1, 65535\]"
    ):
        split_address(address, what="--fleet")


def test_addresses() -> None:
    assert split_address("0.0.0.0:9092", what="x") == ("0.0.0.0", 9092)
    assert split_address("[::1]:1", what="x") == ("::1", 1)


def test_a_server_certificate_for_another_name_is_told(tmp_path: Path) -> None:
    """`answers` against a TLS server of Python's own."""
    import ssl
    import threading

    folder = make_certificates(tmp_path / "certificates", ["127.0.0.9"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def serve() -> None:
            for _ in range(2):
                caller, _peer = listener.accept()
                try:
                    server.wrap_socket(caller, server_side=True).close()
                except OSError:
                    caller.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match="server certificate cannot be used at"):
            answers(address, client, name="127.0.0.1")
        assert answers(address, client, name=None)
        thread.join()
    assert not answers(address, client, name=None)  # nobody listens any more


def test_keys_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    superlink = SuperLink(tmp_path)
    monkeypatch.setattr(superlink, "require_running", lambda: None)
    monkeypatch.setattr(superlink, "ask", lambda *_: pytest.fail("Flower was asked"))
    key = make_node_key(tmp_path / "keys" / "node-0")
    for path, text in (
        (key, key.read_text()),  # the private half
        (tmp_path / "node-1.pub", "ssh-rsa AAAAB3NzaC1yc2E= me"),
        (tmp_path / "node-2.pub", ""),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="must be an OpenSSH public key on a NIST curve"):
            superlink.register(path)


def test_a_keys_name_says_which_client_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    superlink = stopped_federation(tmp_path / "state")
    monkeypatch.setattr(superlink, "require_running", lambda: None)
    asked: list[str] = []

    def ask(*arguments: str) -> dict[str, Any]:
        asked.append(arguments[-1])
        return {"node-id": 100 + len(asked)}

    monkeypatch.setattr(superlink, "ask", ask)
    for name in ("clinic", "node-", "node-x", "node-1\x1b", "node-1 b", "1", "node-1234567"):
        key = make_node_key(tmp_path / "keys" / "key").with_suffix(".pub")
        key = key.rename(key.with_name(f"{name}.pub"))
        with pytest.raises(ConfigError, match=r"must be named node-N\.pub or node-N-WORDS\.pub"):
            superlink.register(key)
    assert asked == []
    for name in ("node-0", "node-12", "node-0-2027", "node-3.new"):
        superlink.register(make_node_key(tmp_path / "good" / name).with_suffix(".pub"))
    environment = {FEDERATION_VARIABLE: str(superlink.state)}
    assert registered_clients(environment) == {"101": 0, "102": 12, "103": 0, "104": 3}
    assert registered_clients({}) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"nodes": []}', '{"runs": {}}', "{"])
def test_registered_keys_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "federation.json").write_text(text)
    with pytest.raises(ConfigError, match=r"federation\.json: cannot be read: "):
        registered_clients({FEDERATION_VARIABLE: str(tmp_path)})


# --- Without a running SuperLink ------------------------------------------------------------


@pytest.mark.parametrize("action", ["run", "status", "stop"])
def test_a_directory_without_a_federation(
    tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [experiment_in(tmp_path)] if action == "run" else []
    line = refused(capsys, call("federation", action, *more, "--state", tmp_path / "none"))
    assert "holds no federation (federation.json is missing); start it first" in line
    assert not (tmp_path / "none").exists()


def experiment_in(folder: Path) -> Path:
    path = folder / "digits.yaml"
    path.write_text("name: digits\n")
    return path


def stopped_federation(state: Path) -> SuperLink:
    """A state directory as a SuperLink leaves it that was killed."""
    superlink = SuperLink(state)
    state.mkdir()
    superlink._save(settings_of(state, nodes={"7": "clinic-a"}))
    return superlink


def test_a_run_needs_the_superlink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_federation(tmp_path / "state")
    options = ("--state", tmp_path / "state", "--out", tmp_path / "out")
    line = refused(capsys, call("federation", "run", experiment_in(tmp_path), *options))
    assert "the SuperLink is not running; fedpdm federation start --state" in line
    assert not (tmp_path / "out").exists()


def test_a_process_id_that_was_given_away_is_not_the_superlink(tmp_path: Path) -> None:
    superlink = stopped_federation(tmp_path / "state")
    me = psutil.Process()
    record = {"pid": os.getpid(), "started": me.create_time()}
    (superlink.state / "superlink.pid").write_text(json.dumps(record))
    assert superlink.process() == me
    record["started"] -= 3600
    (superlink.state / "superlink.pid").write_text(json.dumps(record))
    assert superlink.process() is None


def finished_rounds(out: Path, rounds: int, **last: Any) -> None:
    """A run directory after some rounds."""
    run = RunDirectory(out)
    run.open(DEPLOYED, resume=False)
    records = [
        {"coarse_loss": 1.0 / k, "bytes_down": 2_000_000, "bytes_up": 1_000_000, "seconds": 30.0}
        for k in range(1, rounds + 1)
    ]
    if records:
        records[-1] |= last
    run.write_json("metrics.json", {"rounds": records})


def test_status_of_a_killed_coordinator_tells_the_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink = stopped_federation(tmp_path / "state")
    finished_rounds(tmp_path / "out", 1, failed=["client 2: gone"])
    superlink.note_run("41", tmp_path / "out")
    assert call("federation", "status", "--state", superlink.state, "--json") == 1
    status = json.loads(capsys.readouterr().out)
    assert status["running"] is False
    assert status["nodes"] == []
    (run,) = status["runs"]
    assert (run["run_id"], run["status"]) == ("41", "unknown")
    assert run["progress"] == {
        "rounds_done": 1,
        "rounds": 2,
        "coarse_loss": 1.0,
        "coarse_known": None,
        "heldout_coarse_loss": None,
        "heldout_coarse_known": None,
        "bytes_down": 2_000_000,
        "bytes_up": 1_000_000,
        "seconds": 30.0,
        "failed": ["client 2: gone"],
        "finished": False,
    }
    text = describe(status)
    assert "SuperLink not running" in text
    assert "round 1 of 2, coarse loss 1.0000, 2.0 MB down, 1.0 MB up, about 30 s left" in text
    assert "failed: client 2: gone" in text
    superlink.note_run("42", tmp_path / "removed")
    assert status_of(superlink)["runs"][1]["progress"] is None


# --- Following ------------------------------------------------------------------------------


def test_progress_before_the_first_round(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "out").open(DEPLOYED, resume=False)
    progress = run_progress(tmp_path / "out")
    assert (progress.rounds_done, progress.rounds, progress.coarse_loss) == (0, 2, None)
    with pytest.raises(ConfigError, match="is not a run directory"):
        run_progress(tmp_path / "none")


def test_the_tail_shows_new_lines_once_and_whole(tmp_path: Path) -> None:
    log = RunLog(RunDirectory(tmp_path))
    log.say("of an earlier attempt")
    tail = LogTail(tmp_path)
    assert tail.lines() == []
    log.say("round 1/2  coarse loss 1.0\n\nsecond line")
    assert tail.lines() == ["round 1/2  coarse loss 1.0", "", "second line"]
    with open(tmp_path / "log.txt", "a") as file:
        file.write("2026-11-25 00:00:00  hal")
        file.flush()
        assert tail.lines() == []
        file.write("f\n")
    assert tail.lines() == ["half"]
    assert LogTail(tmp_path / "none").lines() == []


def node(name: str, status: str) -> Node:
    return Node(node_id=f"id of {name}", name=name, status=status, online_seconds=1.0)


def test_nodes_that_come_and_go() -> None:
    away = [node("a", "online"), node("b", "registered")]
    assert node_lines([], away) == ["node a is online", "nodes: 1 of 2 online"]
    assert node_lines(away, away) == []
    swapped = [node("a", "offline"), node("b", "online")]
    assert node_lines(away, swapped) == [
        "node a is offline",
        "node b is online",
        "nodes: 1 of 2 online",
    ]


HOSTILE = "ok\x1b[2K\r\u202e\u2028\u200b"


def test_nothing_that_is_shown_draws_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Flower says of nodes and runs, what a run's files hold, and what comes as a log."""
    superlink = stopped_federation(tmp_path / "state")
    finished_rounds(tmp_path / "out", 1, failed=[HOSTILE + "\nround 2"])
    superlink.note_run(HOSTILE, tmp_path / "out")
    assert call("federation", "status", "--state", superlink.state) == 1
    shown = [capsys.readouterr().out, node_lines([], [node(HOSTILE, "online")])[0]]
    with open(tmp_path / "log.txt", "w") as file:
        tail = LogTail(tmp_path)
        file.write(f"{HOSTILE}\n")
    shown += tail.lines()
    RunLog(RunDirectory(tmp_path)).say(HOSTILE)
    shown += [capsys.readouterr().out, (tmp_path / "log.txt").read_text().splitlines()[-1]]
    said = subprocess.CompletedProcess([], 1, stdout=HOSTILE, stderr="")
    monkeypatch.setattr(superlink, "call", lambda *_, **__: said)
    with pytest.raises(RunFailed) as caught:
        superlink.ask("list")
    shown.append(str(caught.value))
    (tmp_path / "flower.log").write_text(f"Error: {HOSTILE}\n")
    shown += [last_error(tmp_path / "flower.log"), flowercli.shown_line(HOSTILE)]
    shown += flowercli._shown(f"ERROR {HOSTILE}")
    assert len(shown) == 9
    for text in shown:
        assert r"ok\x1b[2K\x0d\u202e\u2028\u200b" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert shown[0].count("\n") == 5


# --- Before a run is submitted --------------------------------------------------------------


def test_a_deployed_run_is_checked_without_clients_images(tmp_path: Path) -> None:
    lines = check_deployed_run(DEPLOYED, tmp_path / "out", resume=False)
    assert lines[0] == "small: digits (3x8x8, 10 classes), 3 clients, 3 needed for a round"
    assert "epsilon 9.956 at delta 1e-05" in lines[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"run": {"simulation": True}}, "run.simulation: must be false for a deployed federation"),
        ({"aggregation": {"min_clients": 4}}, "aggregation.min_clients: must be at most"),
        ({"sampling": {"scheduler": "nothing"}}, "sampling.scheduler"),
        ({"data": {"name": "npz", "root": "nowhere.npz"}}, "data.root: npz has no file"),
    ],
)
def test_what_would_stop_a_deployed_run_is_refused(
    tmp_path: Path, sections: dict[str, Any], line: str
) -> None:
    config = small_config(**{"run": {"simulation": False}, **sections})
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=line):
        check_deployed_run(config, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()
