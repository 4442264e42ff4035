"""Every byte that clients send, in simulation and deployed, with federated and server training.

Only releases, coarse updates computed from them and listed metrics may leave a client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.local import LocalClient, open_local_client
from fedpdm import wire
from fedpdm.storage.files import read_tensors
from tests.support.deployments import Federation, Sent, deployment, with_releases_of
from tests.support.federations import flat, initial_message, node, small_config
from tests.support.leaks import Search, private_things, release_rows

MODES = ("federated", "server")
PER_CLIENT = {"get_properties": 1, "train": 2, "evaluate": 2}  # in a run of two rounds


@dataclass(frozen=True)
class Recorded:
    """A whole run: where, how, and all that was sent."""

    training: str
    simulated: bool
    federation: Federation

    def local(self, client: int) -> LocalClient:
        federation = self.federation
        return open_local_client(dict(federation.nodes[client]), federation.run_config, 0)

    def things(self, client: int) -> dict[str, set[bytes]]:
        """What a client has that may not leave it in this mode."""
        local = self.local(client)
        things = private_things(self.federation.nodes[client], self.federation.run_config)
        kept = (
            local.held.heldout if self.training == "server" else np.arange(len(local.held.images))
        )
        things["release"] = release_rows(local, kept)
        return things


def simulation(root: Path, training: str) -> Federation:
    config = small_config(
        coarse={"training": training},
        partition={"num_clients": 2},
        data={"max_images": 160},
    )
    return Federation({k: node(config, k) for k in (0, 1)}, flat(config, root / "run"))


@pytest.fixture(
    scope="module",
    params=[(training, simulated) for simulated in (False, True) for training in MODES],
    ids=lambda param: f"{'simulated' if param[1] else 'deployed'}, {param[0]}",
)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    training, simulated = request.param
    root = tmp_path_factory.mktemp("recorded")
    federation = (
        simulation(root, training) if simulated else deployment(root, coarse={"training": training})
    )
    federation.run()
    return Recorded(training, simulated, federation)


def everything(sent: Sent) -> bytes:
    """A message in both forms in which Flower sends it."""
    return sent.data + bytes(8) + sent.objects


# --- Whole runs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_message_of_a_run(recorded: Recorded) -> None:
    """Nothing private is in any byte; one message per request; the last round was the final one."""
    federation = recorded.federation
    search = {client: Search(recorded.things(client)) for client in (0, 1)}
    for sent in federation.sent:
        assert {k: s.found(everything(sent)) for k, s in search.items()} == {0: set(), 1: set()}
    for client in (0, 1):
        counts = {kind: len(federation.of(kind, client)) for kind in PER_CLIENT}
        assert counts == PER_CLIENT
        last = federation.of("evaluate", client)[-1].request.content
        assert last.config_records["evaluateins.config"]["final"] is True
    assert len(federation.sent) == 2 * sum(PER_CLIENT.values())


@pytest.mark.slow
def test_the_search_finds_what_is_planted(recorded: Recorded) -> None:
    """Any one piece of any kind of private thing, anywhere in a message, would have been seen."""
    search, rng = Search(recorded.things(1)), np.random.default_rng(0)
    carrier = everything(recorded.federation.of("train", 0)[0])[:100_000]
    assert search.found(carrier) == set()
    for kind, pieces in recorded.things(1).items():
        assert pieces, kind
        for piece in rng.choice(np.array(sorted(pieces), dtype=object), size=4):
            cut = int(rng.integers(len(carrier)))
            assert search.found(carrier[:cut] + piece + carrier[cut:]) == {kind}


@pytest.mark.slow
def test_the_search_finds_whole_things(recorded: Recorded) -> None:
    """An image in any form, the fine model's average, a release, an error with a path in it."""
    local, search = recorded.local(1), Search(recorded.things(1))
    image = local.held.images.images[len(local.held.images) // 2]
    state = local.store.load_state(2, "fine")
    ema = {name: tensor for name, tensor in state.items() if name.startswith("ema.")}
    assert ema
    rows = read_tensors(local.releases.root / "releases" / "000001.safetensors")[0]["x_tilde"]
    for planted, kind in (
        (image.tobytes(), "images"),
        (image.transpose(1, 2, 0).tobytes(), "images"),
        ((image / 127.5 - 1.0 - local.setup.spec.shift).astype(np.float16).tobytes(), "images"),
        (wire.encode_model(ema)[0].tobytes(), "fine model"),
        (rows[local.held.heldout[0]].numpy().tobytes(), "release"),
        (f"{local.store.root}/rounds: no such file".encode(), "paths"),
        ((local.releases.root / "ledger.jsonl").read_bytes(), "ledger"),
    ):
        assert kind in search.found(b"before" + planted + b"after"), kind


@pytest.mark.slow
def test_a_message_has_no_room_for_more(recorded: Recorded) -> None:
    """All fields of all messages: listed metrics, counts, one payload of the kind asked for."""
    for sent in recorded.federation.sent:
        local, records = recorded.local(sent.client), sent.reply.content
        name = {"train": "fitres", "evaluate": "evaluateres"}.get(sent.kind, "getpropertiesres")
        status = dict(records[f"{name}.status"])
        assert status == {"code": 0, "message": "Success"}
        fields = set(records) - {f"{name}.status"}
        if sent.kind == "get_properties":
            assert fields == {f"{name}.properties"}
            known = {"client_id": sent.client}
            marks = {} if recorded.simulated else {"ledger": sent.metrics["ledger"]}
            assert sent.metrics == known | marks
            continue
        clocks = {} if recorded.simulated else dict.fromkeys(wire.CLOCKS, int)
        raw = wire.RAW_METRICS if recorded.simulated else {}
        allowed = {**wire.FIT_METRICS, **raw, **clocks}
        assert {key: type(value) for key, value in sent.metrics.items()}.items() <= allowed.items()
        count = records[f"{name}.num_examples"]
        if sent.kind == "train":
            assert fields == {f"{name}.metrics", f"{name}.num_examples", f"{name}.parameters"}
            assert dict(count) == {"num_examples": len(local.held.train)}
            assert sent.metrics["num_released"] == len(local.held.images)
        else:
            assert fields == {f"{name}.metrics", f"{name}.num_examples", f"{name}.loss"}
            assert dict(count) == {"num_examples": len(local.held.heldout)}
            loss = dict(records[f"{name}.loss"])
            assert loss == {"loss": sent.metrics["heldout_coarse_loss"]}


@pytest.mark.slow
def test_payloads_are_updates_or_the_stored_release(recorded: Recorded) -> None:
    """Decoded, a payload is what it may be, and encoded again it is the same bytes."""
    for sent in recorded.federation.of("train"):
        local = recorded.local(sent.client)
        number = sent.request.content.config_records["fitins.config"]["round"]
        payload = sent.payload
        if recorded.training == "federated":
            like = wire.decode_model(initial_message(local.config))
            update = wire.decode_update(payload, like=like, round=number, who="it")
            assert (update.client_id, update.seeded) == (sent.client, recorded.simulated)
            again = wire.encode_update(update)
        elif number == 1:
            released = wire.decode_release(payload, who="it", client_id=sent.client)
            stored = read_tensors(local.releases.root / "releases" / "000001.safetensors")[0]
            assert torch.equal(released.x_tilde, stored["x_tilde"][local.held.train])
            assert released.labels.tolist() == local.held.train_labels.tolist()
            assert released.seeded is recorded.simulated
            again = wire.encode_release(released, client_id=sent.client)
        else:
            again = wire.encode_nothing()
        assert [array.tobytes() for array in payload] == [array.tobytes() for array in again]


# --- The release, and nothing but the release -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [(mode, False) for mode in MODES], indirect=True, ids=MODES)
def test_messages_are_a_function_of_the_release(tmp_path: Path, recorded: Recorded) -> None:
    """Same releases, other raw images: every message of the whole run is the same to the bit."""
    first, sections = recorded.federation, {"coarse": {"training": recorded.training}}
    second = with_releases_of(first, tmp_path / "second", **sections)
    second.run()
    assert len(first.sent) == len(second.sent) == 10
    # Nodes are asked who they are at once; what each says in turn is what counts.
    each = (sorted(f.sent, key=lambda sent: sent.client) for f in (first, second))
    for one, other in zip(*each, strict=True):
        assert one.timeless() == other.timeless(), (one.client, one.kind)
        assert one.metrics.keys() == other.metrics.keys()
    for client in (0, 1):  # the raw images did matter, to what stays
        fine = [
            open_local_client(dict(f.nodes[client]), f.run_config, 0).store.load_state(2, "fine")
            for f in (first, second)
        ]
        moved = [name for name in fine[0] if not torch.equal(fine[0][name], fine[1][name])]
        assert len(moved) > len(fine[0]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("training", MODES)
def test_other_releases_make_other_messages(tmp_path: Path, training: str) -> None:
    """The comparison can fail: the same raw images, released by another client for itself."""
    payloads = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        federation = deployment(tmp_path / name, coarse={"training": training})
        federation.run(rounds=1)
        payloads.append([sent.timeless() for sent in federation.of("train")])
    assert all(one != other for one, other in zip(*payloads, strict=True))
