"""Invitations: not of a simulation, and of nothing that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpdm.config import ConfigError
from fedpdm.deployment.invitation import make_invitation, read_invitation
from tests.support.federations import small_config


def test_a_simulation_invites_nobody() -> None:
    with pytest.raises(ConfigError, match=r"^run\.simulation: must be false"):
        make_invitation(small_config())


@pytest.mark.parametrize("text", ['{"format": ', "{'format': 1}", '{"a": 1, "a": 2}'])
def test_what_cannot_be_read_names_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "federation.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"federation\.json: ") as caught:
        read_invitation(path)
    assert "\n" not in str(caught.value)


def test_a_config_in_json_is_one_like_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text('{"name": "mine", "run": {"rounds": 7}}')
    found = read_invitation(path)
    assert (found.config.name, found.config.run.rounds, found.made_at) == ("mine", 7, None)
