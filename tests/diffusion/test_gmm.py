"""The mixture's densities, scores and posterior means against integrals, slopes and oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fedpdm.diffusion.gmm import GaussianMixture, MixtureDenoiser, make_mixture, spectrum_variances
from fedpdm.diffusion.schedule import make_schedule, q_sample
from fedpdm.privacy.mechanism import release
from fedpdm.privacy.noise import SeededNoise
from tests.support.oracles import MixturePosterior, moments_fault

SCHEDULE = make_schedule("linear")


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


MIXTURE = GaussianMixture(
    means=tensor([[1.0, -2.0], [0.5, 3.0], [-2.0, 0.0]]),
    variances=tensor([[1.0, 0.2], [3.0, 0.5], [0.1, 2.0]]),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_density_integrates_to_one() -> None:
    mixture = make_mixture(num_classes=3, radius=2.0, variances=tensor([0.3]))
    for labels in (None, torch.tensor([1])):
        total, _ = integrate.quad(
            lambda x, y=labels: float(mixture.log_density(tensor([[x]]), y).exp()), -9, 9, limit=300
        )
        assert total == pytest.approx(1.0, abs=1e-8)


def test_density_is_scipys() -> None:
    x = torch.randn((20, 2), generator=generator(), dtype=torch.float64) * 3
    each = np.stack(
        [
            stats.multivariate_normal(m.numpy(), np.diag(v.numpy())).pdf(x.numpy())
            for m, v in zip(MIXTURE.means, MIXTURE.variances, strict=True)
        ]
    )
    assert np.allclose(MIXTURE.log_density(x).exp().numpy(), each.mean(axis=0), rtol=1e-10)
    labels = torch.arange(20) % 3
    expected = each[labels.numpy(), np.arange(20)]
    assert np.allclose(MIXTURE.log_density(x, labels).exp().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("labelled", [False, True])
def test_score_is_the_slope_of_the_log_density(labelled: bool) -> None:
    x = torch.randn((10, 2), generator=generator(1), dtype=torch.float64).requires_grad_()
    labels = torch.arange(10) % 3 if labelled else None
    MIXTURE.log_density(x, labels).sum().backward()
    assert x.grad is not None
    assert torch.allclose(MIXTURE.score(x.detach(), labels), x.grad, atol=1e-10)


@pytest.mark.parametrize("t", [1, 200, 700, 1000])
def test_denoiser_is_the_oracles_posterior_mean(t: int) -> None:
    mixture = GaussianMixture(means=MIXTURE.means, variances=torch.full((3, 2), 0.7).double())
    oracle = MixturePosterior(SCHEDULE.alphas_cumprod, mixture.means.numpy(), 0.7)
    x = torch.randn((12, 1, 1, 2), generator=generator(2)) * 2
    level, labels = torch.full((12,), t), torch.arange(12) % 4 - 1
    found = MixtureDenoiser(mixture, SCHEDULE)(x, level, labels=labels)
    assert torch.allclose(found, oracle(x, level, labels=labels), atol=1e-4)
    # Planted fault: the labels of the neighbours.
    if t > 1:
        assert not torch.allclose(found, oracle(x, level, labels=labels.roll(1)), atol=1e-2)


def test_noised_mixture_is_what_q_sample_makes() -> None:
    n, t = 20_000, 300
    labels = torch.full((n,), 1)
    x_0 = MIXTURE.draw(labels, generator=generator(3))
    noise = torch.randn(x_0.shape, generator=generator(4))
    x_t = q_sample(SCHEDULE, x_0, torch.full((n,), t), noise=noise)
    at_t = MIXTURE.noised(SCHEDULE.alpha_bar(t))
    mean, cov = at_t.means[1].numpy(), np.diag(at_t.variances[1].numpy())
    assert moments_fault(x_t.numpy(), mean, cov) is None
    assert moments_fault(x_t.numpy() * 1.05, mean, cov) is not None


def released(noise_scale: float) -> np.ndarray:
    class Scaled(SeededNoise):
        def fill(self, out: np.ndarray) -> None:
            super().fill(out)
            out *= noise_scale

    n = 20_000
    labels = torch.full((n,), 2)
    points = MIXTURE.draw(labels, generator=generator(5)).view(n, 1, 1, 2)
    made = release(
        points, labels, schedule=SCHEDULE, t0=300, clip_norm=1000.0, shift=0.0,
        noise=Scaled(np.random.SeedSequence(6)), largest=1000.0,
    )  # fmt: skip
    return made.x_tilde.flatten(1).numpy()


def test_released_points_have_the_released_density() -> None:
    at_t0 = MIXTURE.noised(SCHEDULE.alpha_bar(300))
    mean, cov = at_t0.means[2].numpy(), np.diag(at_t0.variances[2].numpy())
    assert moments_fault(released(1.0), mean, cov) is None
    assert moments_fault(released(0.9), mean, cov) is not None  # noise of the wrong variance


def test_spectra_have_the_same_total() -> None:
    for spectrum in ("unit", "power"):
        assert float(spectrum_variances(spectrum, 16).sum()) == pytest.approx(16.0)
    power = spectrum_variances("power", 4, exponent=2.0)
    assert torch.allclose(power / power[0], tensor([1.0, 1 / 4, 1 / 9, 1 / 16]))


def test_means_lie_on_the_circle() -> None:
    mixture = make_mixture(num_classes=5, radius=3.0, variances=torch.ones(4).double())
    assert torch.allclose(mixture.means.norm(dim=1), torch.full((5,), 3.0).double())
    gaps = torch.pdist(mixture.means[[0, 1, 2]])
    assert float(gaps[0]) == pytest.approx(6 * math.sin(math.pi / 5))
    line = make_mixture(num_classes=3, radius=3.0, variances=torch.ones(1).double())
    assert line.means[:, 0].tolist() == [-3.0, 0.0, 3.0]


def test_repeated_mixture_and_draws() -> None:
    twice = MIXTURE.repeated(2)
    assert twice.num_classes == 6
    assert torch.equal(twice.means[3:], MIXTURE.means)
    x = MIXTURE.draw(torch.arange(3).repeat(5000), generator=generator(7)).view(5000, 3, 2)
    for k in range(3):
        cov = np.diag(MIXTURE.variances[k].numpy())
        assert moments_fault(x[:, k].numpy(), MIXTURE.means[k].numpy(), cov) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spectrum_variances("pink", 3), "spectrum must be one of unit, power, got 'pink'"),
        (lambda: spectrum_variances("unit", 0), "dim must be at least 1, got 0"),
        (lambda: MIXTURE.noised(0.0), "alpha_bar must be in (0, 1], got 0.0"),
        (
            lambda: make_mixture(num_classes=0, radius=1, variances=torch.ones(2)),
            "num_classes must be at least 1, got 0",
        ),
        (
            lambda: make_mixture(num_classes=2, radius=math.nan, variances=torch.ones(2)),
            "radius must be at least 0, got nan",
        ),
        (
            lambda: GaussianMixture(means=torch.zeros(2, 3), variances=torch.zeros(2, 3)),
            "variances must be positive, got 0",
        ),
        (
            lambda: GaussianMixture(means=torch.zeros(2, 3), variances=torch.ones(2, 2)),
            "one shape (K, d), got (2, 3) and (2, 2)",
        ),
    ],
)
def test_bad_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()  # type: ignore[operator]
    assert message in str(caught.value)
