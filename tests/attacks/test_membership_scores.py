"""Rates of an attack by hand, against scikit-learn and scipy, and the law of their intervals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from fedpdm.attacks.membership import MembershipScores, asr_at_chance, membership_scores


def judge(members: object, non_members: object, *, num_bootstrap: int = 20) -> MembershipScores:
    return membership_scores(
        np.asarray(members, dtype=float),
        np.asarray(non_members, dtype=float),
        rng=np.random.default_rng(0),
        num_bootstrap=num_bootstrap,
    )


@pytest.mark.slow
@pytest.mark.parametrize("decimals", [12, 1, 0])  # rounding makes ties
def test_rates_agree_with_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    x, y = rng.normal(0.8, 1, 237).round(decimals), rng.normal(0, 1, 1311).round(decimals)
    found = judge(x, y)
    truth, scores = np.repeat([1, 0], [len(x), len(y)]), np.concatenate([x, y])
    assert found.auc.value == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    best = max(balanced_accuracy_score(truth, scores >= u) for u in np.unique(scores))
    assert found.asr.value == pytest.approx(best, abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.tpr_at_1pct.value == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)
    assert found.tpr_at_01pct.value == pytest.approx(tpr[fpr <= 0.001].max(), abs=1e-12)


def test_tpr_where_the_nearest_fpr_is_above() -> None:
    """60 non-members: FPR moves in 1/60 = 1.67%, nearest to 1% and above it; so 0 are allowed."""
    non_members = [5.0] + [0.0] * 59
    members = [6.0] * 3 + [4.0] * 7  # 4 is reached only with FPR 1/60
    found = judge(members, non_members)
    assert found.tpr_at_1pct.value == 0.3
    assert found.tpr_at_01pct.value == 0.3


def test_tpr_of_exactly_one_percent_counts() -> None:
    for times in (1, 3, 7):  # 0.01 as 1/100, 3/300, 7/700
        found = judge([6.0, 4.0, 4.0, -1.0], [5.0] * times + [0.0] * 99 * times)
        assert found.tpr_at_1pct.value == 0.75
        assert found.tpr_at_01pct.value == 0.25
    assert judge([6.0, 4.0], [5.0] + [0.0] * 999).tpr_at_01pct.value == 1.0
    assert judge([6.0, 4.0], [5.0] + [0.0] * 998).tpr_at_01pct.value == 0.5


def test_ties_cannot_be_split() -> None:
    """Half of the members share their score with 2 of 100 non-members: none of them at 1%."""
    found = judge([2.0] * 5 + [3.0] * 5, [2.0] * 2 + [0.0] * 98)
    assert found.tpr_at_1pct.value == 0.5
    assert found.auc.value == pytest.approx(0.5 + 0.5 * (0.98 + 0.02 / 2))
    all_tied = judge([1.0] * 4, [1.0] * 4)
    assert (all_tied.auc.value, all_tied.asr.value, all_tied.tpr_at_1pct.value) == (0.5, 0.5, 0.0)


def test_extremes() -> None:
    apart = judge([1.0, np.inf], [0.0, -np.inf])
    assert (apart.auc.value, apart.asr.value, apart.tpr_at_01pct.value) == (1.0, 1.0, 1.0)
    assert (apart.auc.low, apart.auc.high) == (1.0, 1.0)  # as the module says: no width
    swapped = judge([0.0, -np.inf], [1.0, np.inf])
    assert (swapped.auc.value, swapped.asr.value, swapped.tpr_at_1pct.value) == (0.0, 0.5, 0.0)


def test_the_sign_matters() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
    assert judge(x, y).auc.low > 0.7
    assert judge(-x, -y).auc.high < 0.3
    assert judge(-x, -y).auc.value == pytest.approx(1 - judge(x, y).auc.value)


@pytest.mark.slow
def test_resamples_are_those_of_the_plain_bootstrap() -> None:
    """Percentiles against resampling the scores themselves, pair by pair."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(0.7, 1, 60).round(1), rng.normal(0, 1, 90).round(1)
    plain = []
    for _ in range(1500):
        above = rng.choice(x, 60)[:, None] - rng.choice(y, 90)
        plain.append(np.mean((above > 0) + 0.5 * (above == 0)))
    found = judge(x, y, num_bootstrap=4000).auc
    spread = np.std(plain)
    assert abs(found.low - np.quantile(plain, 0.025)) < 0.25 * spread
    assert abs(found.high - np.quantile(plain, 0.975)) < 0.25 * spread


@pytest.mark.slow
def test_intervals_cover_at_their_rate() -> None:
    """N(1, 1) against N(0, 1): AUC Phi(1 / sqrt 2); 300 experiments, 95% +- 4 standard errors."""
    truth, rng = stats.norm.cdf(1 / np.sqrt(2)), np.random.default_rng(11)
    covered, half_as_wide = 0, 0
    for _ in range(300):
        found = membership_scores(
            rng.normal(1, 1, 120), rng.normal(0, 1, 120), rng=rng, num_bootstrap=300
        ).auc
        covered += found.low <= truth <= found.high
        narrow = (found.high - found.low) / 4
        half_as_wide += abs(found.value - truth) <= narrow
    assert 0.90 <= covered / 300 <= 0.99
    assert half_as_wide / 300 < 0.85  # an interval half as wide would not pass


@pytest.mark.slow
def test_low_fpr_intervals_cover() -> None:
    """TPR at 1% of N(2, 1) against N(0, 1): Phi(2 - z_0.99); 1000 of each, so 10 accusations."""
    truth, rng = stats.norm.cdf(2 - stats.norm.ppf(0.99)), np.random.default_rng(12)
    covered = 0
    for _ in range(100):
        found = membership_scores(
            rng.normal(2, 1, 1000), rng.normal(0, 1, 1000), rng=rng, num_bootstrap=200
        ).tpr_at_1pct
        covered += found.low <= truth <= found.high
    assert covered >= 85


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(200, 200), (500, 150)])
def test_asr_at_chance_is_exceeded_once_in_twenty(n: int, m: int) -> None:
    rng = np.random.default_rng(13)
    bound = asr_at_chance(n, m)
    reached = [judge(rng.normal(size=n), rng.normal(size=m), num_bootstrap=1) for _ in range(1500)]
    exceeded = np.mean([r.asr.value > bound for r in reached])
    assert 0.025 < exceeded < 0.065  # 5% in the limit, 4 standard errors of 1500 draws are 2.3%
    assert np.mean([r.asr.value for r in reached]) > 0.51  # which is why the bound is needed
    assert asr_at_chance(1, 1) == 1.0


def test_it_is_json_and_repeats() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=40), rng.normal(size=50)
    found = judge(x, y)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["auc"]["value"] == found.auc.value
    assert (found.num_members, found.num_non_members, found.num_bootstrap) == (40, 50, 20)
    assert found == judge(x, y)
    other = membership_scores(x, y, rng=np.random.default_rng(1), num_bootstrap=20)
    assert other.auc.low != found.auc.low
    assert other.auc.value == found.auc.value


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([], [1.0], r"members must have shape \(n,\)"),
        ([1.0], [[1.0]], r"non_members must have shape .* got \(1, 1\)"),
        ([np.nan, 1.0], [1.0], "members must not be NaN, got 1 NaN"),
    ],
)
def test_refusals(x: object, y: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(x, y)
    with pytest.raises(ValueError, match="num_bootstrap must be at least 1, got 0"):
        judge([1.0], [0.0], num_bootstrap=0)
    with pytest.raises(ValueError, match="got 0 and 3"):
        asr_at_chance(0, 3)
