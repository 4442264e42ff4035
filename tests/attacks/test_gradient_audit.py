"""An audit of noised gradients: as good as theory says, and planted faults are seen by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.attacks import draw_game
from fedpdm.attacks.auditing import AuditReport
from fedpdm.attacks.gradient_auditing import audit_gradients, canary_gradients
from fedpdm.cli import main
from fedpdm.privacy.mechanism import SeededNoise, noised_round
from tests.support.cases import every
from tests.support.gradient_toys import HalfNoise, parameters

COUNT, SIZE = 600, 4000
PLAN = parameters(noise_multiplier=0.9, sample_rate=0.3, rounds=12)
GAME = draw_game(COUNT, shape=(1, 6, 6), rng=np.random.default_rng(8))


def batch(rng: np.random.Generator, rate: float = PLAN.sample_rate) -> np.ndarray:
    return np.flatnonzero(rng.random(COUNT) < rate)


def audited(plan: Any = PLAN, *, fault: str = "", twice: bool = False) -> AuditReport:
    """The audit of a client by itself: rows, sums and noise are the mechanism's, chance is not."""
    rows = canary_gradients(GAME, plan, size=SIZE)
    uploads = []
    for number in range(1, plan.rounds + 1):
        rng = np.random.default_rng((0 if fault == "one sample" else number, 5))
        drawn = batch(rng)
        if fault == "fixed size":
            drawn = np.sort(rng.choice(COUNT, round(0.3 * COUNT), replace=False))
        if fault == "drawn twice":
            drawn = rng.choice(COUNT, round(0.3 * COUNT), replace=True)
        if fault == "all drawn":
            drawn = np.arange(COUNT)
        kind = HalfNoise if fault == "half the noise" else SeededNoise
        seed = 1 if fault == "same noise" else number
        made = noised_round(
            rows(torch.from_numpy(drawn)), plan, number=number, size=SIZE,
            noise=kind(np.random.SeedSequence(seed)),
        )  # fmt: skip
        if fault == "no clipping":
            more = torch.zeros(SIZE, dtype=torch.int32)
            more[drawn] = torch.from_numpy(np.where(GAME.secret, -1, 1)[drawn] * 5000).int()
            made = dataclasses.replace(made, total=made.total + more)
        uploads += [made, made]
        if fault == "noised again":
            other = SeededNoise(np.random.SeedSequence(1000 + number))
            again = rows(torch.from_numpy(drawn))
            uploads.append(noised_round(again, plan, number=number, size=SIZE, noise=other))
    known = [SeededNoise(np.random.SeedSequence(1))] if twice else []
    return audit_gradients(GAME, uploads, delta=1e-5, recorded=1, suspects=known)


def failed(report: AuditReport) -> set[str]:
    return {finding.name for finding in report.findings if not finding.passed}


def test_the_best_attack_is_as_good_as_theory_says() -> None:
    report = audited()
    assert failed(report) == set()
    assert report.passed
    spread = (report.expected_accuracy * (1 - report.expected_accuracy) / COUNT) ** 0.5
    assert abs(report.accuracy - report.expected_accuracy) < 4 * spread
    assert report.expected_accuracy > 0.75
    assert 0.0 < report.epsilon_steinke < report.claimed_epsilon == report.implied_epsilon
    assert (report.num_uploads, report.num_distinct, report.recorded) == (24, 1, 1)


def test_its_theory_is_that_of_a_gaussian_where_all_are_drawn() -> None:
    """T rounds of mu = 2 / s each: a share of Phi(mu / 2) is right."""
    plan = parameters(noise_multiplier=4.0, sample_rate=1.0, rounds=9)
    report = audited(plan, fault="all drawn")
    assert failed(report) == set()
    assert report.reached_mu == pytest.approx(1.5, rel=2e-3)
    assert report.expected_accuracy == pytest.approx(0.77337, abs=1e-3)


@every(
    "fault, names",
    [
        ("no clipping", {"signal"}),
        ("half the noise", {"noise energy", "power"}),
        ("same noise", {"noise reused"}),
        ("one sample", {"draws of an image"}),
        ("drawn twice", {"each draw"}),
        ("all drawn", {"signal", "power"}),
        ("noised again", {"ledger"}),
    ],
)
def test_faults_are_seen(fault: str, names: set[str]) -> None:
    quiet = parameters(noise_multiplier=0.3, sample_rate=0.3, rounds=12)
    report = audited(quiet if fault == "drawn twice" else PLAN, fault=fault)
    assert names <= failed(report), failed(report)
    assert not report.passed


def test_samples_of_fixed_size_are_seen_where_noise_is_little() -> None:
    plan = parameters(noise_multiplier=0.05, sample_rate=0.3, rounds=12)
    assert failed(audited(plan)) <= {"guesses"}
    assert "samples" in failed(audited(plan, fault="fixed size"))


def test_a_seed_that_somebody_knows_is_seen() -> None:
    assert any("known" in name or "seed" in name for name in failed(audited(twice=True)))


def test_what_cannot_be_audited_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^canaries must be in \[1, 250\] for 500 weights, got 60"
    ):
        canary_gradients(GAME, PLAN, size=500)
    with pytest.raises(ValueError, match=r"^uploads must be of one plan, and at least one"):
        audit_gradients(GAME, [], delta=1e-5, recorded=1)


@pytest.mark.slow
def test_the_command_audits_a_clients_own_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["attack", "audit", "--release", "network", "--canaries", "150", "--rounds", "4",
             "--sample-rate", "0.3", "--seed", "2", "--out", str(tmp_path)]  # fmt: skip
    assert main(given) == 0
    assert "the release keeps to what its ledger says" in capsys.readouterr().out
    facts = json.loads((tmp_path / "audit.json").read_text())
    assert facts["passed"]
    assert (facts["rounds"], facts["num_uploads"], facts["num_distinct"]) == (4, 8, 1)
    assert main(["attack", "linkage", "--release", "network"]) == 2
    assert "--release: network is for fedpdm attack audit" in capsys.readouterr().err
    assert main([*given, "--seeded", "3", "--known-seed", "3"]) == 1
