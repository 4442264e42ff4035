"""Every byte that clients of class statistics send, in simulation and deployed: noised sums,
counts and listed metrics, and nothing that depends on an image in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.local import LocalClient, open_local_client
from fedpdm import wire
from fedpdm.privacy.components import told_before
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
    ReleaseSource,
    StatisticsParameters,
    restore_release,
)
from fedpdm.storage.files import read_tensors, write_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.deployments import Federation, deployment, draw_pictures
from tests.support.federations import flat, node, small_config
from tests.support.leaks import Search, private_things, windows
from tests.support.statistics_toys import MECHANISM

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": 5},
    "coarse": {"training": "server"},
    "statistics": {"components": 2, "component_rounds": 2},
    "privacy": {"release": "statistics", "clip_norm": 6.0},
}


def deployed(root: Path) -> Federation:
    policy = root / "policy.yaml"
    policy.write_text(
        "mechanisms: [statistics]\nmax_epsilon: 10\nmin_t0: none\nallow_raw_metrics: true\n"
    )
    options = {client: {"policy-file": str(policy)} for client in (0, 1)}
    sections = {**SECTIONS, "run": {**SECTIONS["run"], "simulation": False}}
    return deployment(root, options=options, **sections)


@pytest.fixture(scope="module", params=[False, True], ids=["deployed", "simulated"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Federation, bool]:
    root = tmp_path_factory.mktemp("recorded")
    if request.param:
        config = small_config(**SECTIONS, partition={"num_clients": 2}, data={"max_images": 160})
        federation = Federation({k: node(config, k) for k in (0, 1)}, flat(config, root / "run"))
    else:
        federation = deployed(root)
    federation.run()
    return federation, request.param


def local_of(federation: Federation, client: int) -> LocalClient:
    return open_local_client(dict(federation.nodes[client]), federation.run_config, 0)


def stored(local: LocalClient) -> list[dict[str, torch.Tensor]]:
    """The tensors of a client's releases, in order: of all kinds of sums."""
    return [
        read_tensors(local.releases.root / "releases" / record.file)[0]
        for record in local.releases.ledger().releases()
    ]


def public_of(federation: Federation, stage: StatisticsParameters) -> dict[str, torch.Tensor]:
    """What the server told clients before a round, made again from what it got."""
    run = RunDirectory(Path(str(federation.run_config["run-dir"])))

    def sums(part: str) -> list[ReleasedStatistics]:
        kept = [restore_release(*upload) for upload in run.load_uploads(part=part)]
        return [each for each in kept if isinstance(each, ReleasedStatistics)]

    return told_before(stage, sums)


def exact_sums(federation: Federation, client: int) -> set[bytes]:
    """Pieces of the sums without noise."""
    local = local_of(federation, client)
    train = local.held.images.subset(local.held.train)
    pieces: set[bytes] = set()
    for kept, parameters in zip(stored(local), local.setup.release_plan.rounds, strict=True):
        assert isinstance(parameters, StatisticsParameters)
        public = public_of(federation, parameters)
        source = ReleaseSource(images=train.images, labels=train.labels, public=public)
        sums = MECHANISM.exact_sums(source, parameters, kept["directions"].numpy())
        for row in sums:
            pieces |= set(windows(row.tobytes()))
            pieces |= set(windows((row / parameters.steps).astype(np.float32).tobytes()))
    return pieces


@pytest.mark.slow
def test_nothing_private_is_in_any_byte(recorded: tuple[Federation, bool]) -> None:
    federation, simulated = recorded
    for client in (0, 1):
        things = private_things(federation.nodes[client], federation.run_config)
        things["exact sums"] = exact_sums(federation, client)
        assert len(things["exact sums"]) > 20
        search = Search(things)
        for sent in federation.sent:
            assert search.found(sent.data + bytes(8) + sent.objects) == set(), sent.kind
        piece = sorted(things["exact sums"])[7]
        assert search.found(b"before" + piece + b"after") == {"exact sums"}
    allowed = {**wire.FIT_METRICS, **(wire.RAW_METRICS if simulated else {})}
    for sent in federation.of("train") + federation.of("evaluate"):
        assert set(sent.metrics) <= {*allowed, "num_examples", "loss"}


@pytest.mark.slow
def test_payloads_are_the_stored_sums_and_only_when_asked(
    recorded: tuple[Federation, bool],
) -> None:
    federation, simulated = recorded
    for client in (0, 1):
        local = local_of(federation, client)
        answers = federation.of("train", client)
        assert len(answers) == 5
        for sent, kept in zip(answers, stored(local), strict=True):
            released = wire.decode_release(
                sent.payload, who="it", client_id=client, mechanism="statistics"
            )
            assert isinstance(released, ReleasedStatistics)
            assert released.seeded is simulated
            for name in ("counts", "sums", "directions"):
                assert torch.equal(released.tensors()[name][0], kept[name])
            again = wire.encode_release(released, client_id=client)
            assert [a.tobytes() for a in sent.payload] == [a.tobytes() for a in again]
        for sent in federation.of("evaluate", client):
            assert sent.payload == []


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False], indirect=True, ids=["deployed"])
def test_messages_are_a_function_of_the_sums(
    tmp_path: Path, recorded: tuple[Federation, bool]
) -> None:
    """Same sums, other pictures: every message of the whole run is the same to the bit."""
    first, _ = recorded
    root = tmp_path / "second"
    root.mkdir()
    for client in first.nodes:
        draw_pictures(root / f"hospital-{client}", seed=200 + client)
    second = deployed(root)
    for client in second.nodes:
        was, now = local_of(first, client), local_of(second, client)
        assert now.held.train_labels.tolist() == was.held.train_labels.tolist()
        mine = now.held.images.subset(now.held.train)
        append(read_ledger(now.releases.root / "ledger.jsonl"), "opened", {"client_id": client})
        for number in range(1, 6):
            name = f"{number:06d}.safetensors"
            kept, metadata = read_tensors(was.releases.root / "releases" / name)
            kept["digests"] = torch.from_numpy(mine.image_digests().copy())
            kept["identities"] = torch.from_numpy(mine.image_identities().copy())
            ready = now.releases.root / "releases" / f"{number:06d}.ready"
            write_tensors(ready, kept, metadata)
            now.releases.note("note", {}, client_id=client)  # which records what is ready
    second.run()
    each = (sorted(f.sent, key=lambda sent: sent.client) for f in (first, second))
    for one, other in zip(*each, strict=True):
        assert one.timeless() == other.timeless(), (one.client, one.kind)
    for client in (0, 1):  # the pictures did matter, to what stays
        fine = [local_of(f, client).store.load_state(5, "fine") for f in (first, second)]
        assert any(not torch.equal(fine[0][name], fine[1][name]) for name in fine[0])
