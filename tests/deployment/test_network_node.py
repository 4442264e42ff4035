"""Nodes of a federation that trains a private network: node check, policy, a deployed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpdm import wire
from fedpdm.config import config_from_json
from fedpdm.deployment.invitation import make_invitation
from fedpdm.privacy.mechanism import GradientParameters, ReleasedGradient, StatisticsParameters
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.build import model_sizes
from fedpdm.setup.run_setup import set_up
from tests.support.deployments import Federation, deployment, policy_text
from tests.support.network_runs import ROUNDS, network_sections
from tests.support.participants import Participant, quiet

ALLOWED = "{mechanisms: [network], max_epsilon: 10}"


def invite(node: Participant, policy: str, **sections: Any) -> Any:
    """The run's config; the invitation and the policy are written."""
    config = quiet(node.made, **network_sections(**sections))
    node.invitation.write_text(make_invitation(config))
    node.policy.write_text(policy_text(policy))
    return config


def test_a_node_that_allows_networks_is_told_what_leaves(node: Participant) -> None:
    config = invite(node, ALLOWED)
    code, out, err = node.call("check", "--policy", str(node.policy))
    assert (code, err) == (0, "")
    found = {line.split()[1]: line for line in out.splitlines()[:12]}
    parameters = model_sizes(set_up(config))["coarse"]
    sums = 8 * (2 * 192 + 18_528 + 2 * 1176 + 3 * 2) + 4 * 48 * 192
    size = sums + ROUNDS * (4 * parameters + 8)
    assert f"{size / 1e6:.1f} MB sent, epsilon 10 in all at delta 1e-05" in found["bounds"]
    assert f"gradients of {ROUNDS} rounds, each of a share 0.2 of the images" in found["bounds"]
    assert "class statistics (classes), mu " in found["bounds"]
    assert "WARNING" not in found["bounds"]
    words = " ".join(out.split())
    assert "Every image pays for all rounds, drawn or not." in words
    assert "would be released now: 40." in words
    assert list(node.store.iterdir()) == []


def test_a_node_is_warned_of_rounds_without_images(node: Participant) -> None:
    invite(node, ALLOWED, network={"sample_rate": 0.02})
    _, out, _ = node.call("check", "--policy", str(node.policy))
    (bounds,) = [line for line in out.splitlines() if line.split()[1:2] == ["bounds"]]
    assert "WARNING: 0.02 draws 0.8 of a client's 40 images a round, on average" in bounds


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("{}", "'network' is not one of the mechanisms of this node: images"),
        ("{mechanisms: [statistics]}", "'network' is not one of the mechanisms of this node"),
        ("{mechanisms: [network], max_epsilon: 9}", "an image would spend 10 in all"),
    ],
)
def test_a_policy_pins_the_mechanisms(node: Participant, policy: str, words: str) -> None:
    invite(node, policy)
    found = node.failed("--policy", str(node.policy))
    assert any(words in line for line in found.values()), found


def federation_of(root: Path, policy: str) -> Federation:
    """Two nodes with this policy; image metrics are off."""
    path = root / "policy.yaml"
    path.write_text(policy_text(policy))
    options = {client: {"policy-file": str(path)} for client in (0, 1)}
    made = deployment(root, options=options, **network_sections())
    config = json.loads(made.run_config["resolved-config"])
    config["evaluation"]["image_metrics"] = False
    return Federation(made.nodes, {**made.run_config, "resolved-config": json.dumps(config)})


@pytest.mark.slow
def test_deployed_nodes_send_noised_gradients_and_pay_once(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, ALLOWED)
    federation.run()
    config = config_from_json(federation.run_config["resolved-config"])
    parameters = model_sizes(set_up(config))["coarse"]
    for client in (0, 1):
        answers = federation.of("train", client)
        assert len(answers) == config.run.rounds
        for number, sent in enumerate(answers[-ROUNDS:], 1):
            released = wire.decode_release(
                sent.payload, who="it", client_id=client, mechanism="network"
            )
            assert isinstance(released, ReleasedGradient)
            assert (int(released.round), len(released.total)) == (number, parameters)
            assert not released.seeded
            assert len(sent.data) < 4 * parameters + 2000  # four bytes a parameter
        # One record for all rounds of gradients, after those of the sums.
        store = ReleaseStore(tmp_path / f"vault-{client}")
        kinds = [type(record.parameters) for record in store.ledger().releases()]
        assert kinds == [StatisticsParameters] * 3 + [GradientParameters]
        assert store.spent(delta=1e-5).largest == pytest.approx(10.0, rel=1e-3)
    history = json.loads((tmp_path / "server" / "metrics.json").read_text())
    assert [("gradient_norm" in each) for each in history["rounds"]] == [False] * 3 + [True] * 2
    # Nobody is asked to evaluate with the shared model before the last round.
    down = [each["bytes_down"] for each in history["rounds"]]
    assert down[0] < 1000 < 4 * parameters < down[-1]


def test_a_node_that_allows_statistics_alone_sends_nothing(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, "{mechanisms: [statistics]}")
    sent = federation.ask(0, "train", {"round": 1, "phase": "release"})
    assert sent.reply.has_error()  # and no arrays
    words = "'network' is not one of the mechanisms of this node: statistics"
    assert words in sent.reply.error.reason
    assert not list(Path(tmp_path).rglob("releases/*.safetensors"))
