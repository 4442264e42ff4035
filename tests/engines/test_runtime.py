"""What Flower's flat run configuration means, for server and clients alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpdm.config import ConfigError, config_to_json, load_config
from fedpdm.setup.flower_config import experiments_root, is_resumed, run_config_of, run_root
from tests.support.federations import small_config


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flower's processes work in a directory that has nothing to do with the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDPDM_RUNS", raising=False)


def test_bundled_experiments_are_found_from_anywhere() -> None:
    assert (experiments_root() / "digits.yaml").is_file()


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "experiments/digits.yaml"])
def test_an_experiment_by_name(name: str) -> None:
    assert run_config_of({"experiment": name}) == load_config(experiments_root() / "digits.yaml")


def test_digits_is_what_runs_by_default() -> None:
    assert run_config_of({}) == run_config_of({"experiment": "digits"})
    assert run_config_of({"resolved-config": "", "set": "", "run-dir": ""}) == run_config_of({})


def test_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {rounds: 4}")
    config = run_config_of({"experiment": str(tmp_path / "mine.yaml")})
    assert config.name == "mine"
    assert config.run.rounds == 4


def test_overrides_are_separated_by_blanks_and_may_be_quoted() -> None:
    flat = {"set": "privacy.epsilon=3  run.rounds=2 'sampling.scheduler=ddpm'"}
    config = run_config_of(flat)
    assert config.privacy.epsilon == 3.0
    assert config.run.rounds == 2
    assert config.sampling.scheduler == "ddpm"
    assert config.run.seed == run_config_of({}).run.seed


def test_the_resolved_config_wins_over_everything_else() -> None:
    config = small_config()
    flat = {"resolved-config": config_to_json(config), "experiment": "digits", "set": "run.seed=77"}
    assert run_config_of(flat) == config


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"experiment": "digit"}, r"experiment: 'digit' not found; there are .*digits"),
        ({"experiment": ""}, r"experiment: '' not found; there are .*digits"),
        ({"experiment": "experiments"}, "experiment: 'experiments' not found"),
        ({"experiment": "/nowhere/x.yaml"}, "experiment: '/nowhere/x.yaml' not found"),
        ({"set": "privacy.epsilon"}, "must have the form section.key=value"),
        ({"set": "privacy.epsilon='3"}, "set: No closing quotation"),
        ({"set": "privacy.eps=3"}, "privacy.eps: unknown key"),
        ({"resolved-config": "{"}, "config: not valid JSON"),
        ({"resolved-config": '{"run": {"round": 3}}'}, "run.round: unknown key"),
        ({"num-clients": "two"}, "num-clients: must be a whole number, got 'two'"),
    ],
)
def test_what_cannot_be_run_is_named(flat: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config_of(flat)


@pytest.mark.parametrize(("chosen", "count"), [(0, 4), (6, 6)])
def test_number_of_clients_follows_the_federation(chosen: int, count: int) -> None:
    assert run_config_of({"num-clients": chosen}).partition.num_clients == count
    both = {"num-clients": chosen, "set": "partition.num_clients=3"}
    assert run_config_of(both).partition.num_clients == 3  # said by hand


def test_run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = small_config()
    assert run_root({"run-dir": "/data/eps3"}, config, 9) == Path("/data/eps3")
    assert run_root({"run-dir": "eps3"}, config, 9) == tmp_path / "eps3"
    assert run_root({"run-dir": "~/eps3"}, config, 9) == Path.home() / "eps3"
    assert run_root({"run-dir": ""}, config, 9) == tmp_path / "runs" / "small-9"
    assert run_root({}, config, 10) == tmp_path / "runs" / "small-10"
    monkeypatch.setenv("FEDPDM_RUNS", str(tmp_path / "disk"))
    assert run_root({}, config, 9) == tmp_path / "disk" / "small-9"


def test_looking_up_a_run_directory_makes_none(tmp_path: Path) -> None:
    run_root({}, small_config(), 1)
    assert list(tmp_path.iterdir()) == []


def test_resumed_only_if_asked_for() -> None:
    assert is_resumed({}) is False
    assert is_resumed({"resume": False}) is False
    assert is_resumed({"resume": True}) is True


@pytest.mark.parametrize("text", ["false", "true", 1])
def test_resume_must_be_true_or_false(text: Any) -> None:
    """`flwr run -c 'resume="false"'` passes text, and text is true."""
    with pytest.raises(ConfigError, match="resume: must be true or false, got"):
        is_resumed({"resume": text})
