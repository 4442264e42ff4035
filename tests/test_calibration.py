"""Calibration against the published table, brute force and a simulated adversary."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedpdm.calibration import calibrate
from fedpdm.cli import main
from fedpdm.schedule import make_schedule

LINEAR = make_schedule("linear")


def test_third_value_for_the_papers_setting() -> None:
    exact = calibrate(LINEAR, epsilon=10, clip_norm=10, delta=1e-5)
    paper = calibrate(LINEAR, epsilon=10, clip_norm=10, delta=1e-5, accounting="paper")
    assert (exact.t0, paper.t0) == (675, 693)
    at_690 = calibrate(LINEAR, t0=690, clip_norm=10, delta=1e-5)
    assert at_690.epsilon == pytest.approx(8.77, abs=5e-3)
    assert at_690.linkage_auc == pytest.approx(0.898, abs=5e-4)
    assert [at_690.group_epsilon[k] for k in (1, 2, 10)] == pytest.approx(
        [8.77, 13.49, 39.66], abs=5e-3
    )
    bound = calibrate(LINEAR, t0=690, clip_norm=10, delta=1e-5, accounting="paper")
    assert bound.epsilon == pytest.approx(10.24, abs=5e-3)


@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_answers_are_the_best_that_keep_to_epsilon(accounting: str) -> None:
    answer = calibrate(LINEAR, epsilon=3, clip_norm=10, delta=1e-5, accounting=accounting)
    one_less = calibrate(LINEAR, t0=answer.t0 - 1, clip_norm=10, delta=1e-5, accounting=accounting)
    assert answer.epsilon <= 3 < one_less.epsilon
    largest = calibrate(LINEAR, epsilon=3, t0=answer.t0, delta=1e-5, accounting=accounting)
    assert largest.clip_norm >= 10
    assert largest.epsilon == pytest.approx(3, rel=1e-6)


def test_linkage_against_a_simulated_adversary() -> None:
    """Two images at distance 2 C, one pixel each: the likelihood ratio is the released value."""
    setting = calibrate(LINEAR, t0=690, clip_norm=10, delta=1e-5)
    rng, count = np.random.default_rng(0), 100_000
    members = 10.0 + setting.sigma * rng.standard_normal(count)
    others = -10.0 + setting.sigma * rng.standard_normal(count)
    order = np.argsort(np.concatenate([members, others]))
    ranks = np.empty(2 * count)
    ranks[order] = np.arange(1, 2 * count + 1)
    auc = (ranks[:count].sum() - count * (count + 1) / 2) / count**2
    tpr = float(np.mean(members > np.quantile(others, 0.99)))
    assert auc == pytest.approx(setting.linkage_auc, abs=4 * math.sqrt(0.1 / count))
    assert tpr == pytest.approx(setting.linkage_tpr, abs=0.015)
    halved = calibrate(LINEAR, t0=690, clip_norm=20, delta=1e-5)  # planted: half the noise
    assert abs(auc - halved.linkage_auc) > 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 1.0}, "exactly two of epsilon, t0 and clip_norm, got epsilon"),
        ({"epsilon": 1.0, "t0": 5, "clip_norm": 1.0}, "exactly two"),
        ({"t0": 1001, "clip_norm": 1.0}, r"t0 must be in \[1, 1000\], got 1001"),
        ({"epsilon": -1.0, "clip_norm": 1.0}, "epsilon must be positive and finite, got -1"),
        ({"epsilon": 0.001, "clip_norm": 10.0}, "cannot be reached"),
        ({"t0": 10, "clip_norm": 0.0}, "clip_norm must be positive and finite, got 0"),
    ],
)
def test_bad_input(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(LINEAR, delta=1e-5, **given)  # type: ignore[arg-type]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["privacy", "--epsilon", "10", "--delta", "1e-5", "--clip-norm", "10"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["exact"]["t0"], answer["paper"]["t0"]) == (675, 693)
    assert main(arguments) == 0
    assert "675" in capsys.readouterr().out
    assert main(["privacy", "--epsilon", "10"]) == 2
    assert "exactly two" in capsys.readouterr().err
