"""Class statistics: what they cost, how far an image moves them, and that faults are seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.fft import dctn

from fedpdm.config import ConfigError
from fedpdm.privacy.accountant import delta_spent, epsilon_spent
from fedpdm.privacy.mechanism import ClassStatistics, event_of, statistics
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.whole import (
    pack_symmetric,
    sum_of_products,
    unpack_symmetric,
    whole_vectors,
)
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.planning import plan_release
from fedpdm.setup.run_setup import build_schedule
from tests.support.release_toys import DELTA, epsilon_of, image_set
from tests.support.statistics_toys import (
    CLASSES,
    MECHANISM,
    ONE_SIGMA,
    PIXELS,
    HalfNoise,
    NoNoise,
    audited_mu,
    largest_move,
    made,
    moved,
    packed_sum,
    public,
    rounds,
    seeded,
    source,
    source_of,
    statistics_config,
)

STAGES = pytest.mark.parametrize("stage", range(3))


# --- What they cost ----------------------------------------------------------------------------


def delta_by_integral(mus: list[float], epsilon: float) -> float:
    """delta of the composition: privacy losses N(mu^2 / 2, mu^2) added up by convolution."""
    step = 2e-3
    half = 12.0 * max(mus)
    losses = np.arange(-round(half / step), round(half / step) + 1) * step
    density, start = np.ones(1), 0.0
    for mu in mus:
        centred = np.exp(-((losses / mu) ** 2) / 2.0) / (mu * math.sqrt(2.0 * math.pi)) * step
        density, start = np.convolve(density, centred), start + losses[0] + mu * mu / 2.0
    total = start + np.arange(len(density)) * step
    return float((density * np.clip(-np.expm1(epsilon - total), 0.0, None)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("shares", [(0.12, 0.28, 0.60), (0.5, 0.25, 0.25)])
def test_three_rounds_spend_the_budget_and_no_more(
    epsilon: float, shares: tuple[float, ...]
) -> None:
    planned = rounds(epsilon=epsilon, means_share=shares[0], pooled_share=shares[1])
    mus = [each.mu for each in planned]
    spent = epsilon_spent([event_of(each) for each in planned], delta=DELTA)
    assert epsilon * (1.0 - 1e-9) < spent <= epsilon
    assert spent == pytest.approx(epsilon_of([1.0 / mu for mu in mus]), rel=1e-9)
    np.testing.assert_allclose([mu**2 / sum(m * m for m in mus) for mu in mus], shares, rtol=1e-9)
    # Two other ways to add up the rounds.
    loss = privacy_loss_distribution.from_gaussian_mechanism(1.0 / mus[0])
    for mu in mus[1:]:
        loss = loss.compose(privacy_loss_distribution.from_gaussian_mechanism(1.0 / mu))
    assert loss.get_epsilon_for_delta(DELTA) == pytest.approx(epsilon, rel=2e-3)
    assert delta_by_integral(mus, spent) == pytest.approx(DELTA, rel=1e-4)
    assert delta_spent([event_of(each) for each in planned], epsilon=spent) == pytest.approx(DELTA)


def test_mu_at_the_derived_budgets() -> None:
    for epsilon, mu in ((10.0, 2.0004), (3.0, 0.7191), (1.0, 0.2681)):  # STATISTICS.md section 2
        got = math.hypot(*(each.mu for each in rounds(epsilon=epsilon)))
        assert got == pytest.approx(mu, abs=6e-5)


def test_the_papers_bound_plans_more_noise() -> None:
    config = statistics_config()
    paper = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, accounting="paper")
    )
    exact, bound = (plan_release(each, build_schedule(each)) for each in (config, paper))
    assert bound.epsilon_paper == pytest.approx(10.0, rel=1e-9)
    assert bound.epsilon_exact < exact.epsilon_exact <= 10.0


def test_budgets_that_cannot_be_kept_are_one_line() -> None:
    config = statistics_config()
    without = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, epsilon=None, t0=600)
    )
    with pytest.raises(ConfigError, match=r"^privacy\.epsilon: release statistics needs it"):
        plan_release(without, build_schedule(without))
    tiny = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, epsilon=1e-4, delta=1e-9)
    )
    with pytest.raises(ConfigError, match="less than one step of the noise's grid"):
        plan_release(tiny, build_schedule(tiny))
    for share in (0.72, 0.9):
        with pytest.raises(ConfigError, match=r"^statistics: means_share and pooled_share must"):
            statistics_config(means_share=share)


# --- How far an image moves them ---------------------------------------------------------------


@pytest.mark.slow
@STAGES
@pytest.mark.parametrize("epsilon", [10.0, 1.0])
def test_no_pair_of_images_moves_a_sum_further_than_the_bound(stage: int, epsilon: float) -> None:
    parameters = rounds(epsilon=epsilon)[stage]
    found = largest_move(MECHANISM, parameters)
    assert 0.99 * parameters.sensitivity <= found <= parameters.sensitivity
    assert 0.99 * parameters.mu < parameters.sensitivity / GRID <= parameters.mu
    assert event_of(parameters).noise_multiplier == 1.0 / parameters.mu


@STAGES
def test_what_the_search_measures_is_what_sums_do(stage: int) -> None:
    parameters = rounds()[stage]
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (9, PIXELS))
    labels = np.arange(9) % CLASSES
    other = images.copy()
    other[4] = rng.integers(0, 256, PIXELS)
    # Of label 1: `moved` looks at label 0, so its means must be the same.
    given = {**public(), "means": public()["means"][:1].repeat(CLASSES, 1)}
    before, after = (
        made(MECHANISM, dataclasses.replace(source(each, labels), public=given), parameters,
             NoNoise())
        for each in (images, other)
    )  # fmt: skip
    expected = moved(MECHANISM, images[4:5], other[4:5], parameters)
    assert int(((before - after) ** 2).sum()) == int(expected[0]) > 0


def test_no_clipping_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(x: np.ndarray, *, steps: float, limit: int) -> np.ndarray:
        return np.rint(x * steps).astype(np.int64)

    monkeypatch.setattr(statistics, "whole_vectors", unclipped)
    for parameters in rounds():
        assert largest_move(MECHANISM, parameters, generations=20) > 1.3 * parameters.sensitivity


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(2))
def test_an_audit_measures_the_mu_of_a_round(stage: int) -> None:
    parameters = rounds()[stage]
    honest = audited_mu(MECHANISM, parameters, seeded)
    assert 0.85 * parameters.mu < honest < 1.1 * parameters.mu  # 600 draws: 3% a deviation


def test_half_the_noise_and_the_same_noise_are_caught() -> None:
    parameters = rounds()[0]
    half = audited_mu(MECHANISM, parameters, lambda at: HalfNoise(np.random.SeedSequence(at)))
    assert half > 1.7 * parameters.mu

    class Twice(ClassStatistics):
        """The same images and the same noise again: whoever has one can subtract the other."""

        def make(self, source: Any, parameters: Any, noise: Any) -> Any:
            counts, sums, directions = super().make(source, parameters, noise)
            yield counts
            yield 2 * sums - self.exact_sums(source, parameters, directions)
            yield directions

    same = audited_mu(Twice(), parameters, lambda at: seeded(0), draws=50)
    assert same > 100.0 * parameters.mu


@pytest.mark.slow
@STAGES
def test_noise_has_one_standard_deviation_on_each_number(stage: int) -> None:
    parameters = rounds()[stage]
    given = source_of(image_set(12))
    exact = made(MECHANISM, given, parameters, NoNoise())
    errors = np.array(
        [made(MECHANISM, given, parameters, seeded(at)) - exact for at in range(300)], dtype=float
    )
    np.testing.assert_allclose(errors.std(axis=0), ONE_SIGMA, rtol=0.2)
    flat = errors.reshape(300, -1)
    correlation = np.corrcoef(flat[:, :30].T) - np.eye(min(30, flat.shape[1]))
    assert np.abs(correlation).max() < 0.3  # each number has its own


# --- Whole numbers -----------------------------------------------------------------------------


@STAGES
def test_sums_are_those_of_each_image_by_itself_in_whole_numbers(stage: int) -> None:
    parameters = rounds()[stage]
    images = image_set(11)
    got = made(MECHANISM, source_of(images), parameters, NoNoise())
    assert got.dtype == np.int64
    directions = public()["directions"].numpy()
    each = [
        MECHANISM.contributions(source_of(images.subset(np.array([at]))), parameters, directions)[0]
        for at in range(11)
    ]
    assert all(sum(int(v) ** 2 for v in a) <= parameters.limit for a in each)
    for row, values in enumerate(got):
        chosen = [a for a, y in zip(each, images.labels, strict=True) if stage == 1 or y == row]
        expected = np.sum(chosen, axis=0) if stage == 0 else packed_sum(np.array(chosen))
        np.testing.assert_array_equal(values, expected)


def test_a_class_without_images_has_no_sum() -> None:
    for parameters in rounds():
        images = image_set(6, labels=2)  # of three classes
        counts, sums, _ = MECHANISM.make(source_of(images), parameters, seeded(1))
        np.testing.assert_array_equal(counts, [3, 3, 0])
        assert (sums[0] != 0).all()
        if parameters.stage != "pooled":
            assert (sums[2] == 0).all()


def test_vectors_fit_and_lose_little() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 48)) * rng.lognormal(size=(500, 1)) * 3.0
    whole = whole_vectors(x, steps=2.0, limit=411)
    norms = np.vecdot(whole, whole)
    assert norms.max() <= 411
    long = (4.0 * x**2).sum(axis=1) > 600
    assert norms[long].mean() > 0.95 * 411
    fits = np.linalg.norm(np.rint(2.0 * x), axis=1) <= math.sqrt(411)
    np.testing.assert_array_equal(whole[fits & ~long], np.rint(2.0 * x)[fits & ~long])
    # What is whole and within the limit stays as it is, at the limit too: 411 = 20^2 + 3^2 + 1 + 1.
    at_limit = np.array([[20.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(whole_vectors(at_limit, steps=1.0, limit=411), at_limit)
    for bad in (np.nan, np.inf, 1e200):
        x[7, 3] = bad
        with pytest.raises(ValueError, match="image 7 has values not finite"):
            whole_vectors(x, steps=2.0, limit=411)
    huge = whole_vectors(np.full((2, 9), 1e100), steps=1.0, limit=411)
    assert (np.vecdot(huge, huge) <= 411).all()


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_packing_keeps_the_norm_and_the_matrix(size: int) -> None:
    rng = np.random.default_rng(size)
    matrix = sum_of_products(rng.integers(-40, 40, (5, size)))
    packed = pack_symmetric(matrix)
    assert packed.dtype == np.int64
    assert int((packed**2).sum()) == int((matrix**2).sum())
    np.testing.assert_array_equal(unpack_symmetric(packed, size), matrix)


def test_sums_that_would_not_be_exact_are_refused() -> None:
    with pytest.raises(ArithmeticError, match="not exact"):
        sum_of_products(np.full((4, 2), 1 << 26, dtype=np.int64))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 6, 5), (2, 3, 3)])
def test_the_basis_is_orthonormal_and_goes_by_frequency(shape: tuple[int, int, int]) -> None:
    size = math.prod(shape)
    basis = cosine_basis(shape, 10_000)
    assert basis.shape == (size, size)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(cosine_basis(shape, 7), basis[:7])
    flat = np.ones(shape).ravel()
    assert basis[0] @ flat == pytest.approx(math.sqrt(size))  # brightness first
    x = np.random.default_rng(0).normal(size=shape)
    by_scipy = dctn(x.sum(axis=0) / math.sqrt(shape[0]), norm="ortho")
    mine = basis @ x.ravel()
    assert all(np.abs(mine - value).min() < 1e-9 for value in by_scipy.ravel())
