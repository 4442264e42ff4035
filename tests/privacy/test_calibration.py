"""Calibration against the published table, brute force and a simulated adversary."""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import Any

import numpy as np
import pytest

from fedpdm.diffusion.names import SCHEDULE_KINDS
from fedpdm.diffusion.schedule import NoiseSchedule, make_schedule
from fedpdm.privacy.accountant import ACCOUNTINGS, compose, epsilon_bound, epsilon_spent
from fedpdm.privacy.calibration import UnreachableEpsilonError, calibrate, calibrate_t0, rounded
from fedpdm.privacy.events import release_event
from tests.support.cases import every

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


@pytest.mark.slow
@every("releases", [1, 3])
@every("epsilon", [0.7, 3.0, 10.0, 250.0])
@every("accounting", ACCOUNTINGS)
@every("kind", SCHEDULE_KINDS)
def test_round_trips(kind: str, accounting: str, epsilon: float, releases: int) -> None:
    """The smallest t0 keeps to epsilon and one step less does not; so for the largest C."""
    schedule = make_schedule(kind, num_steps=400, beta_end=0.05)
    common = {"delta": 1e-5, "accounting": accounting, "releases": releases}
    answer = calibrate(schedule, epsilon=epsilon, clip_norm=2.0, **common)
    assert cost(schedule, answer.t0, 2.0, **common) == pytest.approx(answer.epsilon, rel=1e-12)
    assert answer.epsilon <= epsilon
    if answer.t0 > 1:
        assert cost(schedule, answer.t0 - 1, 2.0, **common) > epsilon
    again = calibrate(schedule, t0=answer.t0, clip_norm=2.0, **common)
    assert again == answer
    largest = calibrate(schedule, epsilon=epsilon, t0=answer.t0, **common)
    assert largest.clip_norm >= 2.0
    assert largest.epsilon <= epsilon
    assert cost(schedule, answer.t0, largest.clip_norm, **common) <= epsilon * (1 + 1e-12)
    assert cost(schedule, answer.t0, largest.clip_norm * (1 + 1e-9), **common) > epsilon
    # Planted: the C that is right for one release is too large for three.
    alone = calibrate(schedule, epsilon=epsilon, t0=answer.t0, delta=1e-5, accounting=accounting)
    assert (cost(schedule, answer.t0, alone.clip_norm, **common) > epsilon) == (releases > 1)


@pytest.mark.parametrize(
    ("kind", "one", "three", "ten"),
    [("linear", 924, 811, 675), ("cosine", 1000, 1000, 994), ("squared_cosine", 992, 977, 937)],
)
def test_the_table_of_schedules(kind: str, one: int, three: int, ten: int) -> None:
    """docs/method.md section 2."""
    schedule = make_schedule(kind)
    found = [calibrate_t0(schedule, epsilon=e, clip_norm=10, delta=1e-5) for e in (1, 3, 10)]
    assert found == [one, three, ten]


@pytest.mark.parametrize(
    ("accounting", "steps"), [("exact", [675, 724, 770, 827]), ("paper", [693, 741, 786, 842])]
)
def test_t0_of_many_releases(accounting: str, steps: list[int]) -> None:
    """K releases need the sigma of one release at C sqrt(K)."""
    common = {"epsilon": 10, "delta": 1e-5, "accounting": accounting}
    found = [calibrate_t0(LINEAR, clip_norm=10, releases=k, **common) for k in (1, 2, 4, 10)]
    assert found == steps
    assert found == [
        calibrate_t0(LINEAR, clip_norm=10 * math.sqrt(k), **common) for k in (1, 2, 4, 10)
    ]


def test_groups_and_releases_by_each_accounting() -> None:
    common = {"t0": 690, "clip_norm": 10, "delta": 1e-5, "group_sizes": (3, 7)}
    for accounting, rules in ACCOUNTINGS.items():
        one = release_event(LINEAR, t0=690, clip_norm=10)
        twice = calibrate(LINEAR, accounting=accounting, releases=2, **common)
        wanted = rules.epsilon(compose([one] * 2), delta=1e-5)
        assert twice.epsilon == pytest.approx(wanted, rel=1e-12)
        exact = epsilon_spent([one] * 2, delta=1e-5)
        assert twice.exact_epsilon == pytest.approx(exact, rel=1e-12)
        assert list(twice.group_epsilon) == [3, 7]
        for k, spent in twice.group_epsilon.items():
            wanted = rules.epsilon(compose([one] * (2 * k)), delta=1e-5)
            assert spent == pytest.approx(wanted, rel=1e-12)
        assert list(twice.release_epsilon) == [1, 2, 4, 10]
        for k, spent in twice.release_epsilon.items():
            wanted = rules.epsilon(compose([one] * k), delta=1e-5)
            assert spent == pytest.approx(wanted, rel=1e-12)
        assert 1 / twice.noise_multiplier == pytest.approx(math.sqrt(2) / one.noise_multiplier)
        assert twice.epsilon_at(1e-5) == pytest.approx(twice.epsilon)
        assert twice.delta_at(twice.epsilon) == pytest.approx(1e-5)
    assert 8 in calibrate(LINEAR, releases=8, **common).release_epsilon


def cost(
    schedule: NoiseSchedule, t0: int, clip_norm: float, *, delta: float, accounting: str,
    releases: int,
) -> float:  # fmt: skip
    """By composition of events, one by one."""
    events = [release_event(schedule, t0=t0, clip_norm=clip_norm)] * releases
    if accounting == "exact":
        return epsilon_spent(events, delta=delta)
    return epsilon_bound(compose(events), delta=delta)


@every("releases", [1, 5])
@every("accounting", ACCOUNTINGS)
@every("kind", SCHEDULE_KINDS)
def test_the_advice_for_an_epsilon_out_of_reach_is_true(
    kind: str, accounting: str, releases: int
) -> None:
    schedule = make_schedule(kind, num_steps=300)
    options = {"delta": 1e-5, "accounting": accounting, "releases": releases}
    for epsilon, clip, max_t0 in ((1.0, 7e5, None), (0.03, 3e4, 299), (8.0, 1e6, 200)):
        last = max_t0 or 300
        with pytest.raises(UnreachableEpsilonError) as caught:
            calibrate_t0(schedule, epsilon=epsilon, clip_norm=clip, max_t0=max_t0, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"privacy.epsilon {epsilon:g} cannot be reached with clip_norm")
        assert (f"{releases} releases of the same image" in message) == (releases > 1)
        found = re.search(
            r"the last step, t0 = (\d+), raise epsilon to (\S+) or lower clip_norm to (\S+) \(",
            message,
        )
        assert found is not None
        assert int(found[1]) == last
        within = {"max_t0": max_t0, **options}
        # The epsilon that t0 = T reaches with this C, and hardly less.
        at_last = calibrate_t0(schedule, epsilon=float(found[2]), clip_norm=clip, **within)
        assert at_last == last
        assert cost(schedule, last, clip, **options) <= float(found[2])
        with pytest.raises(UnreachableEpsilonError):
            calibrate_t0(schedule, epsilon=0.998 * float(found[2]), clip_norm=clip, **within)
        # The C that reaches this epsilon at t0 = T, and hardly more.
        advised = float(found[3])
        assert calibrate_t0(schedule, epsilon=epsilon, clip_norm=advised, **within) == last
        with pytest.raises(UnreachableEpsilonError):
            calibrate_t0(schedule, epsilon=epsilon, clip_norm=1.002 * advised, **within)


def test_the_last_step_can_be_kept_out() -> None:
    options = {"epsilon": 1.0, "delta": 1e-5}
    assert calibrate_t0(LINEAR, clip_norm=10, max_t0=924, **options) == 924
    with pytest.raises(UnreachableEpsilonError, match="t0 = 923"):
        calibrate_t0(LINEAR, clip_norm=10, max_t0=923, **options)
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=rf"max_t0 must be in \[1, 1000\], got {wrong}"):
            calibrate_t0(LINEAR, clip_norm=10, max_t0=wrong, **options)


def test_printed_numbers_err_on_the_safe_side() -> None:
    assert rounded(9.96801, ROUND_CEILING) == "9.969"
    assert rounded(11.12699, ROUND_FLOOR, digits=5) == "11.126"
    assert rounded(123456.0, ROUND_FLOOR) == "1.234e+05"
    assert rounded(10.0, ROUND_CEILING) == rounded(10.0, ROUND_FLOOR) == "10"


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
        ({"epsilon": 1.0, "clip_norm": -1.0}, "clip_norm must be positive and finite, got -1"),
        ({"t0": 10, "clip_norm": 1e300}, r"clip_norm 1e\+300 gives an infinite epsilon at t0 = 10"),
        ({"t0": 5, "clip_norm": 1.0, "releases": 0}, r"releases must be in \[1, 1000000\], got 0"),
        ({"t0": 5, "clip_norm": 1.0, "group_sizes": (1, -2)}, "group size must be in .*, got -2"),
        ({"t0": 5, "clip_norm": 1.0, "accounting": "rdp"}, "must be exact or paper, got 'rdp'"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(LINEAR, delta=1e-5, **given)
