"""Class Gaussians against dense algebra, integrals by Monte Carlo, and what samplers draw."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from fedpdm.diffusion.combined import Guided, HandOver, Mixed
from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.gmm import GaussianMixture, MixtureDenoiser
from fedpdm.diffusion.sampling import sample
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import SamplerSettings, sample_in_batches

SCHEDULE = make_schedule("linear")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(*, d: int = 6, r: int = 2, seed: int = 0, apart: float = 1.0) -> ClassGaussians:
    """Four components; class 0 has two of them, class 2 none."""
    rng = np.random.default_rng(seed)
    frames = [np.linalg.qr(rng.normal(size=(d, d)))[0][:r] for _ in range(4)]
    return ClassGaussians(
        means=torch.from_numpy(apart * rng.normal(size=(4, d))),
        directions=torch.from_numpy(np.array(frames)),
        variances=torch.from_numpy(rng.uniform(0.5, 3.0, (4, r))),
        rest=torch.from_numpy(rng.uniform(0.05, 0.4, 4)),
        weights=torch.tensor([1.0, 3.0, 2.0, 0.5]),
        classes=torch.tensor([0, 1, 0, 3]),
    )


def covariance(g: ClassGaussians, j: int) -> torch.Tensor:
    v, eye = g.directions[j], torch.eye(g.means.shape[1], dtype=torch.float64)
    return v.T @ torch.diag(g.variances[j]) @ v + g.rest[j] * (eye - v.T @ v)


def dense(g: ClassGaussians, x: torch.Tensor, abar: float, label: int) -> torch.Tensor:
    """E[x_0 | x_t, label] by torch's own solvers, one point (d,)."""
    a, eye = math.sqrt(abar), torch.eye(len(x), dtype=torch.float64)
    chosen = [j for j in range(4) if label in (NO_LABEL, int(g.classes[j]))]
    logs, means = [], []
    for j in chosen or range(4):
        s = covariance(g, j)
        noised = abar * s + (1.0 - abar) * eye
        y = x - a * g.means[j]
        means.append(g.means[j] + a * s @ torch.linalg.solve(noised, y))
        density = MultivariateNormal(a * g.means[j], noised).log_prob(x)
        logs.append(density + g.weights[j].log())
    return torch.stack(logs).softmax(dim=0) @ torch.stack(means)


@pytest.mark.parametrize("t", [1, 30, 150, 500, 1000])
@pytest.mark.parametrize("r", [0, 2, 6])
def test_the_posterior_mean_is_that_of_dense_matrices(t: int, r: int) -> None:
    g = gaussians(r=r)
    x = 2.0 * torch.randn((10, 6), generator=generator(t), dtype=torch.float64)
    labels = torch.tensor([0, 1, 3, NO_LABEL, 2] * 2)  # class 2 has none: as no label
    levels = torch.full((10,), t)
    got = GaussianDenoiser(g, SCHEDULE)(x.view(10, 1, 2, 3), levels, labels=labels)
    assert got.shape == (10, 1, 2, 3)
    for row in range(10):
        expected = dense(g, x[row], SCHEDULE.alpha_bar(t), int(labels[row]))
        torch.testing.assert_close(got[row].flatten(), expected, rtol=1e-9, atol=1e-10)


def test_densities_are_torchs() -> None:
    g = gaussians()
    x = torch.randn((7, 6), generator=generator(), dtype=torch.float64)
    for abar in (1.0, 0.6):
        eye = torch.eye(6, dtype=torch.float64)
        each = torch.stack(
            [
                MultivariateNormal(
                    math.sqrt(abar) * g.means[j], abar * covariance(g, j) + (1.0 - abar) * eye
                ).log_prob(x)
                for j in range(4)
            ],
            dim=1,
        )
        expected = each + (g.weights / 6.5).log()
        torch.testing.assert_close(g.log_joint(x, abar), expected, rtol=1e-9, atol=1e-9)
        by_class = g.log_class_joint(x, 4, abar)
        pair = expected[:, [0, 2]].logsumexp(dim=1)
        torch.testing.assert_close(by_class[:, 0], pair, rtol=1e-9, atol=1e-9)
        assert bool(by_class[:, 2].isneginf().all())
        even = g.log_class_joint(x, 4, abar, even=True)
        torch.testing.assert_close(even[:, 1], each[:, 1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(even[:, 0], pair - math.log(3.0 / 6.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("label", [0, NO_LABEL])
def test_the_posterior_mean_is_the_integral_by_monte_carlo(label: int) -> None:
    """Clean points drawn from the prior, weighed by how likely x_t is from each of them."""
    g = gaussians(d=3, r=1, apart=0.7)
    drawn = g.draw(torch.full((400_000,), label), generator=generator(1)).double()
    for t, point in ((300, [0.4, -0.3, 0.2]), (600, [1.0, 0.5, -1.0])):
        abar, x = SCHEDULE.alpha_bar(t), torch.tensor(point, dtype=torch.float64)
        log = -(x - math.sqrt(abar) * drawn).square().sum(dim=1) / (2.0 * (1.0 - abar))
        share = log.softmax(dim=0)
        expected = share @ drawn
        spread = ((drawn - expected).square() * (share**2)[:, None]).sum(dim=0).sqrt()
        got = GaussianDenoiser(g, SCHEDULE)(
            x[None], torch.tensor([t]), labels=torch.tensor([label])
        )[0]
        assert float(spread.max()) < 0.02
        assert float(((got - expected) / spread).abs().max()) < 4.5


def test_draws_have_the_moments_of_their_class() -> None:
    g = gaussians()
    drawn = g.draw(torch.full((200_000,), 1), generator=generator()).double()
    torch.testing.assert_close(drawn.mean(dim=0), g.means[1], atol=0.03, rtol=0.0)
    torch.testing.assert_close(torch.cov(drawn.T), covariance(g, 1), atol=0.04, rtol=0.0)
    two = g.draw(torch.full((100_000,), 0), generator=generator()).double().mean(dim=0)
    torch.testing.assert_close(two, (g.means[0] + 2.0 * g.means[2]) / 3.0, atol=0.05, rtol=0.0)
    with pytest.raises(ValueError, match="a class without components"):
        g.draw(torch.tensor([1, 2]), generator=generator())


def test_axis_aligned_components_are_the_mixture_of_the_toy() -> None:
    g = torch.Generator().manual_seed(4)
    means = torch.randn((3, 4), generator=g, dtype=torch.float64)
    variances = torch.rand((3, 4), generator=g, dtype=torch.float64) + 0.1
    mine = ClassGaussians(
        means=means,
        directions=torch.eye(4).expand(3, 4, 4),
        variances=variances,
        rest=torch.ones(3),
        weights=torch.ones(3),
        classes=torch.arange(3),
    )
    toys = MixtureDenoiser(GaussianMixture(means=means, variances=variances), SCHEDULE)
    x = torch.randn((8, 4), generator=g, dtype=torch.float64)
    t = torch.tensor([1, 50, 200, 400, 600, 800, 999, 1000])
    labels = torch.tensor([0, 1, 2, -1, -1, 0, 1, -1])
    torch.testing.assert_close(
        GaussianDenoiser(mine, SCHEDULE)(x, t, labels=labels), toys(x, t, labels=labels),
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip


@pytest.mark.slow
def test_the_sampler_draws_the_class_that_it_is_asked_for() -> None:
    g = gaussians()
    labels = torch.ones(4000, dtype=torch.int64)
    x_T = torch.randn((4000, 1, 2, 3), generator=generator())
    images = sample(
        GaussianDenoiser(g, SCHEDULE), x_T, labels=labels, schedule=SCHEDULE,
        generator=generator(1), t=1000, scheduler="ddim", num_steps=200,
    ).flatten(1).double()  # fmt: skip
    torch.testing.assert_close(images.mean(dim=0), g.means[1], atol=0.12, rtol=0.0)
    torch.testing.assert_close(torch.cov(images.T), covariance(g, 1), atol=0.25, rtol=0.0)


def test_it_takes_the_coarse_models_place() -> None:
    """Above the hand-over, mixed, guided, in the two-stage sampler."""
    above, below = (GaussianDenoiser(gaussians(seed=s), SCHEDULE) for s in (0, 1))
    x = torch.randn((4, 1, 2, 3), generator=generator())
    t = torch.tensor([100, 300, 100, 300])
    labels = torch.tensor([0, 0, 1, 1])
    both = HandOver(Guided(above, 1.0), below, 150)(x, t, labels=labels)
    one = [m(x, t, labels=labels) for m in (above, below)]
    torch.testing.assert_close(both, torch.where((t > 150)[:, None, None, None], *one))
    mixed = Mixed(above, below, torch.full((5,), 0.25))(x, t, labels=labels)
    torch.testing.assert_close(mixed, 0.25 * one[0] + 0.75 * one[1])
    settings = SamplerSettings(schedule=SCHEDULE, t0=150, num_steps=20)
    output = sample_in_batches(
        above, below, settings, image_shape=(1, 2, 3), labels=labels, generator=generator()
    )
    assert output.images.shape == (4, 1, 2, 3)
    assert output.images.dtype == torch.float32
    assert output.coarse is not None
    assert bool(output.images.isfinite().all())


def test_tensors_make_the_same_gaussians_again() -> None:
    g = gaussians()
    again = ClassGaussians(**g.tensors())
    assert {t.dtype for t in g.tensors().values()} == {torch.float32, torch.int64}
    x = torch.randn((5, 6), generator=generator())
    torch.testing.assert_close(again.log_joint(x), g.log_joint(x), rtol=1e-5, atol=1e-4)
    assert again.to(torch.device("cpu")).means.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"means": torch.zeros(3, 6)}, r"must be \(J, d\), \(J, r, d\), \(J, r\) and \(J,\)"),
        ({"rest": torch.tensor([1.0, 1.0, 1.0, 0.0])}, "variances must be positive, got 0"),
        ({"variances": -torch.ones(4, 2)}, "variances must be positive, got -1"),
        ({"weights": torch.zeros(4)}, "one of them positive"),
        ({"weights": torch.ones(3)}, r"weights and classes must be \(4,\)"),
        ({"rest": torch.full((4,), math.nan)}, "must be finite"),
        ({"directions": torch.ones(4, 2, 6)}, "directions must be orthonormal rows"),
    ],
)
def test_what_is_no_gaussian_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(gaussians(), **changes)
