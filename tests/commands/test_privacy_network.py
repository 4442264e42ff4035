"""`fedpdm privacy --network`: the noise that it prints keeps to the budget; what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fedpdm.privacy.accountant import epsilon_spent, multiplier_for
from fedpdm.privacy.types import GaussianEvent, SubsampledGaussianEvent
from tests.commands.test_privacy_command import Asker
from tests.support.cases import every
from tests.support.command_line import forget_surroundings
from tests.support.federations import small_config

NETWORK = ("--network", "--epsilon", 10)
ONE = (*NETWORK, "--rates", "0.2", "--rounds", "500", "--shares", "0.3")


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    forget_surroundings(monkeypatch, tmp_path)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Asker:
    return Asker(capsys)


def spent(row: Any, *, epsilon: float, delta: float, noise: float | None = None) -> float:
    """Epsilon of a row of the answer, with the statistics that keep its share."""
    rounds = SubsampledGaussianEvent(
        noise_multiplier=noise or row["noise_multiplier"],
        sample_rate=row["sample_rate"],
        rounds=row["rounds"],
    )
    least = multiplier_for(epsilon=epsilon, delta=delta)
    share = row["share"]
    beside = [GaussianEvent(noise_multiplier=least / math.sqrt(share))] if share else []
    return epsilon_spent([*beside, rounds], delta=delta)


@pytest.mark.slow
def test_the_noise_keeps_to_the_budget_beside_statistics(ask: Asker) -> None:
    shape = ("--images", 9738, "--clients", 4, "--parameters", 1_590_000)
    table = ("--rates", "0.05,0.2", "--rounds", "60", "--shares", "0,0.6")
    answer = ask.json(*NETWORK, *table, *shape)["network"]
    assert [answer[key] for key in ("epsilon", "delta", "clients", "images")] == [10, 1e-5, 4, 9738]
    cells = [(row["sample_rate"], row["rounds"], row["share"]) for row in answer["rows"]]
    assert cells == [(0.05, 60, 0.0), (0.05, 60, 0.6), (0.2, 60, 0.0), (0.2, 60, 0.6)]
    for row in answer["rows"]:
        assert 9.99 < spent(row, epsilon=10.0, delta=1e-5) <= 10.0
        assert row["passes"] == row["sample_rate"] * row["rounds"]
        per_step = row["noise_multiplier"] * math.sqrt(4 * 1_590_000)
        assert row["noise_per_step"] * row["sample_rate"] * 4 * 9738 == pytest.approx(per_step)
    lines = ask.text(*NETWORK, *table, *shape).splitlines()
    assert any(
        re.fullmatch(r"  by the statistics' share of mu\^2 +0% +60%", line) for line in lines
    )
    (first, second) = (line.split() for line in lines if line.startswith("  q 0.2, 60 rounds"))
    assert first[4:6] == ["12", "passes"]
    for printed, row in zip(first[-2:], answer["rows"][2:], strict=True):  # rounded up
        assert spent(row, epsilon=10.0, delta=1e-5, noise=float(printed)) <= 10.0
    assert float(second[-1]) == pytest.approx(answer["rows"][3]["noise_per_step"], rel=1e-3)


def test_without_images_there_is_one_table(ask: Asker) -> None:
    told = ask.text(*ONE)
    assert "epsilon 10 at delta 1e-05, one image replaced by another of its label" in told
    assert len(re.findall(r"^  q 0\.2, 500 rounds: 100 passes +5\.3298$", told, re.MULTILINE)) == 1
    assert "mean gradient" not in told
    row = ask.json(*ONE)["network"]["rows"][0]
    assert set(row) == {"sample_rate", "rounds", "share", "passes", "noise_multiplier"}


def test_an_experiment_says_what_is_not_given(ask: Asker, tmp_path: Any) -> None:
    from fedpdm.config import config_to_yaml

    config = small_config(
        privacy={"epsilon": 3.0, "delta": 1e-4}, partition={"num_clients": 3, "majority_ratio": 2}
    )
    (tmp_path / "mine.yaml").write_text(config_to_yaml(config))
    given = ("--network", "--config", tmp_path / "mine.yaml", *ONE[3:])
    network = ask.json(*given)["network"]
    assert [network[key] for key in ("epsilon", "delta", "clients")] == [3.0, 1e-4, 3]
    assert 2.99 < spent(network["rows"][0], epsilon=3.0, delta=1e-4) <= 3.0
    network = ask.json(*given, "--epsilon", 9, "--delta", 1e-6, "--clients", 2)["network"]
    assert [network[key] for key in ("epsilon", "delta", "clients")] == [9.0, 1e-6, 2]


REFUSED = [
    (("--network",), "--network: give --epsilon, or --config with privacy.epsilon"),
    ((*NETWORK, "--t0", 5), "--t0: not with --network"),
    ((*NETWORK, "--clip-norm", 5), "--clip-norm: not with --network"),
    ((*NETWORK, "--public-sample", "digits"), "--public-sample: not with --network"),
    ((*NETWORK, "--releases", 2), "--releases: not with --network"),
    ((*NETWORK, "--rates", "0"), "sample_rate must be in (0, 1], got 0.0"),
    ((*NETWORK, "--rates", "nan"), "sample_rate must be in (0, 1], got nan"),
    ((*NETWORK, "--rates", "a"), "--rates: must be numbers separated by commas, got 'a'"),
    ((*NETWORK, "--rounds", "0"), "rounds must be at least 1, got 0"),
    ((*NETWORK, "--rounds", "1.5"), "--rounds: must be whole numbers separated by commas"),
    ((*NETWORK, "--shares", "1"), "share must be in [0, 1), got 1.0"),
    ((*NETWORK, "--shares", "-0.1"), "share must be in [0, 1), got -0.1"),
    ((*NETWORK, "--delta", 1e-14), "delta must be at least"),
    ((*NETWORK, "--delta", 1), "delta must be in (0, 1), got 1.0"),
    (("--network", "--epsilon", "inf"), "epsilon must be positive and finite, got inf"),
    ((*NETWORK, "--clients", 0), "--clients: must be at least 1, got 0"),
    ((*NETWORK, "--images", 9, "--parameters", 0), "--parameters: must be at least 1, got 0"),
    ((*NETWORK, "--parameters", 9), "--parameters: needs --images, those of a client"),
    ((*NETWORK, "--config", "no.yaml"), "no.yaml: cannot be read: No such file or directory"),
    ((*NETWORK, "--rates", ",".join(["0.1"] * 40)), "240 values to find, at most 100"),
    (("--epsilon", 10, "--clip-norm", 9, "--rates", "0.1"), "--rates: needs --network"),
    (("--epsilon", 10, "--clip-norm", 9, "--parameters", 7), "--parameters: needs --network"),
]


@every("arguments, message", REFUSED)
def test_bad_input(arguments: tuple[Any, ...], message: str, ask: Asker) -> None:
    assert message in ask.refusal(*arguments)


def test_delta_above_one_image_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.command_line import call

    assert call("privacy", *ONE, "--images", 200_000) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("WARNING: --delta: delta 1e-05 is above 1 / 200,000 images")
    assert "  q 0.2, 500 rounds" in printed.out
