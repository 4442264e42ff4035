"""A coordinator that means harm, against a deployed client: one line, and nothing is released.

That raw metrics, simulations, other phases and other messages get nothing is in
`test_deployed_client`; what a node's own bounds refuse is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common import FitIns, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat as compat
from flwr.supercore.task_identity import TaskIdentity

from fedpdm import wire
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.flower_config import run_config_of
from tests.deployment.test_deployed_client import FIRST, with_config
from tests.support.deployments import Federation, Sent, deployment
from tests.support.federations import initial_message

PHASES = ("coarse", "release")


def releases(federation: Federation) -> int:
    """Images that client 0 has noised, by its ledger."""
    root = Path(federation.nodes[0]["store-dir"])
    if not root.exists():
        return 0
    return sum(record.images for record in ReleaseStore(root).ledger().releases())


def refused(sent: Sent) -> str:
    """The one line that a coordinator got instead of anything else."""
    if sent.reply.has_error():
        line = sent.reply.error.reason
    else:
        assert sent.payload == []
        assert sent.metrics.keys() == {"client_id", "error"}
        line = sent.metrics["error"]
    assert line
    assert "\n" not in line
    assert len(line) < 400
    return str(line)


def post(federation: Federation, message: wire.Message, **config: Any) -> Sent:
    """What client 0 answers to a request for training with this message."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
    ins = FitIns(ndarrays_to_parameters(message), {"round": 1, "phase": "coarse", **config})
    content = compat.fitins_to_recorddict(ins, keep_input=True)
    federation.send_and_receive([Message(content, dst_node_id=1, message_type="train")])
    return federation.sent[-1]


def model(federation: Federation) -> dict[str, torch.Tensor]:
    return wire.decode_model(initial_message(run_config_of(federation.run_config)))


# --- The release ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "privacy",
    [
        {"t0": 0, "epsilon": None},
        {"t0": -5, "epsilon": None},
        {"t0": 10**6, "epsilon": None},
        {"t0": None, "epsilon": None},
        {"t0": 500, "epsilon": 1.0},
        {"epsilon": 1e9},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"clip_norm": 1e30},
        {"clip_norm": 0.0},
        {"delta": 1.0},
        {"accounting": "none"},
    ],
    ids=str,
)
def test_a_release_that_is_none_is_refused(
    tmp_path: Path, phase: str, privacy: Mapping[str, Any]
) -> None:
    federation = with_config(deployment(tmp_path), privacy=privacy)
    line = refused(post(federation, [np.zeros(4, np.uint8)], phase=phase))
    assert "failed; client 0 shows the details to its owner alone" in line
    assert releases(federation) == 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "sections",
    [
        {"privacy": {"epsilon": 3.0}},
        {"privacy": {"epsilon": 100.0}},
        {"privacy": {"clip_norm": 4.0}},
        {"privacy": {"clip_norm": 80.0}},
        {"privacy": {"shift": 0.5}},
        {"privacy": {"epsilon": None, "t0": 1}},
        {"schedule": {"kind": "cosine"}},
        {"schedule": {"num_steps": 500}},
    ],
    ids=str,
)
def test_a_second_release_is_refused(
    tmp_path: Path, phase: str, sections: Mapping[str, Any]
) -> None:
    """Images that have left once are not noised again, whatever the next run asks for."""
    first = deployment(tmp_path)
    assert first.ask(0, "train", FIRST).payload
    once = releases(first)
    store = Path(first.nodes[0]["store-dir"])
    ledger = (store / "ledger.jsonl").read_bytes()
    assert once == 40
    second = with_config(first, **sections)
    wish = {"round": 2, "phase": phase, "allow-new-release": True, "allow_new_release": True}
    second.run_config |= {"allow-new-release": True}
    line = refused(second.ask(0, "train", wish))
    assert line == "failed; client 0 shows the details to its owner alone"
    assert (store / "ledger.jsonl").read_bytes() == ledger
    assert first.ask(0, "train", FIRST).metrics["replayed"] is True  # the first run still may


@pytest.mark.slow
def test_the_same_release_is_sent_again_not_drawn_again(tmp_path: Path) -> None:
    federation = deployment(tmp_path)
    rows = []
    for round in (1, 2, 3):
        sent = federation.ask(0, "train", {"round": round, "phase": "release"})
        rows.append(wire.decode_release(sent.payload, who="it", client_id=0).x_tilde)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert releases(federation) == 40


@pytest.mark.slow
def test_a_policy_of_one_release_does_not_need_the_coordinators_word(tmp_path: Path) -> None:
    """`allow-new-release` counts in the node's own config alone."""
    federation = deployment(tmp_path)
    federation.run_config |= {"allow-new-release": True}
    federation.ask(0, "train", FIRST)
    changed = with_config(federation, privacy={"epsilon": 5.0})
    refused(changed.ask(0, "train", {"round": 2, "phase": "coarse"}))
    own = Federation(
        {k: {**n, "allow-new-release": True} for k, n in changed.nodes.items()}, changed.run_config
    )
    assert own.ask(0, "train", {"round": 2, "phase": "coarse"}).payload
    assert releases(own) == 80


# --- Weights --------------------------------------------------------------------------------

BAD_WEIGHTS = {
    "shape": lambda named: {n: torch.zeros(*t.shape, 2) for n, t in named.items()},
    "missing": lambda named: dict(list(named.items())[1:]),
    "extra": lambda named: {**named, "backdoor.weight": torch.zeros(3)},
    "fine model": lambda named: {f"fine.{n}": t for n, t in named.items()},
    "float64": lambda named: {n: t.double() for n, t in named.items()},
    "nothing": lambda _: {},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_other_weights_are_refused_before_anything_is_released(tmp_path: Path, what: str) -> None:
    federation = deployment(tmp_path)
    message = wire.encode_model(BAD_WEIGHTS[what](model(federation)))
    assert "client 0" in refused(post(federation, message))
    assert releases(federation) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_poisoned_weights_give_no_update(tmp_path: Path, value: float) -> None:
    federation = deployment(tmp_path)
    message = wire.encode_model(
        {n: torch.full_like(t, value) for n, t in model(federation).items()}
    )
    line = refused(post(federation, message))
    assert line.startswith("coarse model from the server: class_embedding.weight has values ")
    assert releases(federation) == 0


@pytest.mark.parametrize(
    "message",
    [
        [],
        [np.zeros(0, np.uint8)],
        [np.zeros(10, np.float32)],
        [np.frombuffer((10**10).to_bytes(8, "little") + bytes(64), np.uint8)],
        [np.zeros(8, np.uint8)] * 3,
    ],
    ids=["nothing", "empty", "floats", "claims 10 GB", "three"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, message: wire.Message) -> None:
    federation = deployment(tmp_path)
    line = refused(post(federation, message))
    assert "from the server" in line
    assert releases(federation) == 0


@pytest.mark.slow
@pytest.mark.parametrize("round", [0, -1, 2**62, "one", 1.5, b"\0", True])
def test_rounds_that_are_none_get_nothing(tmp_path: Path, round: Any) -> None:
    federation = deployment(tmp_path)
    sent = federation.ask(0, "train", {"round": round, "phase": "coarse"})
    if round in (True, 1.5):  # taken as round 1
        assert sent.payload
    else:
        refused(sent)
