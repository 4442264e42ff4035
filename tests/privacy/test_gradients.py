"""Noised gradients: what they cost, how far an image moves a sum, and that faults are seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.config import ConfigError, config_digest, config_from_mapping
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.mechanism import (
    StatisticsParameters,
    event_of,
    gradients,
    largest_total,
    noised_round,
)
from fedpdm.privacy.noise import GRID, LARGEST
from fedpdm.privacy.types import Parameters
from fedpdm.setup.run_setup import check_rounds
from tests.privacy.test_subsampled import both, density
from tests.support.gradient_toys import (
    MECHANISM,
    QUIET,
    message,
    network_config,
    parameters,
    plan_of,
)
from tests.support.release_toys import DELTA, epsilon_of

# --- What a plan costs -------------------------------------------------------------------------


def mus(rounds: tuple[Parameters, ...]) -> list[float]:
    return [each.mu for each in rounds if isinstance(each, StatisticsParameters)]


@pytest.mark.parametrize(("epsilon", "share"), [(10.0, 0.7), (1.0, 0.25)])
def test_without_sampling_a_plan_is_gaussian_mechanisms(epsilon: float, share: float) -> None:
    """Each of T rounds has mu = 2 C / sigma, whatever else an accountant says."""
    section = {"rounds": 3, "sample_rate": 1.0, "share": share}
    plan, last = plan_of(network_config(network=section, privacy={"epsilon": epsilon}))
    rounds = 3 * (2.0 / last.noise_multiplier) ** 2
    sums = sum(mu**2 for mu in mus(plan.rounds))
    exact = epsilon_of([1.0 / math.sqrt(sums + rounds)])
    assert 0.999 * epsilon <= exact <= plan.epsilon_exact <= epsilon
    assert rounds / (rounds + sums) == pytest.approx(share, rel=1e-3)


def test_one_round_of_a_sample_and_three_of_sums_are_an_integral() -> None:
    config = network_config(run={"rounds": 4}, network={"rounds": 1, "share": 0.5})
    plan, last = plan_of(config)
    mu, s = math.hypot(*mus(plan.rounds)), last.noise_multiplier

    def gaussian(x: Any, sign: float) -> Any:
        return np.exp(-((x - sign * mu / 2.0) ** 2) / 2.0) / math.sqrt(2.0 * math.pi)

    def of_sample(x: Any, sign: float) -> Any:
        return density(x, s, 0.3, sign)

    assert both(plan.epsilon_exact, gaussian, of_sample, 9.0) == pytest.approx(DELTA, rel=2e-2)
    assert 9.99 < plan.epsilon_exact <= 10.0
    wrong = dataclasses.replace(last, noise_multiplier=s / 2.0)  # planted: half the noise
    assert epsilon_spent([*map(event_of, (*plan.rounds[:-1], wrong))], delta=DELTA) > 13.0


def test_more_rounds_or_images_cost_more_noise() -> None:
    def noise_of(**section: Any) -> float:
        config = network_config(run={"rounds": 103}, network={"draws": 1, **section})
        plan, last = plan_of(config)
        assert 9.99 < plan.epsilon_exact <= 10.0
        assert (last.rounds, last.sample_rate) == (section["rounds"], section["sample_rate"])
        return last.noise_multiplier

    one = noise_of(rounds=10, sample_rate=0.05)
    assert one < noise_of(rounds=100, sample_rate=0.05) < noise_of(rounds=100, sample_rate=0.3)
    assert one < noise_of(rounds=10, sample_rate=0.05, share=0.2)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"epsilon": None, "t0": 600}}, r"^privacy\.epsilon: release network needs it"),
        ({"network": {"share": 1e-6}}, r"^network\.share: 1e-06 of privacy\.epsilon 10, .* mu m"),
        ({"network": {"share": 1.0 - 1e-12}}, r"for class statistics: means: mu .* less than one"),
        ({"privacy": {"epsilon": 1e-5}}, r"^privacy\.epsilon: 1e-05 for class statistics"),
        ({"privacy": {"delta": 1e-14}}, r"^network\.share: .* delta must be at least"),
        ({"network": {"clip_norm": 1e-7}}, r"^network\.clip_norm: must be at least 1e-06, got"),
        ({"network": {"sample_rate": 0.0}}, r"^network\.sample_rate: must be .*, got 0"),
        ({"network": {"draws": 0}}, r"^network\.draws: must be at least 1, got 0"),
        ({"network": {"lowest_t": 151}, "sampling": {"handover": 150}},
         r"^sampling\.handover: must be from network\.lowest_t to .*, 151 to 1000, got 150"),
        ({"network": {"lowest_t": 1001}}, r"^network\.lowest_t: must be at most .* 1000, got 1001"),
        ({"privacy": {"accounting": "paper"}}, r"^privacy\.accounting: must be exact with privacy"),
        ({"aggregation": {"secure": True, "max_examples": 99}, "partition": {"num_clients": 3}},
         r"^aggregation\.secure: must be false with privacy\.release: network"),
        ({"coarse": {"training": "federated"}}, r"^coarse\.training: must be server with privacy"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_kept_are_refused_by_name(
    sections: dict[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        plan_of(network_config(**sections))
    assert "\n" not in str(caught.value)


def test_a_run_with_too_few_rounds_is_refused_before_anything_is_released() -> None:
    words = r"^run\.rounds: must be at least 8 .* network\.rounds = 5\), got 7$"
    with pytest.raises(ConfigError, match=words):
        check_rounds(network_config(network={"rounds": 5}))
    check_rounds(network_config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"noise_multiplier": 1e-300},
            "noise_multiplier must be at least 0.001 and .*, got 1e-300",
        ),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be at least"),
        ({"noise_multiplier": 4097.0}, "less than one step of the noise's grid"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"sample_rate": math.nan}, r"sample_rate must be in"),
        ({"rounds": 0}, r"rounds must be in \[1, 100000\], got 0"),
        ({"clip_norm": 1e-300}, r"clip_norm must be in \[1e-06, 1e\+06\], got 1e-300"),
        ({"clip_norm": math.inf}, "clip_norm must be in"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"grid": 8}, "grid must be 4096"),
    ],
)
def test_parameters_that_no_plan_has_are_refused(changes: dict[str, Any], words: str) -> None:
    MECHANISM.check(parameters())
    with pytest.raises(ValueError, match=words):
        MECHANISM.check(parameters(**changes))


def test_configs_of_earlier_versions_keep_their_digests() -> None:
    """As the code of the version before computes them: acceptances and stores go by these."""
    old = {
        "run": {"rounds": 4, "seed": 3}, "data": {"name": "digits"},
        "coarse": {"training": "server"}, "privacy": {"release": "statistics"},
    }  # fmt: skip
    for given, digest in (({}, "649bc517557b3cfa"), (old, "e65c4517049c6f6f")):
        config = config_from_mapping({"name": "old", **given})
        assert config_digest(config)[:16] == digest
    changed = config_from_mapping({"name": "old", "network": {"lr": 0.01}})
    assert config_digest(changed)[:16] != "649bc517557b3cfa"


# --- How far an image moves a sum --------------------------------------------------------------


def exact(rows: np.ndarray, plan: gradients.GradientParameters) -> np.ndarray:
    """The sum of these gradients without noise, in whole steps."""
    sent = noised_round([torch.from_numpy(rows)], plan, number=1, size=rows.shape[1], noise=QUIET)
    return sent.total.long().numpy()


def length(whole: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in whole)


def extremes(plan: gradients.GradientParameters) -> dict[str, np.ndarray]:
    """Gradients float32 (2, d) of norms from nothing to beyond float32, by name."""
    rng, norm, step = np.random.default_rng(4), plan.clip_norm, plan.steps
    found = {}
    for size in (1, 2, 77, 5000):
        e = rng.normal(size=size)
        e /= np.linalg.norm(e)
        for scale in (0.5, 1.0, 1.0 + 1e-7, 3.0, 1e20, 1e38):
            found[f"{size} at {scale:g}"] = np.stack([e, -e]) * norm * scale
        found[f"{size} halves"] = np.stack([np.ones(size), -np.ones(size)]) * 0.5 / step
        found[f"{size} long halves"] = found[f"{size} halves"] * 99_999
        largest = float(np.finfo(np.float32).max)
        found[f"{size} largest"] = np.stack([np.full(size, largest), np.full(size, -largest)])
    return {name: rows.astype(np.float32) for name, rows in found.items()}


@pytest.mark.parametrize("noise_multiplier", [0.4, 7.3, 300.0])
def test_replacing_an_image_moves_a_sum_by_two_clip_norms_and_never_more(
    noise_multiplier: float,
) -> None:
    plan = parameters(noise_multiplier=noise_multiplier)
    reached = 0.0
    for name, rows in extremes(plan).items():
        one, other = (exact(row[None], plan) for row in rows)
        assert length(one) <= plan.limit >= length(other), name
        moved = length(one - other)
        assert moved <= 4 * plan.limit, name
        reached = max(reached, math.sqrt(moved / plan.limit) / 2.0)
    assert reached > (0.99 if noise_multiplier < 100 else 0.8)  # few steps leave room to round
    # In standard deviations of the noise that is what the accountant was told, 2 / multiplier.
    most = 2.0 * math.sqrt(plan.limit) / GRID
    assert 0.99 * 2.0 / noise_multiplier < most <= 2.0 / noise_multiplier
    assert event_of(plan).noise_multiplier == noise_multiplier  # type: ignore[attr-defined]


def test_no_clipping_moves_a_sum_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test above."""

    def unclipped(rows: torch.Tensor, *, steps: float, limit: int) -> torch.Tensor:
        return (rows.double() * steps).round().sum(dim=0)

    monkeypatch.setattr(gradients, "sum_of_whole", unclipped)
    plan = parameters()
    one, other = (exact(row[None], plan) for row in extremes(plan)["77 at 3"])
    assert length(one - other) > 8 * 4 * plan.limit


def test_short_gradients_stay_as_they_are_and_long_ones_keep_their_direction() -> None:
    plan, rng = parameters(noise_multiplier=0.5), np.random.default_rng(6)
    rows = rng.normal(size=(5, 300)).astype(np.float32)
    rows *= (plan.clip_norm * np.array([0.1, 0.5, 0.9, 5.0, 1e6])[:, None]
             / np.linalg.norm(rows, axis=1, keepdims=True))  # fmt: skip
    whole = np.array([exact(row[None], plan) for row in rows])
    step = plan.clip_norm / math.sqrt(plan.limit)
    exactly = np.rint(rows[:3].astype(np.float64) / step)
    assert np.abs(whole[:3] - exactly).max() <= 1  # a half, by float32
    assert (whole[:3] == exactly).mean() > 0.98
    for row, kept in zip(rows[3:], whole[3:], strict=True):
        assert float(row @ kept) / np.linalg.norm(row) / np.linalg.norm(kept) > 0.9999
        assert 0.995 < np.linalg.norm(kept) * step / plan.clip_norm <= 1.0
    np.testing.assert_array_equal(exact(rows, plan), whole.sum(axis=0))
    parts = [torch.from_numpy(each) for each in (rows[:2], rows[2:2], rows[2:])]
    pieces = noised_round(parts, plan, number=1, size=300, noise=QUIET)
    np.testing.assert_array_equal(pieces.total.numpy(), whole.sum(axis=0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_spoils_no_other(bad: float) -> None:
    plan, rng = parameters(), np.random.default_rng(7)
    rows = rng.normal(size=(4, 50)).astype(np.float32)
    spoiled = rows.copy()
    spoiled[2, 17] = bad
    np.testing.assert_array_equal(exact(spoiled, plan), exact(rows[[0, 1, 3]], plan))
    assert not exact(np.full((3, 50), bad, dtype=np.float32), plan).any()
    assert not exact(np.zeros((3, 50), dtype=np.float32), plan).any()
    nothing = noised_round(iter(()), plan, number=1, size=50, noise=QUIET)
    assert not nothing.total.any()


def test_no_sum_is_refused_for_being_large() -> None:
    """An error would tell of the images: what does not fit is cut after the noise."""
    plan = parameters(noise_multiplier=0.001)
    sent = message(plan, [2**31 + 2**17, -(2**40), 2**31 - 2**17, 7])
    assert sent.total.dtype == torch.int32
    assert sent.total[:2].tolist() == [2**31 - 1, 1 - 2**31]
    assert abs(int(sent.total[2]) - (2**31 - 2**17)) < LARGEST
    assert largest_total(plan, 3) == 3 * math.isqrt(plan.limit) + LARGEST
    assert exact(np.full((9, 1), 1e6, dtype=np.float32), plan)[0] <= largest_total(plan, 9)
