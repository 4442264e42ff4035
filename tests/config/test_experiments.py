"""Every experiment file loads, resolves and passes all checks that a real run makes first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpdm.config import config_reference, load_config
from fedpdm.config.reading import read_mapping
from fedpdm.engines.preflight import check_run

FOLDER = Path(__file__).parents[2] / "experiments"
EXPERIMENTS = [  # of single runs: suites have a test_suites, and the toy a test_toy_command
    path
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.stem != "gmm" and "profiles" not in read_mapping(path)
]


def test_there_are_experiments() -> None:
    assert {path.stem for path in EXPERIMENTS} >= {
        "digits",
        "cifar10-smoke",
        "colored-mnist-smoke",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_dry_run(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    if config.data.name != "digits" and not os.environ.get("FEDPDM_DATA"):
        pytest.skip(f"{config.data.name} needs FEDPDM_DATA, which is not set")
    lines = check_run(config, tmp_path / "out", resume=False)
    assert config.name in lines[0]
    spent = float(lines[1].split("epsilon ")[1].split()[0])
    assert config.privacy.epsilon is not None
    assert 0.9 * config.privacy.epsilon < spent <= config.privacy.epsilon
    assert not (tmp_path / "out").exists()


def test_the_documentation_has_the_configuration_reference() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
    assert config_reference() in page.read_text()
