"""Several images of a person at one client: what they cost together, by mechanism."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from fedpdm.privacy.mechanism import event_of, group_event_of
from fedpdm.privacy.planning import plan_release
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement, run_statement
from fedpdm.privacy.types import GaussianEvent
from fedpdm.setup.run_setup import build_schedule
from tests.support.federations import small_config
from tests.support.release_toys import DELTA, image_set
from tests.support.statistics_toys import (
    CLASSES,
    MECHANISM,
    PIXELS,
    NoNoise,
    asked,
    made,
    rounds,
    source,
    statistics_config,
)


def delta_of(mu: float, epsilon: float) -> float:
    """Of the Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""
    phi = stats.norm.cdf
    return float(phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu))


MU = optimize.brentq(lambda mu: delta_of(mu, 10.0) - 1e-5, 1.0, 3.0)  # of the whole budget


@pytest.mark.parametrize("count", [2, 5])
def test_images_in_one_sum_move_it_in_full(count: int) -> None:
    """Each replaced by its opposite: as far as so many times the bound for one."""
    parameters = rounds()[0]
    black, white = np.zeros((count, PIXELS)), np.full((count, PIXELS), 255)
    before, after = (
        made(MECHANISM, source(each), parameters, NoNoise()) for each in (black, white)
    )
    moved = math.sqrt(float(((before - after).astype(np.float64) ** 2).sum()))
    assert moved == pytest.approx(count * parameters.sensitivity, rel=0.01)
    event = MECHANISM.group_event(event_of(parameters), count)
    assert event == GaussianEvent(noise_multiplier=1.0 / parameters.mu / count)


@pytest.mark.parametrize(("count", "epsilon"), [("1", 10.0), ("2", 24.39), ("10", 284.5)])
def test_a_statement_of_sums_counts_them_in_full(
    count: str, epsilon: float, tmp_path: Path
) -> None:
    """A run's before it, and a client's of its ledger: mu grows with k, not with its root."""
    config = statistics_config()
    plan = plan_release(config, build_schedule(config), num_classes=CLASSES)
    store = ReleaseStore(tmp_path / "client")
    for stage in range(3):
        store.obtain(image_set(6), asked(stage))
    for statement in (
        run_statement(config, plan, noise_source=""),
        run_statement(config, plan, noise_source="", stores=[store]),
        client_statement(store, delta=DELTA),
    ):
        found = statement["group_epsilon"][count]
        assert found == pytest.approx(epsilon, rel=1e-3)
        if found < 100:
            assert delta_of(MU * int(count), found) == pytest.approx(1e-5, rel=1e-3)


def test_images_with_noise_of_their_own_add_up_as_squares() -> None:
    config = small_config(privacy={"epsilon": 10.0, "delta": 1e-5})
    plan = plan_release(config, build_schedule(config))
    statement = run_statement(config, plan, noise_source="")
    (parameters,) = plan.rounds
    one = event_of(parameters)
    assert isinstance(one, GaussianEvent)
    assert delta_of(math.sqrt(5) / one.noise_multiplier, statement["group_epsilon"]["5"]) == (
        pytest.approx(1e-5, rel=1e-3)
    )


def test_both_kinds_on_the_same_images_compose() -> None:
    """Per-image releases and sums of the same k images: 5 mu_1^2 + 25 mu_2^2."""
    images = small_config(privacy={"epsilon": 3.0})
    first = plan_release(images, build_schedule(images)).rounds[0]
    second = rounds()[0]
    alone = event_of(first)
    assert isinstance(alone, GaussianEvent)
    found = group_event_of([(first, alone), (second, event_of(second))], 5)
    mu = math.sqrt(5.0 / alone.noise_multiplier**2 + 25.0 * second.mu**2)
    assert isinstance(found, GaussianEvent)
    assert 1.0 / found.noise_multiplier == pytest.approx(mu, rel=1e-12)
