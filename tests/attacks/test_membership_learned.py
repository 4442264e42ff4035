"""Fitted attacks: gradient norms in closed form, and what the classifiers learn and do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedpdm.attacks.membership import (
    AttackTarget,
    HeldOutScores,
    fit_gradients,
    fit_secmi_errors,
    gradient_features,
)
from fedpdm.attacks.roc import auc, auc_interval
from tests.support.membership_toys import SCHEDULE, images, no_labels

ABAR = np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))])


class ConstantDenoiser(nn.Module):
    """x0_hat = b whatever x_t is; `idle` takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((1, 1, 4, 4), 0.4, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(3))

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.b.expand_as(x_t)


@pytest.mark.parametrize("t_range", [(1, 1000), (691, 1000)])
def test_gradient_norms_of_a_constant_model(t_range: tuple[int, int]) -> None:
    """eps - eps_hat = -(a/s)(x - b): norm of dL/db = 2 / (K d) sum_k abar/(1 - abar) ||x - b||."""
    model = ConstantDenoiser()
    target = AttackTarget(
        denoiser=model, schedule=SCHEDULE, t_range=t_range, parameters=(model.b, model.idle)
    )
    x = images(6, seed=0)
    found = gradient_features(
        target, x, no_labels(6), generator=torch.Generator().manual_seed(0), num_levels=5
    )
    span = t_range[1] - t_range[0]
    levels = [t_range[0] + (2 * i + 1) * span // 10 for i in range(5)]
    weight = sum(ABAR[t] / (1 - ABAR[t]) for t in levels)
    distance = np.sqrt(((x.numpy() - 0.4) ** 2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(found[:, 0], np.log(2 / (5 * 16) * weight * distance), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], np.log(1e-12))
    with torch.no_grad():  # the attack asks for its own gradients
        inside = gradient_features(
            target, x, no_labels(6), generator=torch.Generator().manual_seed(0), num_levels=5
        )
    np.testing.assert_array_equal(inside, found)
    model.b.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad, 1 parameters lack it"):
        gradient_features(target, x, no_labels(6), generator=torch.Generator())


def features(count: int, shift: float, *, seed: int, width: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, width))
    values[:, 0] += shift
    return values


def area(found: HeldOutScores) -> float:
    return auc(found.member_scores, found.non_member_scores)


def test_regression_reaches_the_best_linear_auc() -> None:
    """One feature of six is moved by 1: no classifier beats Phi(1 / sqrt 2) = 0.760."""
    found = fit_gradients(
        features(2000, -1.0, seed=0, width=6),
        features(2000, 0.0, seed=1, width=6),
        rng=np.random.default_rng(0),
    )
    best = stats.norm.cdf(1 / np.sqrt(2))
    assert abs(area(found) - best) < 0.04  # 4 standard errors at 1000 of each are 0.042


@pytest.mark.parametrize("width", [60, 200])
def test_nothing_learnt_by_heart_is_scored(width: int) -> None:
    """As many features as images: what was fitted would score 1; the held-out half is chance."""
    found = fit_gradients(
        features(120, 0.0, seed=2, width=width),
        features(120, 0.0, seed=3, width=width),
        rng=np.random.default_rng(0),
    )
    low, high = auc_interval(found.member_scores, found.non_member_scores, confidence=0.999)
    assert low < 0.5 < high


def noise_maps(count: int, *, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * images(count, seed=seed, dtype=torch.float32).repeat(1, 1, 2, 2)


def stripes(count: int, *, seed: int) -> torch.Tensor:
    """Maps of one norm for all, in vertical stripes of width 1 whose place is random."""
    rng = np.random.default_rng(seed)
    columns = (np.arange(8)[None] + rng.integers(2, size=(count, 1))) % 2
    maps = np.broadcast_to(columns[:, None, None, :], (count, 1, 8, 8))
    return torch.tensor(maps.copy(), dtype=torch.float32)


def test_network_learns_the_size_of_errors() -> None:
    found = fit_secmi_errors(
        noise_maps(100, seed=0, scale=0.5),
        noise_maps(100, seed=1),
        rng=np.random.default_rng(0),
    )
    assert area(found) > 0.95


def test_network_learns_what_the_norm_does_not_see() -> None:
    """Stripes down against stripes across: all norms are equal, so the statistic is at chance."""
    down, across = stripes(100, seed=0), stripes(100, seed=1).transpose(2, 3)
    norms = [maps.square().sum(dim=(1, 2, 3)) for maps in (down, across)]
    assert auc(norms[0].numpy(), norms[1].numpy()) == 0.5
    assert area(fit_secmi_errors(down, across, rng=np.random.default_rng(0))) > 0.95


def test_network_finds_nothing_where_nothing_is() -> None:
    found = fit_secmi_errors(
        noise_maps(100, seed=2), noise_maps(100, seed=3), rng=np.random.default_rng(0)
    )
    low, high = auc_interval(found.member_scores, found.non_member_scores, confidence=0.999)
    assert low < 0.5 < high
    silent = torch.zeros((12, 1, 8, 8))
    still = fit_secmi_errors(silent, silent, rng=np.random.default_rng(0), num_epochs=1)
    assert area(still) == 0.5


def test_fits_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fit_secmi_errors(
        noise_maps(12, seed=0), noise_maps(12, seed=1), rng=np.random.default_rng(0), num_epochs=1
    )
    assert torch.equal(before, torch.get_rng_state())


def test_halves_are_drawn_at_random_and_odd_ones_are_held_out() -> None:
    first, second = (
        fit_gradients(
            features(21, 0.0, seed=0, width=3),
            features(30, 0.0, seed=1, width=3),
            rng=np.random.default_rng(seed),
        )
        for seed in (0, 1)
    )
    assert (len(first.member_rows), len(first.non_member_rows)) == (11, 15)
    assert not np.array_equal(first.member_rows, second.member_rows)
    with pytest.raises(ValueError, match="at least 10 non-members, got 9"):
        fit_gradients(np.zeros((10, 1)), np.zeros((9, 1)), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        fit_secmi_errors(
            noise_maps(12, seed=0),
            noise_maps(12, seed=1),
            rng=np.random.default_rng(0),
            num_epochs=0,
        )
