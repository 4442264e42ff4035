"""A participant whose store lost its memory: refused by itself, or noticed by the coordinator."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpdm import wire
from fedpdm.privacy import ledger as ledgers
from fedpdm.setup.flower_config import FEDERATION_VARIABLE
from tests.deployment.test_deployed_client import FIRST, local_of, store_tree, with_config
from tests.support.deployments import Federation, deployment

RELEASE = {"round": 1, "phase": "release"}


def vault(federation: Federation, client: int = 0) -> Path:
    return Path(federation.nodes[client]["store-dir"])


def add_pictures(federation: Federation, count: int, client: int = 0) -> None:
    rng = np.random.default_rng(count)
    folder = Path(federation.nodes[client]["data-dir"]) / "train" / "benign"
    for number in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"later-{number}.png")


def run_again(federation: Federation, out: Path, lr: float) -> list[list[str]]:
    """Another run by the same server; the failures of its rounds."""
    other = with_config(
        federation, fine={"lr": lr}, aggregation={"on_failure": "skip", "min_clients": 1}
    )
    other.run_config["run-dir"] = str(out)
    other.run()
    return [record["failed"] for record in json.loads((out / "metrics.json").read_text())["rounds"]]


@pytest.mark.slow
def test_another_config_does_not_noise_afresh_what_a_lost_ledger_held(tmp_path: Path) -> None:
    """`ledger.jsonl` and `releases/` are deleted, `runs/` is kept."""
    federation = deployment(tmp_path)
    federation.ask(0, "train", FIRST)
    (vault(federation) / "ledger.jsonl").unlink()
    shutil.rmtree(vault(federation) / "releases")
    before = store_tree(federation, 0)
    for lr in (5e-4, 1e-3):
        for kind, config in (("train", FIRST), ("train", RELEASE), ("evaluate", {"round": 1})):
            sent = with_config(federation, fine={"lr": lr}).ask(0, kind, config)
            assert sent.payload == []
            assert sent.metrics["error"].startswith("failed; client 0 shows the details")
    assert store_tree(federation, 0) == before


@pytest.mark.slow
def test_the_coordinator_notices_a_store_that_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole older store: nothing in it says so. It is left out, the others go on."""
    state = tmp_path / "state"
    state.mkdir()
    (state / "federation.json").write_text('{"nodes": {}}')
    monkeypatch.setenv(FEDERATION_VARIABLE, str(state))
    federation = deployment(tmp_path)
    federation.run(rounds=1)
    shutil.copytree(vault(federation), tmp_path / "backup")
    add_pictures(federation, 5)
    assert run_again(federation, tmp_path / "second", 5e-4) == [[], []]
    seen = json.loads((state / "ledgers.json").read_text())
    assert seen == {str(k): local_of(federation, k).releases.ledger().marks for k in (0, 1)}
    assert len(seen["0"]) == 3 * 16  # opened, a release, a release of what was added
    shutil.move(vault(federation), tmp_path / "newest")
    shutil.copytree(tmp_path / "backup", vault(federation))
    before = store_tree(federation, 0)
    failed = run_again(federation, tmp_path / "third", 7e-4)
    line = "client 0: its ledger has 2 records where 3 were seen: its store was set back or "
    assert [len(lines) for lines in failed] == [1, 1]
    assert all(lines[0].startswith(line) for lines in failed)
    assert store_tree(federation, 0) == before  # it was not even asked
    shutil.rmtree(vault(federation))
    shutil.move(tmp_path / "newest", vault(federation))
    assert run_again(federation, tmp_path / "fourth", 9e-4) == [[], []]


@pytest.mark.slow
def test_what_is_shown_of_a_ledger_is_chance_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not depend on what the records say: a chain would let one test a guess of images."""
    shown = []
    for name in ("one", "other"):
        numbers = iter(f"{k:016x}" for k in range(1, 9))
        monkeypatch.setattr(ledgers.secrets, "token_hex", lambda _, n=numbers: next(n))
        (tmp_path / name).mkdir()
        federation = deployment(tmp_path / name)
        if name == "other":
            shutil.rmtree(federation.nodes[0]["data-dir"])
            shutil.copytree(federation.nodes[1]["data-dir"], federation.nodes[0]["data-dir"])
        federation.ask(0, "get_properties")
        federation.ask(0, "train", RELEASE)
        federation.ask(0, "get_properties")
        shown.append([sent.metrics["ledger"] for sent in federation.sent])
        (chain,) = {
            record.chain for record in local_of(federation, 0).releases.ledger().records[1:]
        }
        assert chain.encode() not in b"".join(sent.data for sent in federation.sent)
    assert shown[0] == shown[1] == ["", *[f"{1:016x}{2:016x}"] * 2]
    sent: Any = federation.sent[-1].metrics
    assert re.fullmatch(r"(?:[0-9a-f]{16})+", sent["ledger"])


@pytest.mark.parametrize("marks", ["x" * 16, "a" * 15, "A" * 16, "0" * 16 + "\n"])
def test_other_text_is_no_mark(marks: str) -> None:
    for allow in (False, True):
        with pytest.raises(wire.WireError, match="ledger of it must be marks of 16 hexadecimal"):
            wire.check_metrics({"ledger": marks}, allow_raw=allow, who="it")
    assert wire.check_metrics({"ledger": "0f" * 16}, allow_raw=False, who="it")
