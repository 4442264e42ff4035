"""Pooled knowledge of several models: the claim of publishing on the toy, and planted leaks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fedpdm.attacks.collusion import PooledDenoiser, pooled_scores
from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.membership.targets import AttackTarget
from fedpdm.attacks.reconstruction import attack_uploads
from fedpdm.attacks.recovery import row_distances
from fedpdm.attacks.roc import auc, auc_difference
from fedpdm.diffusion.gmm import GaussianMixture, MixtureDenoiser
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.mechanism import release
from fedpdm.privacy.noise import SeededNoise
from fedpdm.toy.denoisers import LinearDenoiser, fit_means

Array = NDArray[np.float64]
RNG = np.random.default_rng


def scores(leak: float, *, count: int = 400, seed: int = 0) -> tuple[Array, Array]:
    rng = RNG(seed)
    return rng.normal(leak, 1.0, size=count), rng.normal(size=count)


def test_pooling_is_the_best_sum_for_equal_models() -> None:
    """m independent scores at distance 1 pool to distance sqrt(m): AUC = Phi(sqrt(m / 2))."""
    pooled = pooled_scores([scores(1.0, count=4000, seed=seed) for seed in range(4)])
    assert auc(*pooled) == pytest.approx(stats.norm.cdf(math.sqrt(4 / 2)), abs=0.01)
    # The scale of a model's scores does not matter.
    large = [(1e6 * a + 3, 1e6 * b + 3) for a, b in [scores(1.0, seed=1)]]
    both = [np.concatenate(pooled_scores(each)) for each in (large, [scores(1.0, seed=1)])]
    assert np.allclose(*both)


def test_colluders_gain_where_a_model_leaks_and_nowhere_else() -> None:
    coarse = scores(0.0)
    innocent = [scores(0.0, seed=seed) for seed in range(1, 4)]
    _, low, high = auc_difference(pooled_scores([coarse, *innocent]), coarse)
    assert low <= 0.0 <= high
    leaky = [*innocent[:2], scores(1.5, seed=9)]
    gain, low, _ = auc_difference(pooled_scores([coarse, *leaky]), coarse)
    assert low > 0.05
    assert gain > 0.15


def test_auc_difference_has_the_spread_of_repeated_draws() -> None:
    rng = RNG(0)
    differences, widths, hits = [], [], 0
    truth = stats.norm.cdf(1 / math.sqrt(2)) - stats.norm.cdf(0.5 / math.sqrt(2))
    for _ in range(300):
        shared = rng.normal(size=160) * 0.8  # the two scores of an example go together
        values = [0.6 * rng.normal(size=160) + shared + d * (np.arange(160) < 80) for d in (1, 0.5)]
        first, second = ((v[:80], v[80:]) for v in values)
        difference, low, high = auc_difference(first, second, confidence=0.9)
        assert difference == pytest.approx(auc(*first) - auc(*second))
        differences.append(difference)
        widths.append((high - low) / (2 * stats.norm.ppf(0.95)))
        hits += low <= truth <= high
    assert np.mean(widths) == pytest.approx(np.std(differences), rel=0.15)
    assert 0.85 <= hits / 300 <= 0.95
    same = scores(1.0)
    assert auc_difference(same, same) == (0.0, 0.0, 0.0)


def member(factor: float, low: int, high: int, **options: Any) -> tuple[Reconstructor, list[Any]]:
    """An attacker that multiplies with `factor`, and what it was asked."""
    asked: list[Any] = []

    def denoiser(
        x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor, clipped: Any
    ) -> torch.Tensor:
        asked.append((t.tolist(), labels.tolist(), None if clipped is None else clipped.tolist()))
        return factor * x_t

    target = AttackTarget(
        denoiser=denoiser,
        schedule=make_schedule("linear"),
        t_range=(low, high),
        labels_known=factor != 2.0,
    )
    return Reconstructor(name=f"{factor}", target=target, **options), asked


def test_pooled_denoiser_asks_each_as_when_alone() -> None:
    coarse, of_coarse = member(1.0, 301, 1000)
    fine, of_fine = member(2.0, 1, 1000, clipped=True)
    third, of_third = member(6.0, 1, 300, clipped=True)
    x = torch.randn((2, 1, 3, 3), dtype=torch.float64)
    labels = torch.tensor([1, 2])
    generator = torch.Generator().manual_seed(0)
    pooled = PooledDenoiser([fine, third], generator=generator)
    got = pooled(x, torch.tensor([300, 300]), labels=labels)
    assert torch.allclose(got, 4.0 * x)
    assert of_fine == [([300, 300], [-1, -1], [True, True])]
    assert of_third == [([300, 300], [1, 2], [True, True])]
    with_coarse = PooledDenoiser([coarse, fine, third], generator=generator)
    got = with_coarse(x, torch.tensor([300, 300]), labels=labels)
    assert of_coarse == [([301, 301], [1, 2], None)]
    assert torch.allclose(got, 3.0 * x, atol=0.3)  # a step of noise, in a third of it
    assert not torch.allclose(got, 3.0 * x)


def test_honest_models_of_others_reconstruct_no_better_than_the_best_attacker() -> None:
    """The claim on the toy: other clients' linear denoisers know the class, not the client."""
    schedule = make_schedule("linear")
    mixture = GaussianMixture(
        means=torch.full((1, 8), 2.0).double(), variances=torch.ones(1, 8).double()
    )
    generator = torch.Generator().manual_seed(3)
    labels = torch.zeros(500, dtype=torch.int64)
    own = mixture.draw(labels, generator=generator).view(-1, 1, 1, 8)
    released = release(
        own, labels, schedule=schedule, t0=400, clip_norm=30.0, shift=0.0,
        noise=SeededNoise(np.random.SeedSequence(0)), largest=100.0,
    )  # fmt: skip

    def attacker(name: str, denoiser: Any) -> Reconstructor:
        target = AttackTarget(denoiser=denoiser, schedule=schedule, t_range=(1, 1000))
        return Reconstructor(name=name, target=target)

    fine = []
    for client in range(5):
        points = mixture.draw(labels[:20], generator=generator)
        means = fit_means(points, labels[:20], num_classes=1)
        fine.append(attacker(f"{client}", LinearDenoiser(means, mixture.variances, schedule)))
    pooled = PooledDenoiser(fine, generator=generator)
    result = attack_uploads(
        released,
        own,
        reconstructors=[
            *fine,
            attacker("colluders", pooled),
            attacker("optimal", MixtureDenoiser(mixture, schedule)),
        ],
        generator=generator,
        rng=RNG(0),
        num_bootstrap=20,
        num_steps=10,
    )
    squares = {
        row.attacker: row_distances(result.images[row.attacker, "one_shot"], own) ** 2
        for row in result.rows
        if row.method == "one_shot"
    }
    gain = squares["optimal"] - squares["colluders"]
    assert gain.mean() <= 4 * gain.std() / math.sqrt(500)
    alone = np.mean([squares[f"{client}"].mean() for client in range(5)])
    assert squares["colluders"].mean() < alone  # their means' errors average out
    # Error of the mean of m clients of n points: a share (1 - g a)^2 of d v / (m n) on top.
    abar = schedule.alpha_bar(400)
    rest = (1 - abar) ** 2
    for name, count in (("colluders", 100), *((f"{client}", 20) for client in range(5))):
        excess = squares[name].mean() - squares["optimal"].mean()
        assert excess < rest * 8 * 4.0 / count + 4 * (squares[name] - squares["optimal"]).std() / 22


def test_collusion_refuses() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"^members must hold at least 1 attacker, got 0"):
        PooledDenoiser([], generator=generator)
    mixed = [member(1.0, 1, 1000)[0], member(1.0, 1, 1000, answers_clipped=False)[0]]
    with pytest.raises(ValueError, match=r"^members must all answer with clipped images, or none"):
        PooledDenoiser(mixed, generator=generator)
    two_chains = [member(1.0, 1, 1000, noise_to_noise=True)[0]]
    with pytest.raises(ValueError, match=r"^members must not be noise-to-noise models"):
        PooledDenoiser(two_chains, generator=generator)
    with pytest.raises(ValueError, match=r"^scores must hold at least 1 model's, got 0"):
        pooled_scores([])
    uneven = [scores(0.0), scores(0.0, count=3)]
    with pytest.raises(ValueError, match=r"^scores must be of the same images for every model"):
        pooled_scores(uneven)
    with pytest.raises(ValueError, match=r"^first and second must score the same examples"):
        auc_difference(*uneven)
    with pytest.raises(ValueError, match=r"^confidence must be in \(0, 1\), got 0"):
        auc_difference(uneven[0], uneven[0], confidence=0.0)
