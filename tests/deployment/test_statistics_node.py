"""`fedpdm node check` of a federation of class statistics: policy, size of messages, statement."""

from __future__ import annotations

from typing import Any

import pytest

from fedpdm.deployment.invitation import make_invitation
from tests.support.deployments import policy_text
from tests.support.participants import Participant, quiet

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": 3},
    "coarse": {"training": "server"},
    "privacy": {"release": "statistics", "clip_norm": 6.0, "epsilon": 10.0},
}


@pytest.fixture
def invited(node: Participant) -> Participant:
    node.invitation.write_text(make_invitation(quiet(node.made, **SECTIONS)))
    return node


def test_a_node_that_allows_statistics_is_told_what_leaves(invited: Participant) -> None:
    invited.policy.write_text(policy_text("{mechanisms: [statistics], max_epsilon: 10}"))
    code, out, err = invited.call("check", "--policy", str(invited.policy))
    assert (code, err) == (0, "")
    found = {line.split()[1]: line for line in out.splitlines()[:12]}
    # 192 numbers: means of 2 classes, 18,528 of all, 1,176 each of 2 classes and 48 directions.
    size = 8 * (2 * 192 + 18_528 + 2 * 1176 + 3 * 2) + 4 * 48 * 192
    assert f"{size / 1e6:.1f} MB sent, epsilon 10 in all at delta 1e-05" in found["bounds"]
    for stage in ("means", "pooled", "classes"):
        assert f"class statistics ({stage}), mu " in found["bounds"]
    assert "mechanisms statistics" in found["policy"]
    words = " ".join(out.split())
    assert "No image is sent by itself." in words
    assert "An image is hidden among all possible ones of its class." in words
    assert "Then such a table is sent for each class, of 48 features" in words
    assert "would be released now: 40." in words
    assert list(invited.store.iterdir()) == []


def test_a_node_is_told_of_components(node: Participant) -> None:
    sections = {**SECTIONS, "run": {"rounds": 5}}
    more = {"statistics": {"components": 4, "component_rounds": 2}}
    node.invitation.write_text(make_invitation(quiet(node.made, **sections, **more)))
    node.policy.write_text(policy_text("{mechanisms: [statistics], max_epsilon: 10}"))
    code, out, err = node.call("check", "--policy", str(node.policy))
    assert (code, err) == (0, "")
    found = {line.split()[1]: line for line in out.splitlines()[:12]}
    size = 8 * (2 * 192 + 18_528 + 2 * 1176 + 3 * 2) + 4 * 48 * 192
    size += 2 * (8 * (2 * 4 * 49 + 2) + 4 * 48 * 192)
    assert f"{size / 1e6:.1f} MB sent, epsilon 10 in all at delta 1e-05" in found["bounds"]
    assert "class statistics (components-2 of 4), mu " in found["bounds"]
    assert "are divided into 4 groups of similar ones" in " ".join(out.split())


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (None, "'statistics' is not one of the mechanisms of this node: images"),
        ("{mechanisms: [images]}", "'statistics' is not one of the mechanisms of this node"),
        ("{mechanisms: [statistics], max_epsilon: 9}", "an image would spend 10 in all"),
        ("{mechanisms: [sums]}", "mechanisms: privacy.release: must be one of images"),
    ],
)
def test_a_policy_pins_the_mechanisms(invited: Participant, policy: str | None, words: str) -> None:
    more: tuple[str, ...] = ()
    if policy is not None:
        invited.policy.write_text(policy_text(policy))
        more = ("--policy", str(invited.policy))
    found = invited.failed(*more)
    assert any(words in line for line in found.values()), found
