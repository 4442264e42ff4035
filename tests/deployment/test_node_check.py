"""`fedpdm node check` and `start`, as a participant's operator sees them, against a TLS server."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from clients.local import open_local_client
from fedpdm.cli import main
from fedpdm.config import ConfigError, config_from_mapping, config_to_yaml
from fedpdm.deployment.certificates import make_authority, make_node
from fedpdm.deployment.code_digest import code_digest
from fedpdm.deployment.invitation import make_invitation, read_invitation
from fedpdm.deployment.node import checking, default_store
from fedpdm.engines.deployed import node as engine
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError
from tests.support.command_line import without_advice
from tests.support.deployments import policy_text
from tests.support.federations import SMALL, flat
from tests.support.participants import NAMES, Participant, quiet

EPSILON = 9.956  # of t0 = 642 at clip norm 8: README, and test_accountant's oracles


# --- All is well -------------------------------------------------------------------------------


def test_a_node_that_is_fine(node: Participant) -> None:
    code, out, err = node.call("check")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in lines[: len(NAMES)]] == [["ok", name] for name in NAMES]
    found = {line.split()[1]: line for line in lines[: len(NAMES)]}
    assert "client 1, valid for 365 days" in found["certificate"]
    assert "40 distinct images of 3x8x8; benign 20, malignant 20" in found["data"]
    assert "TLSv1." in found["coordinator"]
    assert "127.0.0.1, 365 days left" in found["coordinator"]
    assert f"epsilon {EPSILON} in all at delta 1e-05" in found["bounds"]
    assert "This node is client 1. It holds 40 distinct images." in out
    assert f"epsilon = {EPSILON} at delta = 1e-05" in out
    assert lines[-1].endswith("if you accept the statement above, add --accept")
    assert node.store.stat().st_mode & 0o777 == 0o700
    assert list(node.store.iterdir()) == []  # nothing is written without --accept


def test_acceptance_is_asked_for_and_written(node: Participant) -> None:
    code, out, err = node.call("start")
    assert code == 2
    assert "is not accepted in" in err
    assert without_advice(err).count("\n") == 1
    code, out, _ = node.call("check", "--accept")
    assert code == 0
    assert "accepted: record 2 of" in out
    ledger = ReleaseStore(node.store).ledger()
    assert [record.kind for record in ledger.records] == ["opened", "accepted"]
    fields = ledger.records[-1].fields
    assert round(fields["epsilon"], 3) == EPSILON
    assert (fields["delta"], fields["images"]) == (1e-5, 40)
    assert fields["code"] == code_digest()
    text = (node.store / "accepted" / "000002.txt").read_text()
    assert text in out
    assert main(["ledger", str(node.store)]) == 0
    code, out, _ = node.call("check")
    assert "the statement is accepted: fedpdm node start" in out
    assert ReleaseStore(node.store).ledger() == ledger  # looking changes nothing


def test_nothing_is_set_aside_unless_the_node_says_so(node: Participant) -> None:
    """A folder without a split of its own: all of it is for training; stray files are named."""
    train = node.data / "train"
    for folder in list(train.iterdir()):
        folder.rename(node.data / folder.name)
    shutil.rmtree(train)
    shutil.rmtree(node.data / "test", ignore_errors=True)
    (node.data / "benign" / "letter.pdf").write_text("x")
    assert node.call("check", "--accept")[0] == 0
    found = {line.split()[1]: line for line in node.call("check")[1].splitlines()[:12]}
    assert (
        "40 distinct images of 3x8x8; benign 20, malignant 20; values 0 to 255; 1 file is "
        in found["data"]
    )
    assert found["data"].endswith("not used: benign/letter.pdf (no image by its name)")
    client = open_local_client(
        {"partition-id": 1, "data-dir": str(node.data), "store-dir": str(node.store)},
        flat(read_invitation(node.invitation).config, node.root / "server"),
        0,
    )
    assert len(client.held.images) == 40
    policy = "max_epsilon: none\nmin_t0: none\ntest_images: true\n"
    node.policy.write_text(policy)
    found = {line.split()[1]: line for line in node.call("check")[1].splitlines()[:12]}
    assert re.search(r" 3\d distinct images .*; \d+ set aside as test images; 1 f", found["data"])


def test_copies_are_counted_once_and_changes_since_are_told(node: Participant) -> None:
    assert node.call("check", "--accept")[0] == 0
    first = next((node.data / "train" / "benign").glob("*.png"))
    shutil.copy(first, first.with_name("copy.png"))
    _, out, _ = node.call("check")
    assert "40 distinct images of 3x8x8 (1 copies left out)" in out
    assert "other images" not in out
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(first.with_name("another.png"))
    _, out, _ = node.call("check")
    assert "benign 21, malignant 20" in out
    assert "for 40 other images than today's" in out


def test_json_says_the_same(node: Participant) -> None:
    code, out, _ = node.call("check", "--json", "--accept")
    report = json.loads(out)
    assert code == 0
    assert (report["ok"], report["accepted"]) == (True, True)
    assert report["counts"] == {"benign": 20, "malignant": 20}
    statement = report["statement"]
    assert round(statement["epsilon"], 3) == EPSILON
    assert statement["images_released_now"] == 40
    assert statement["raw_metrics"] is False


# --- One thing is wrong ------------------------------------------------------------------------


def expire(node: Participant) -> tuple[str, str]:
    for path in node.certificate.parent.glob("node-1.*"):
        path.unlink()
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=40)
    make_authority(node.root / "old", now=then)
    make_node(node.root / "old", node.certificate.parent, client_id=1, days=30, now=then)
    return "certificate", "expired on"


def use_other_authority(node: Participant) -> tuple[str, str]:
    for path in node.certificate.parent.glob("node-1.*"):
        path.unlink()
    make_authority(node.root / "other")
    make_node(node.root / "other", node.certificate.parent, client_id=1)
    return "coordinator", "was not signed by this federation's authority"


def use_other_name(node: Participant) -> tuple[str, str]:
    node.address = node.address.replace("127.0.0.1", "localhost")
    return "coordinator", "is for another name"


def use_no_address(node: Participant) -> tuple[str, str]:
    node.address = "coordinator"
    return "coordinator", "must be HOST:PORT"


def move_data(node: Participant) -> tuple[str, str]:
    node.data.rename(node.data.with_name("elsewhere"))
    return "data", "has no folder"


def break_picture(node: Participant) -> tuple[str, str]:
    next(node.data.rglob("train/*/*.png")).write_bytes(b"none")
    return "data", ".png"


def add_class(node: Participant) -> tuple[str, str]:
    folder = node.data / "train" / "unclear"
    folder.mkdir()
    shutil.copy(next(node.data.rglob("train/*/*.png")), folder)
    return "classes", "unclear here is none of the federation's (benign, malignant)"


def resize(node: Participant) -> tuple[str, str]:
    node.rewrite(images={"resolution": 16})
    return "data", "resolution is 8 here, 16 in the federation"


def block_store(node: Participant) -> tuple[str, str]:
    node.store.write_text("")
    return "store", "is not a directory"


def open_store(node: Participant) -> tuple[str, str]:
    node.store.mkdir(mode=0o755)
    return "store", "others can read it (mode 0755)"


def use_store_of_another(node: Participant) -> tuple[str, str]:
    node.store.mkdir(mode=0o700)
    ReleaseStore(node.store).note("noted", {}, client_id=0)
    return "store", "is the store of client 0, not 1"


def lose_ledger(node: Participant) -> tuple[str, str]:
    """Rounds of a run by another config are there, and no ledger."""
    node.store.mkdir(mode=0o700)
    ClientStore(node.store / "runs" / "0123456789abcdef").save_class_counts(np.arange(2))
    return "store", "ledger.jsonl knows of none: noising them again would be a second release"


def damage_ledger(node: Participant) -> tuple[str, str]:
    node.store.mkdir(mode=0o700)
    (node.store / "ledger.jsonl").write_text("{}")
    return "store", "is not the title of a ledger"


def bound_epsilon(node: Participant) -> tuple[str, str]:
    node.policy.write_text(policy_text("max_epsilon: 5"))
    return "bounds", "more than the 5 of this node"


def ask_for_raw_metrics(node: Participant) -> tuple[str, str]:
    config = quiet(node.made, evaluation={"image_metrics": True})
    node.invitation.write_text(make_invitation(config))
    return "bounds", "metrics on raw images"


def break_policy(node: Participant) -> tuple[str, str]:
    node.policy.write_text(policy_text("max_epsilonn: 5"))
    return "policy", "did you mean max_epsilon?"


def cut_policy(node: Participant) -> tuple[str, str]:
    node.policy.write_text("max_epsilon:")
    return "policy", "max_epsilon: is empty; give a bound, or none for no bound"


def lose_policy(node: Participant) -> tuple[str, str]:
    node.policy.symlink_to(node.root / "not-there.yaml")
    return "policy", "policy.yaml: cannot be read: No such file or directory"


def other_flower(node: Participant) -> tuple[str, str]:
    node.rewrite(software={"flwr": "1.41.0"})
    return "versions", "flwr is 1.39.0 here, 1.41.0 at the coordinator"


def other_code(node: Participant) -> tuple[str, str]:
    node.rewrite(software={"code": "f" * 64})
    return "versions", "the coordinator's ffffffffffffffff"


def plain_experiment(node: Participant) -> tuple[str, str]:
    node.invitation.write_text(config_to_yaml(quiet(node.made)))
    return "versions", "does not say what the coordinator runs"


def too_few_clients(node: Participant) -> tuple[str, str]:
    config = quiet(node.made, partition={"num_clients": 1})
    node.invitation.write_text(make_invitation(config))
    return "invitation", "partition.num_clients: 1, but the certificate is client 1's"


def lose_invitation(node: Participant) -> tuple[str, str]:
    node.invitation.unlink()
    return "invitation", "cannot be read"


def damage_invitation(node: Participant) -> tuple[str, str]:
    content = json.loads(node.invitation.read_text())
    del content["software"]["code"]
    node.invitation.write_text(json.dumps(content))
    return "invitation", "is no complete invitation"


def turn_clock_back(node: Participant) -> tuple[str, str]:
    node.rewrite(made_at="2099-01-01T00:00:00+00:00")
    return "clock", "is before 2099-01-01"


DAMAGES = [
    expire, use_other_authority, use_other_name, use_no_address, move_data, break_picture,
    add_class, resize, block_store, open_store, use_store_of_another, lose_ledger, damage_ledger,
    bound_epsilon, ask_for_raw_metrics, break_policy, cut_policy, lose_policy, other_flower,
    other_code, plain_experiment, too_few_clients, lose_invitation, damage_invitation,
    turn_clock_back,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_found_and_nothing_accepted(
    node: Participant, damage: Callable[[Participant], tuple[str, str]]
) -> None:
    """The check that is meant fails, what depends on it is not checked, the rest is fine."""
    name, reason = damage(node)
    found = node.failed("--accept")
    assert reason in found[name]
    others = {other: line for other, line in found.items() if other != name}
    explained = ("not checked, since these failed", "ledger", "was not signed")
    assert all(any(word in line for word in explained) for line in others.values()), others
    kinds = [r.kind for r in _ledger_or_none(node.store)]
    assert "accepted" not in kinds


def _ledger_or_none(store: Path) -> Any:
    try:
        return ReleaseStore(store).ledger().records
    except StoreError:
        return ()


def test_a_code_digest_that_the_policy_names_is_fine(node: Participant) -> None:
    other_code(node)
    node.policy.write_text(policy_text(f"code: ['{'f' * 64}']"))
    assert node.failed() == {}


HOSTILE = "ok\x1b[2K\r\nok    bounds  \u202eno bounds\u2028\u200b"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["name", "flwr", "images", "format", "key"])
def test_an_invitation_cannot_draw_on_the_terminal(node: Participant, where: str) -> None:
    """No forged line, no hidden text: all of it is in the one line of a check that failed."""
    config = json.loads(node.invitation.read_text())["config"]
    node.rewrite(
        **{
            "name": {"config": {**config, "name": HOSTILE}},
            "flwr": {"software": {"flwr": HOSTILE}},
            "images": {"images": {"resolution": HOSTILE}},
            "format": {"format": HOSTILE},
            "key": {"config": {**config, HOSTILE: 1}},
        }[where]
    )
    code, out, err = node.call("check", "--timeout", "2")
    assert (code, err) == (2, "")
    for text in (out, *node.failed().values()):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert [line.split()[1] for line in out.splitlines()[: len(NAMES)]] == NAMES
    assert r"\x1b[2K" in out
    assert len(max(out.splitlines(), key=len)) < 4200


def test_an_endless_text_is_cut(node: Participant) -> None:
    node.rewrite(software={"flwr": "9" * 500_000})
    assert len(node.failed()["versions"]) < 4200


def test_what_a_folder_is_called_cannot_draw_either(node: Participant) -> None:
    (node.data / "train" / "benign").rename(node.data / "train" / "benign\x1b[2K")
    (node.data / "test" / "benign").rename(node.data / "test" / "benign\x1b[2K")
    code, out, _ = node.call("check")
    assert code == 2
    assert r"here (benign\x1b[2K, malignant)" in out
    assert "\x1b" not in out
    code, out, _ = node.call("check", "--classes", "benign=benign\x1b[2K")
    assert code == 0
    assert r"benign = benign\x1b[2K, malignant" in out
    assert "\x1b" not in out


@pytest.mark.slow
def test_no_policy_is_said(node: Participant) -> None:
    code, out, _ = node.call("check", "--accept")
    assert code == 0
    words = f"no policy.yaml in {node.policy.parent}: NO BOUNDS on epsilon and t0"
    assert f"{words}; no raw metrics, no second release" in out
    node.policy.write_text("max_epsilon: none\nmin_t0: none\n")
    assert "NO max_epsilon, NO min_t0" in node.call("check")[1]


def test_a_delta_beyond_one_image_is_pointed_out(node: Participant) -> None:
    """40 images: 1 / 40 is 0.025."""
    assert "WARNING" not in node.call("check")[1]
    node.invitation.write_text(make_invitation(quiet(node.made, privacy={"delta": 0.03})))
    node.policy.write_text(policy_text("delta: 0.04"))
    code, out, _ = node.call("check", "--accept")
    assert code == 0
    lines = {line.split()[1]: line for line in out.splitlines()[: len(NAMES)]}
    assert "WARNING: delta 0.04 is above 1 / 40 images of a client: whoever" in lines["bounds"]
    assert "WARNING: delta 0.03 is above 1 / 40 images" in lines["statement"]
    assert "WARNING: delta 0.03 is above 1 / 40 images of a client" in " ".join(out.split())
    (numbers,) = (node.store / "accepted").glob("*.json")
    assert "0.03 is above 1 / 40" in json.loads(numbers.read_text())["delta_warning"]


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "1e9"])
def test_a_timeout_that_is_none(node: Participant, seconds: str) -> None:
    code, _, err = node.call("check", f"--timeout={seconds}")
    assert code == 2
    assert err.startswith("fedpdm: --timeout: must be in (0, 3600], got ")


@pytest.mark.parametrize("name", ["disk", "memory"])
def test_too_little_space(node: Participant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, f"free_{name}", lambda *_: 1_000_000)
    found = node.failed()
    assert set(found) == {name}
    assert "0.00 GB are free" in found[name]


def test_nobody_answers(node: Participant) -> None:
    node.address = "127.0.0.1:9"
    assert "Connection refused" in node.failed()["coordinator"]


@pytest.mark.parametrize("missing", ["--coordinator", "--certificate", "--data"])
def test_three_values_are_needed(
    node: Participant, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "--coordinator": node.address,
        "--certificate": str(node.certificate),
        "--data": str(node.data),
    }
    variables = dict(zip(values, ("COORDINATOR", "CERTIFICATE", "NODE_DATA"), strict=True))
    for variable in variables.values():
        monkeypatch.delenv(f"FEDPDM_{variable}", raising=False)
    words = [word for pair in values.items() if pair[0] != missing for word in pair]
    node.capsys.readouterr()
    assert main(["node", "check", *words]) == 2
    assert node.capsys.readouterr().err.startswith(f"fedpdm: {missing}: is missing")
    monkeypatch.setenv(f"FEDPDM_{variables[missing]}", values[missing])
    assert main(["node", "check", "--store", str(node.store), *words]) == 0


def test_the_invitation_holds_the_resolved_config(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(config_to_yaml(config_from_mapping({"name": "digits", **SMALL})))
    out = tmp_path / "invitation.json"
    arguments = ["--set", "privacy.epsilon=3", "--set", "partition.num_clients=7"]
    assert main(["node", "invite", str(path), *arguments, "--out", str(out)]) == 0
    found = read_invitation(out)
    assert found.config.run.simulation is False
    assert (found.config.privacy.epsilon, found.config.partition.num_clients) == (3.0, 7)
    shape = {"channels": 3, "resolution": 8, "num_classes": 10, "shift": -1.0}
    names = [str(digit) for digit in range(10)]
    assert found.images == {**shape, "class_names": names, "values": [0, 255]}
    assert found.software is not None
    assert found.software.code == code_digest()


def test_the_store_of_a_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/fedpdm")
    assert default_store(3) == Path("/var/lib/fedpdm/node-3")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_store(3) == tmp_path / "fedpdm" / "node-3"


# --- Start -------------------------------------------------------------------------------------


def test_what_is_started(node: Participant) -> None:
    node.policy.write_text(policy_text(f"{{max_epsilon: 10, code: [{'a' * 64}, {'b' * 64}]}}"))
    assert node.call("check", "--accept")[0] == 0
    command = engine.prepare_node(node.settings())
    words = list(command.command)
    assert Path(words[0]).name == "flower-supernode"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert "--insecure" not in words
    assert options["--superlink"] == node.address
    assert options["--auth-supernode-private-key"] == str(node.certificate.with_suffix(".key"))
    ca = Path(options["--root-certificates"]).read_text()
    assert ca == (node.made / "ca" / "ca.crt").read_text()
    told = tomllib.loads(Path(options["--node-config"]).read_text())
    assert told == {
        "partition-id": 1,
        "num-partitions": 2,
        "data-dir": str(node.data),
        "store-dir": str(node.store),
        "raw-metrics": False,
        "allow-new-release": False,
        "test-images": False,
        "require-acceptance": True,
        "installed-code": code_digest(),
        "policy-file": str(node.policy),
    }
    guarded = Path(command.environment["PATH"].split(os.pathsep)[0])
    assert os.access(guarded / "flwr-clientapp", os.X_OK)
    assert command.environment["FEDPDM_ALLOWED_CODE"] == "a" * 64 + " " + "b" * 64
    assert list(command.cwd.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "values"),
    [("privacy", {"epsilon": 9.0}), ("run", {"rounds": 9}), ("coarse", {"lr": 1e-4})],
)
def test_another_config_is_not_accepted(
    node: Participant, section: str, values: dict[str, Any]
) -> None:
    assert node.call("check", "--accept")[0] == 0
    engine.prepare_node(node.settings())
    node.invitation.write_text(make_invitation(quiet(node.made, **{section: values})))
    with pytest.raises(ConfigError, match="is not accepted in"):
        engine.prepare_node(node.settings())


def test_nothing_is_started_in_a_store_that_lost_its_memory(node: Participant) -> None:
    """Accepted again since, so that the lost answer alone speaks against it."""
    assert node.call("check", "--accept")[0] == 0
    engine.prepare_node(node.settings())
    reply = node.store / "runs" / "earlier" / "rounds" / "000001" / "reply.json"
    reply.parent.mkdir(parents=True)
    reply.write_text(json.dumps({"ledger": "f" * 64}))
    with pytest.raises(StoreError, match="does not continue: it was cut or replaced"):
        engine.prepare_node(node.settings())


def test_nothing_is_started_in_the_store_of_another_client(node: Participant) -> None:
    ReleaseStore(node.store).note("accepted", {}, client_id=0)
    with pytest.raises(StoreError, match="is the store of client 0, not 1"):
        engine.prepare_node(node.settings())


@pytest.mark.slow
@pytest.mark.parametrize("damage", [expire, bound_epsilon, ask_for_raw_metrics, move_data])
def test_nothing_is_started_when_it_became_wrong(
    node: Participant, damage: Callable[[Participant], tuple[str, str]]
) -> None:
    assert node.call("check", "--accept")[0] == 0
    damage(node)
    code, out, err = node.call("start")
    assert (code, out) == (2, "")
    assert without_advice(err).count("\n") == 1


SCRIPT = """
import contextlib, sys
from pathlib import Path
from fedpdm.engines import supervision as node
node.PAUSE = 0.2
if sys.argv[3] == "cold":
    node.warm_process = lambda *_, **__: contextlib.nullcontext()
root = Path(sys.argv[1])
command = node.NodeCommand(
    client_id=5, command=("sh", "-c", sys.argv[2]), environment={"PATH": "/usr/bin:/bin"},
    cwd=root, lock=root / ".node-lock", warm=root / "warm",
)
sys.exit(node.run_node(command))
"""


@contextmanager
def started(root: Path, script: str, warmth: str = "cold") -> Iterator[subprocess.Popen[str]]:
    """A supervisor of `script`; killed at the end if the test has not stopped it. Only a "warm" one
    has the process that would work on messages: it takes seconds to begin, and none come here."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), script, warmth],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else ():
                child.kill()
            process.kill()


@pytest.mark.slow
def test_a_node_that_ends_is_started_again_until_told_to_stop(tmp_path: Path) -> None:
    with started(tmp_path, "echo ran; exit 3") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    assert lines[0] == lines[2] == "ran\n"
    assert lines[1] == (
        "node 5: the SuperNode ended with exit code 3; it is started again in 0 s\n"
    )
    assert rest.endswith("node 5: stopped\n")
    assert process.returncode == 0


@pytest.mark.slow
def test_a_log_is_plain_text(tmp_path: Path) -> None:
    """Flower colours its lines wherever they go; what escapes is left is shown, not obeyed."""
    script = r"printf 'part' >&2; printf '\033[92mINFO \033[0m:   in \033[2Jit\n'; exec sleep 99"
    with started(tmp_path, script) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert first == "INFO :   in \\x1b[2Jit\n"
    assert errors == "part\n"


@pytest.mark.slow
def test_stopping_ends_the_supernode_and_two_nodes_do_not_share_a_store(tmp_path: Path) -> None:
    with started(tmp_path, "echo $$; exec sleep 1000", "warm") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with started(tmp_path, "echo second") as second:
            out, err = second.communicate(timeout=120)
        assert "another node runs on this store" in err
        assert out == ""
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert not psutil.pid_exists(child)
