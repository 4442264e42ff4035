"""A client with a disk of its own: what it decides itself, whatever a server asks or breaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.local import LocalClient, open_local_client
from fedpdm import wire
from fedpdm.privacy.mechanism import SeededNoise, SystemNoise
from fedpdm.privacy.planning import build_release_plan, build_release_request
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup import losses as batches
from fedpdm.setup.flower_config import run_config_of
from fedpdm.setup.run_setup import build_schedule
from fedpdm.storage.files import StoreError
from tests.support.deployments import Federation, deployment
from tests.support.leaks import Search, private_things
from tests.support.refusals import tree

MODES = ("federated", "server")
WISHES = {"raw-metrics": True, "allow-new-release": True, "image_metrics": True, "fine_loss": 1}
FIRST = {"round": 1, "phase": "coarse"}


def local_of(federation: Federation, client: int) -> LocalClient:
    return open_local_client(dict(federation.nodes[client]), federation.run_config, 0)


def with_config(federation: Federation, **sections: Mapping[str, Any]) -> Federation:
    """The same nodes under another run config, as a server could send it."""
    config = json.loads(federation.run_config["resolved-config"])
    for name, values in sections.items():
        config[name] |= values
    changed = {**federation.run_config, "resolved-config": json.dumps(config)}
    return Federation(federation.nodes, changed)


def store_tree(federation: Federation, client: int) -> dict[str, bytes]:
    """The files of the client's store, but for its empty lock files."""
    root = Path(federation.nodes[client]["store-dir"])
    files = {name: data for name, data in tree(root).items() if (root / name).is_file()}
    return {name: data for name, data in files.items() if not name.endswith("lock")}


# --- Metrics on raw data --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", MODES)
def test_the_server_cannot_turn_raw_metrics_on(tmp_path: Path, training: str) -> None:
    """Asked for in the run config, beside it, and in every message, last round included."""
    federation = deployment(
        tmp_path, coarse={"training": training}, evaluation={"image_metrics": True}
    )
    federation.run_config |= WISHES
    phase = "coarse" if training == "federated" else "release"
    federation.ask(0, "train", {"round": 1, "phase": phase, "final": True, **WISHES})
    federation.ask(0, "evaluate", {"round": 1, "final": True, **WISHES})
    federation.ask(0, "get_properties", WISHES)
    trained = {"coarse_loss", "coarse_known", "coarse_steps", "coarse_seconds", "coarse_images"}
    common = {"client_id", "num_released", "fine_images", "seconds", "ledger"}
    assert [set(sent.metrics) for sent in federation.sent] == [
        common | (trained if training == "federated" else set()),
        {"client_id", "heldout_coarse_loss", "heldout_coarse_known", "num_heldout"},
        {"client_id", "ledger"},
    ]
    assert local_of(federation, 0).store.load_samples() is not None  # it was the final evaluation
    assert local_of(federation, 0).reference is None
    assert local_of(federation, 0).allow_new_release is False


@pytest.mark.slow
def test_a_client_may_turn_raw_metrics_on_for_itself(tmp_path: Path) -> None:
    federation = deployment(tmp_path, options={1: {"raw-metrics": True}})
    federation.run()
    names = [
        {name for sent in federation.sent if sent.client == client for name in sent.metrics}
        for client in (0, 1)
    ]
    images = {
        f"all_{method}_{metric}"
        for method in ("pfdm", "alone", "own")
        for metric in ("frechet", "class_fidelity")
    }
    assert names[1] - names[0] == {"fine_loss"} | images
    assert names[0] - names[1] == set()
    assert names[0] <= wire.FIT_METRICS.keys()
    final = json.loads((tmp_path / "server" / "metrics.json").read_text())["final"]["clients"]
    assert [images <= metrics.keys() for metrics in final] == [False, True]
    search = Search(private_things(federation.nodes[1], federation.run_config))
    assert not any(search.found(sent.data + sent.objects) for sent in federation.sent)


def test_metrics_turned_off_are_not_replayed(tmp_path: Path) -> None:
    on = deployment(tmp_path, options={0: {"raw-metrics": True}})
    first = on.ask(0, "train", FIRST)
    assert "fine_loss" in first.metrics
    again = deployment(tmp_path).ask(0, "train", FIRST)
    assert again.metrics.keys() == first.metrics.keys() - {"fine_loss"} | {"replayed"}
    assert wire.fingerprint(again.payload) == wire.fingerprint(first.payload)


# --- The noise ------------------------------------------------------------------------------


@pytest.mark.slow
def test_deployed_noise_comes_from_no_seed(tmp_path: Path) -> None:
    """Same pictures, client, run and seed: another store has other noise, of the right size."""
    rows = []
    for name in ("one", "other"):
        federation = deployment(tmp_path)
        federation.nodes[0]["store-dir"] = str(tmp_path / name)
        sent = federation.ask(0, "train", {"round": 1, "phase": "release"})
        released = wire.decode_release(sent.payload, who="it", client_id=0)
        assert (released.seeded, released.noise_source) == (False, SystemNoise.description)
        (record,) = local_of(federation, 0).releases.ledger().releases()
        assert (record.seeded, record.noise_source) == (False, SystemNoise.description)
        rows.append(released.x_tilde.double())
        beta = 1.0 - released.parameters.alpha_bar
    # Their difference is noise of twice the variance: 6912 pixels, 5 standard errors.
    ratio = float((rows[0] - rows[1]).square().mean()) / (2.0 * beta)
    assert abs(ratio - 1.0) < 5.0 * np.sqrt(2.0 / rows[0].numel())


def test_a_store_of_a_simulation_is_refused(tmp_path: Path) -> None:
    federation = deployment(tmp_path)
    local = local_of(federation, 0)
    schedule = build_schedule(local.config)
    plan = build_release_plan(local.config, schedule, local.setup.spec)
    options = {"client": 0, "allow_new_release": False}
    simulated = run_config_of(with_config(federation, run={"simulation": True}).run_config)
    request = build_release_request(simulated, plan, **options)
    assert request.noise(1).description == SeededNoise.description
    local.releases.obtain(local.held.images, request)
    before = store_tree(federation, 0)
    for kind, config in (("train", FIRST), ("evaluate", {"round": 1, "final": False})):
        sent = federation.ask(0, kind, config)
        assert sent.metrics["error"].startswith("failed; client 0")
        assert sent.payload == []
    assert store_tree(federation, 0) == before
    request = build_release_request(local.config, plan, **options)
    with pytest.raises(StoreError, match="release 1 was made with seeded noise in a simulation"):
        ReleaseStore(local.releases.root).obtain(local.held.images, request)


@pytest.mark.parametrize("kind", ["get_properties", "train", "evaluate"])
def test_a_run_that_says_it_is_a_simulation_is_refused(tmp_path: Path, kind: str) -> None:
    federation = with_config(deployment(tmp_path), run={"simulation": True})
    sent = federation.ask(0, kind, {**FIRST, "final": True})
    assert sent.reply.error.reason == (
        "<class 'clients.failures.ClientError'>:<'run.simulation: true seeds the privacy noise, "
        "so this deployed node refuses the run (client 0)'>"
    )
    assert not Path(federation.nodes[0]["store-dir"]).exists()


# --- Messages that no strategy of ours sends ------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("get_parameters", {}),
        ("query", {}),
        ("train.peek", {}),
        ("evaluate.images", {}),
        ("reconnect", {"seconds": 5}),
    ],
)
def test_other_messages_get_nothing(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    sent = deployment(tmp_path).ask(0, kind, config)
    assert len(sent.data) < 400
    if sent.reply.has_error():
        assert sent.reply.error.reason == f"<class 'ValueError'>:<'Invalid message type: {kind}'>"
    else:
        assert sent.payload == []
        assert sent.metrics == {}


@pytest.mark.parametrize("phase", ["fine model", "images", "", "Coarse"])
def test_other_phases_get_nothing(tmp_path: Path, phase: str) -> None:
    sent = deployment(tmp_path).ask(0, "train", {"round": 1, "phase": phase})
    assert sent.payload == []
    assert sent.metrics.keys() == {"client_id", "error"}


# --- Errors ---------------------------------------------------------------------------------


def break_picture(federation: Federation, _: pytest.MonkeyPatch) -> str:
    path = next(Path(federation.nodes[0]["data-dir"]).rglob("train/*/*.png"))
    path.write_bytes(b"no picture")
    return path.name


def lose_pictures(federation: Federation, _: pytest.MonkeyPatch) -> str:
    path = Path(federation.nodes[0]["data-dir"])
    path.rename(path.with_name("elsewhere"))
    return str(path)


def block_store(federation: Federation, _: pytest.MonkeyPatch) -> str:
    path = Path(federation.nodes[0]["store-dir"])
    path.write_text("a file where the store should be")
    return str(path)


def damage_ledger(federation: Federation, _: pytest.MonkeyPatch) -> str:
    path = Path(federation.nodes[0]["store-dir"]) / "ledger.jsonl"
    path.parent.mkdir()
    path.write_text("{}")
    return str(path)


def misspell_node_config(federation: Federation, _: pytest.MonkeyPatch) -> str:
    federation.nodes[0]["raw-metrics"] = "oui"
    return "'oui'"


def forget_store(federation: Federation, _: pytest.MonkeyPatch) -> str:
    del federation.nodes[0]["store-dir"]
    return "store-dir is missing"


def raise_in_training(error: Exception) -> Callable[[Federation, pytest.MonkeyPatch], str]:
    def plant(_: Federation, monkeypatch: pytest.MonkeyPatch) -> str:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(batches, "normalize", fail)
        return str(error)

    return plant


BROKEN = {
    "a picture": break_picture,
    "all pictures": lose_pictures,
    "the store": block_store,
    "the ledger": damage_ledger,
    "its node config": misspell_node_config,
    "no store": forget_store,
    "out of memory": raise_in_training(MemoryError("patient-100-000-Jansson.png " * 40)),
    "a bug": raise_in_training(KeyError("patient-100-000-Jansson.png")),
    "a value": raise_in_training(ValueError("pixel 7 of patient-100-000-Jansson.png is 0.25")),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_errors_keep_what_is_private(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server gets one short line, the same for each; the details are printed for the owner.

    Where only what is on raw images fails, the server gets an answer.
    """
    federation = deployment(tmp_path)
    private = BROKEN[what](federation, monkeypatch)
    at_home = "raise_in" in BROKEN[what].__qualname__
    for kind, config in (("train", FIRST), ("evaluate", {"round": 1, "final": True})):
        capsys.readouterr()
        sent = federation.ask(0, kind, config)
        for secret in (private, str(tmp_path), "hospital", "vault", "Jansson", "0.25"):
            assert secret.encode() not in sent.data + sent.objects, secret
        if at_home:
            assert not sent.reply.has_error()
            assert "error" not in sent.metrics
            assert bool(sent.payload) == (kind == "train")
        else:
            assert len(sent.data) < 700
            line = sent.reply.error.reason if sent.reply.has_error() else sent.metrics["error"]
            assert "failed; client 0 shows the details to its owner alone" in line
        if kind == "train" or not at_home:
            assert private.strip() in capsys.readouterr().err
    if at_home:
        noted = (local_of(federation, 0).store.root / "failures.txt").read_text()
        assert private.strip() in noted
        first, second = noted.splitlines()  # of training, and of sampling without a model
        assert "round 1 fine: " in first
        assert "samples: StoreError: " in second


def test_errors_about_the_servers_own_message_are_told(tmp_path: Path) -> None:
    federation = deployment(tmp_path)
    local = local_of(federation, 0)
    federation.ask(0, "train", FIRST)
    from clients.pfdm_client import PFDMClient

    client = PFDMClient(local)
    _, _, metrics = client.fit([np.zeros(9, np.uint8)], {"round": 2, "phase": "coarse"})
    assert metrics["error"].startswith("malformed message from the server: ")


@pytest.mark.slow
def test_a_failed_client_is_named(tmp_path: Path) -> None:
    federation = deployment(tmp_path, aggregation={"on_failure": "skip"})
    damage_ledger(federation, pytest.MonkeyPatch())
    federation.run()
    rounds = json.loads((tmp_path / "server" / "metrics.json").read_text())["rounds"]
    line = "client 0: failed; client 0 shows the details to its owner alone"
    assert [record["failed"] for record in rounds] == [[line], [line]]


@pytest.mark.slow
def test_one_node_takes_part_in_one_run_after_the_other(tmp_path: Path) -> None:
    """Another config has rounds and a fine model of its own, the same release."""
    first = deployment(tmp_path)
    first.run(rounds=1)
    second = with_config(first, fine={"lr": 5e-4})
    second.run_config["run-dir"] = str(tmp_path / "server-2")
    second.run(rounds=1)
    for client in (0, 1):
        here, there = (local_of(federation, client) for federation in (first, second))
        assert here.releases.root == there.releases.root
        assert len(there.releases.ledger().releases()) == 1
        fine = [local.store.load_state(1, "fine") for local in (here, there)]
        assert any((fine[0][name] != fine[1][name]).any() for name in fine[0])
