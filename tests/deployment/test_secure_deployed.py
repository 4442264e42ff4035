"""Secure aggregation between real processes: gRPC with TLS, Flower's state kept by the nodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedpdm import wire
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.summands import largest_error
from tests.support.federations import initial_message, small_config
from tests.support.real_nodes import deployed, real_federation, share_out

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.faults]

SIMULATED = small_config(
    run={"rounds": 1},
    data={"max_images": 120},
    fine={"steps_per_round": 0},
    evaluation={"image_metrics": False},
    aggregation={"secure": True, "max_examples": 100},
)


def test_three_nodes_add_up_what_their_stores_hold(tmp_path: Path) -> None:
    """The coordinator's weights are the mean of the updates that no message has held."""
    with real_federation(tmp_path) as federation:
        parts = share_out(SIMULATED, tmp_path / "data")
        config = deployed(SIMULATED, tmp_path / "data")
        nodes = [federation.node(f"clinic-{k}", k, part) for k, part in enumerate(parts)]
        federation.start()
        for node in nodes:
            node.start()
        run = federation.run(config, tmp_path / "run")
        assert run.code(900.0) == 0, run.output()
        for node in nodes:
            node.kill()
    like = wire.decode_model(initial_message(config))
    updates = []
    for node in nodes:
        (folder,) = node.store.glob("runs/*")
        reply = ClientStore(folder).load_reply(1)
        assert reply is not None
        message = [np.frombuffer(reply.payload or b"", dtype=np.uint8)]
        updates.append(wire.decode_update(message, like=like, round=1, who="it"))
    counts = np.array([update.num_examples for update in updates], dtype=np.float64)
    bound = largest_error(config.aggregation, [update.num_examples for update in updates]) + 1e-6
    checkpoint = RunDirectory(tmp_path / "run").load_checkpoint()
    assert checkpoint is not None
    for name, start in like.items():
        rows = np.stack([update.weights[name].double().numpy() for update in updates])
        wanted = np.tensordot(counts / counts.sum(), rows, axes=1)
        got = checkpoint[1][f"weights.{name}"].double().numpy()
        assert np.abs(got - wanted).max(initial=0.0) <= bound, name
        assert start.shape == got.shape
    (record,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["rounds"]
    size = sum(8 * tensor.numel() for tensor in like.values())
    assert 3 * size < record["bytes_up"] < 3.1 * size
