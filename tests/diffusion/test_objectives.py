"""Losses: their optima are posterior means, their floors and weights are those of closed forms."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logit
from scipy.stats import norm

from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.objectives import (
    bridge_coefficients,
    denoising_loss,
    draw_timesteps,
    drop_labels,
    snr_weight,
    truncated_loss,
    weighted_error,
)
from fedpdm.diffusion.schedule import NoiseSchedule, make_schedule, q_sample
from fedpdm.diffusion.weightings import WEIGHTINGS, min_snr
from tests.support.oracles import GaussianPosterior, binomial_bounds, zero_mean_fault

SCHEDULE = make_schedule("linear", num_steps=200, beta_start=1e-3, beta_end=0.06)
T0 = 60
MEAN, COV = np.array([1.5, -0.5]), np.array([[1.2, 0.4], [0.4, 0.3]])
SHAPE = (1, 1, 2)

Loss = Callable[..., torch.Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_data(n: int, seed: int = 0) -> torch.Tensor:
    x = np.random.default_rng(seed).multivariate_normal(MEAN, COV, size=n)
    return torch.from_numpy(x).view(n, *SHAPE)


def released_data(n: int, t0: int = T0) -> torch.Tensor:
    """Releases of Gaussian data with a clip norm that never bites."""
    x_0 = gaussian_data(n)
    noise = torch.randn(x_0.shape, generator=generator(9), dtype=x_0.dtype)
    return q_sample(SCHEDULE, x_0, torch.full((n,), t0), noise=noise)


class Probe:
    """A denoising function that keeps what it was asked; answers `answer(x_t, t)`."""

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.answer = answer

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.x_t, self.t, self.labels, self.clipped = x_t, t, labels, clipped
        return self.answer(x_t, t)


def directional_derivatives(loss: Loss, posterior: Loss, x: torch.Tensor) -> np.ndarray:
    """Derivative of each example's loss at `posterior`, in six directions of change of x0_hat.

    Losses are quadratic in x0_hat, so the central difference is exact. Its mean over examples is
    zero in every direction if and only if the posterior is a stationary point.
    """
    labels = torch.zeros(len(x), dtype=torch.int64)
    directions = [
        lambda x_t, t, i=i, f=f: f(x_t, t) * torch.eye(2, dtype=x_t.dtype)[i].view(SHAPE)
        for i in range(2)
        for f in (
            lambda x_t, t: torch.ones_like(x_t),
            lambda x_t, t: x_t,
            lambda x_t, t: t.view(-1, 1, 1, 1) / SCHEDULE.num_steps * torch.ones_like(x_t),
        )
    ]

    def value(direction: Loss, step: float) -> torch.Tensor:
        def moved(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return posterior(x_t, t, labels=labels) + step * direction(x_t, t)

        return loss(Probe(moved), SCHEDULE, x, labels=labels, generator=generator(3))

    return np.stack([(value(d, 1.0) - value(d, -1.0)).numpy() / 2 for d in directions], axis=1)


def exact_posterior(abar: np.ndarray = SCHEDULE.alphas_cumprod) -> GaussianPosterior:
    return GaussianPosterior(abar, MEAN, COV)


@pytest.mark.slow
def test_the_truncated_optimum_is_the_posterior_mean_of_the_clean_image() -> None:
    loss = functools.partial(truncated_loss, t0=T0)
    x_tilde = released_data(50_000)
    exact = exact_posterior()
    assert zero_mean_fault(directional_derivatives(loss, exact, x_tilde)) is None
    # Planted faults: a shrunk posterior, the optimum of another data set, of a wrong schedule,
    # the denoiser of x_tilde itself (noise-to-noise), and data that were released elsewhere.
    a0 = SCHEDULE.alpha_bar(T0)
    noisy = GaussianPosterior(
        np.minimum(SCHEDULE.alphas_cumprod / a0, 1.0),
        a0**0.5 * MEAN,
        a0 * COV + (1 - a0) * np.eye(2),
    )
    for fault in (
        lambda x_t, t, labels: 0.93 * exact(x_t, t, labels=labels),
        GaussianPosterior(SCHEDULE.alphas_cumprod, MEAN + 0.1, COV),
        exact_posterior(make_schedule("linear", num_steps=200).alphas_cumprod),
        noisy,
    ):
        assert zero_mean_fault(directional_derivatives(loss, fault, x_tilde)) is not None
    elsewhere = directional_derivatives(loss, exact, released_data(50_000, t0=T0 + 15))
    assert zero_mean_fault(elsewhere) is not None


@pytest.mark.slow
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_denoising_optimum_is_the_posterior_mean(weighting: str) -> None:
    loss = functools.partial(denoising_loss, t_max=120, weighting=weighting)
    exact, x_0 = exact_posterior(), gaussian_data(50_000)
    assert zero_mean_fault(directional_derivatives(loss, exact, x_0)) is None
    fault = GaussianPosterior(SCHEDULE.alphas_cumprod, MEAN + 0.1, 1.5 * COV)
    assert zero_mean_fault(directional_derivatives(loss, fault, x_0)) is not None


def test_noise_to_noise_on_releases_learns_the_release() -> None:
    loss = functools.partial(denoising_loss, t_max=SCHEDULE.num_steps, weighting="v")
    a0 = SCHEDULE.alpha_bar(T0)
    of_releases = GaussianPosterior(
        SCHEDULE.alphas_cumprod, a0**0.5 * MEAN, a0 * COV + (1 - a0) * np.eye(2)
    )
    x_tilde = released_data(50_000)
    assert zero_mean_fault(directional_derivatives(loss, of_releases, x_tilde)) is None
    assert zero_mean_fault(directional_derivatives(loss, exact_posterior(), x_tilde)) is not None


def test_the_truncated_loss_of_a_point_mass_is_pure_noise_of_floor_one() -> None:
    n, d = 20_000, 12
    point = torch.linspace(-2, 2, d, dtype=torch.float64).view(1, 3, 2, 2)
    noise = torch.randn((n, 3, 2, 2), generator=generator(1), dtype=torch.float64)
    x_tilde = q_sample(SCHEDULE, point.expand(n, -1, -1, -1), torch.full((n,), T0), noise=noise)
    labels = torch.zeros(n, dtype=torch.int64)

    def losses(probe: Probe) -> np.ndarray:
        found = truncated_loss(
            probe, SCHEDULE, x_tilde, labels=labels, t0=T0, generator=generator(2)
        )
        return found.numpy() * d

    exact = Probe(lambda x_t, t: point.expand_as(x_t))
    found = losses(exact)
    assert stats.kstest(found, "chi2", args=(d,)).pvalue > 1e-6
    # At every t: the first steps after t0, the middle, the last ones.
    t = exact.t.numpy()
    for part in (t <= T0 + 10, (t > T0 + 10) & (t <= 190), t > 190):
        share = found[part] / d
        assert abs(share.mean() - 1) < 5 * math.sqrt(2 / d / part.sum())
    for fault in (Probe(lambda x_t, t: point + 0.3 + 0 * x_t), Probe(lambda x_t, t: 0 * x_t)):
        assert stats.kstest(losses(fault), "chi2", args=(d,)).pvalue < 1e-6


def test_bridge_coefficients_are_those_of_gaussian_conditioning() -> None:
    for t0 in (1, 20, 100, 199):
        a0 = SCHEDULE.alpha_bar(t0)
        levels = torch.tensor(sorted({t0 + 1, (t0 + 200) // 2, 200} - {t0}))
        abar = torch.tensor(SCHEDULE.alphas_cumprod)[levels]
        clean, noisy, variance = bridge_coefficients(abar, a0)
        for i, at in enumerate(abar.tolist()):
            # Joint covariance of (x_tilde, x_t, x_0) for x_0 of variance 7, by its construction
            # from independent (x_0, z, z').
            r = at / a0
            tilde = np.array([math.sqrt(a0), math.sqrt(1 - a0), 0.0])
            mixing = np.array(
                [tilde, math.sqrt(r) * tilde + [0, 0, math.sqrt(1 - r)], [1.0, 0.0, 0.0]]
            )
            joint = mixing @ np.diag([7.0, 1.0, 1.0]) @ mixing.T
            gain = np.linalg.solve(joint[1:, 1:], joint[0, 1:])
            left = joint[0, 0] - gain @ joint[1:, 0]
            assert float(noisy[i]) == pytest.approx(gain[0], rel=1e-8)
            assert float(clean[i]) == pytest.approx(gain[1], rel=1e-8)
            assert float(variance[i]) == pytest.approx(left, rel=1e-7)


def test_weights_turn_the_error_into_the_epsilon_and_v_losses() -> None:
    """(DDPM Eq. 14; Salimans and Ho 2022, section 4), computed from epsilon and v themselves."""
    n = 400
    x_0 = torch.randn((n, 3, 2, 2), generator=generator(0), dtype=torch.float64)
    probe = Probe(lambda x_t, t: 0.7 * x_t + 0.1)
    found = {}
    for weighting in WEIGHTINGS:
        found[weighting] = denoising_loss(
            probe, SCHEDULE, x_0, labels=torch.zeros(n), t_max=200, weighting=weighting,
            generator=generator(5),
        )  # fmt: skip
    abar = torch.tensor(SCHEDULE.alphas_cumprod)[probe.t].view(-1, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x0_hat = 0.7 * probe.x_t + 0.1
    noise, noise_hat = (probe.x_t - a * x_0) / s, (probe.x_t - a * x0_hat) / s
    v, v_hat = a * noise - s * x_0, a * noise_hat - s * x0_hat
    per_example = {
        "snr": (noise - noise_hat) ** 2,
        "v": (v - v_hat) ** 2,
        "uniform": (x_0 - x0_hat) ** 2,
        "min_snr": (x_0 - x0_hat) ** 2 * torch.minimum(abar / (1 - abar), torch.tensor(5.0)),
    }
    for weighting, expected in per_example.items():
        assert found[weighting].shape == (n,)
        assert torch.allclose(found[weighting], expected.flatten(1).mean(1), rtol=1e-9)
    assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
    with pytest.raises(ValueError, match="one of snr, v, min_snr, uniform, got 'p2'"):
        snr_weight(torch.tensor([0.5]), weighting="p2")
    assert snr_weight(torch.tensor([0.9]), weighting=min_snr(2.0)).item() == 2.0


def test_weighted_error_is_per_example() -> None:
    a, b = (torch.randn((3, 2, 4, 4), generator=generator(k)) for k in (0, 1))
    weight = torch.tensor([0.0, 1.0, 3.0])
    for i, found in enumerate(weighted_error(a, b, weight).tolist()):
        total = sum((x - y) ** 2 for x, y in zip(a[i].ravel(), b[i].ravel(), strict=True))
        assert found == pytest.approx(float(weight[i]) * float(total) / 32, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        (functools.partial(denoising_loss, t_max=T0, weighting="v"), 1, T0),
        (functools.partial(denoising_loss, t_max=200, weighting="v"), 1, 200),
        (functools.partial(truncated_loss, t0=T0), T0 + 1, 200),
        (functools.partial(truncated_loss, t0=199), 200, 200),
    ],
)
def test_levels_are_uniform_over_the_whole_range(loss: Loss, low: int, high: int) -> None:
    n = 20_000
    probe, labels = Probe(lambda x_t, t: x_t), torch.arange(n)
    losses = loss(probe, SCHEDULE, torch.ones(n, 1, 1, 1), labels=labels, generator=generator(0))
    assert losses.dtype == torch.float32
    assert torch.equal(probe.labels, labels)
    assert probe.clipped is None
    counts = np.bincount(probe.t.numpy())
    assert (counts[:low] == 0).all()
    assert len(counts) == high + 1
    if high > low:
        assert stats.chisquare(counts[low:]).pvalue > 1e-6


def test_losses_repeat_with_the_seed_and_pass_the_flag() -> None:
    x, labels = gaussian_data(8).float(), torch.zeros(8)
    flag = torch.arange(8) % 2 == 0
    probe = Probe(lambda x_t, t: x_t)
    run = functools.partial(
        denoising_loss, probe, SCHEDULE, x, labels=labels, t_max=50, weighting="v"
    )
    first = run(generator=generator(1), clipped=flag)
    assert probe.clipped is flag
    assert torch.equal(first, run(generator=generator(1)))
    assert not torch.equal(first, run(generator=generator(2)))


def test_labels_are_dropped_at_the_given_rate() -> None:
    labels = torch.arange(40_000) % 7
    dropped = drop_labels(labels, probability=0.1, generator=generator(0))
    assert torch.equal(dropped[dropped != NO_LABEL], labels[dropped != NO_LABEL])
    low, high = binomial_bounds(len(labels), 0.1)
    assert low <= int((dropped == NO_LABEL).sum()) <= high
    wrong = drop_labels(labels, probability=0.12, generator=generator(0))
    assert not low <= int((wrong == NO_LABEL).sum()) <= high
    assert drop_labels(labels, probability=0.0, generator=generator(0)) is labels
    assert torch.equal(dropped, drop_labels(labels, probability=0.1, generator=generator(0)))


def test_bad_ranges_are_refused() -> None:
    probe, x, labels = Probe(lambda x_t, t: x_t), torch.zeros(1, 1, 1, 1), torch.zeros(1)
    schedule: NoiseSchedule = SCHEDULE
    for t_min, t_max in ((1, 0), (1, 201), (0, 9), (9, 8)):
        words = f"must be in [1, 200], in this order, got {t_min} and {t_max}"
        with pytest.raises(ValueError, match=re.escape(words)):
            denoising_loss(
                probe, schedule, x, labels=labels, t_min=t_min, t_max=t_max, weighting="v",
                generator=generator(0),
            )  # fmt: skip
    for t0 in (0, 200, -3):
        with pytest.raises(ValueError, match=re.escape(f"t0 must be in [1, 199], got {t0}")):
            truncated_loss(probe, schedule, x, labels=labels, t0=t0, generator=generator(0))


@pytest.mark.parametrize("t_max", [1, 7, 642, 1000])
def test_logit_normal_timesteps_follow_their_law(t_max: int) -> None:
    """P(t <= k) = Phi(logit(k / t_max) + 1), by Kolmogorov's bound; another mean misses it."""
    count = 20_000
    t = draw_timesteps(
        count, t_max=t_max, timesteps="logit_normal", generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )  # fmt: skip
    assert t.dtype == torch.int64
    assert 1 <= int(t.min()) <= int(t.max()) <= t_max
    share = np.arange(1, t_max) / t_max
    found = (t.numpy()[:, None] <= np.arange(1, t_max)).mean(axis=0)
    bound = 1.95 / count**0.5  # exceeded once in a thousand
    distance = [
        np.abs(found - norm.cdf(logit(share) - mean)).max(initial=0.0) for mean in (-1.0, -0.9)
    ]
    assert distance[0] < bound
    assert t_max == 1 or distance[1] > bound


def test_an_unknown_law_of_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="timesteps must be one of uniform, logit_normal, got 'x'"):
        draw_timesteps(
            1, t_max=9, timesteps="x", generator=torch.Generator(), device=torch.device("cpu")
        )
