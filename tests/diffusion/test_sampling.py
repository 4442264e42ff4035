"""The two-stage sampler with exact denoisers: the distribution of its samples, the hand-over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import CHAINS, SamplerOutput, SamplerSettings, sample_two_stage
from tests.support.oracles import (
    GaussianPosterior,
    chain_moments,
    moments_fault,
    trailing_levels,
)

# diffusers' solver under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHORT = make_schedule("linear", num_steps=100, beta_start=1e-3, beta_end=0.2)
ABAR = SHORT.alphas_cumprod
T0, A0 = 30, float(ABAR[30])
MEAN, COV = np.array([1.5, -0.5]), np.array([[1.2, 0.4], [0.4, 0.3]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data_posterior() -> GaussianPosterior:
    return GaussianPosterior(ABAR, MEAN, COV)


def release_posterior() -> GaussianPosterior:
    """The noise-to-noise coarse denoiser: of x_tilde, whose data are releases at T0."""
    return GaussianPosterior(ABAR, A0**0.5 * MEAN, A0 * COV + (1 - A0) * np.eye(2))


def run(coarse: object, fine: object, n: int = 20_000, **options: object) -> SamplerOutput:
    given = {"schedule": SHORT, "t0": T0, "scheduler": "ddpm", "num_steps": 100, **options}
    labels = given.pop("labels", torch.zeros(n, dtype=torch.int64))
    x_T = torch.randn((n, 1, 1, 2), generator=generator(10))
    settings = SamplerSettings(**given)  # type: ignore[arg-type]
    return sample_two_stage(coarse, fine, x_T, settings, labels=labels, generator=generator(11))  # type: ignore[arg-type]


# --- The distribution of the samples --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [100, 60, 25])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_truncated_chain_has_the_moments_of_the_formula(scheduler: str, num_steps: int) -> None:
    posterior = data_posterior()
    output = run(data_posterior(), posterior, scheduler=scheduler, num_steps=num_steps)
    levels = trailing_levels(100, num_steps)
    mean, cov = chain_moments(
        ABAR,
        levels,
        lambda t: posterior,
        mean=[0, 0],
        cov=np.eye(2),
        stochastic=scheduler == "ddpm",
    )
    assert moments_fault(output.images.flatten(1), mean, cov) is None
    # Planted fault: half of the steps.
    fewer = run(posterior, posterior, scheduler=scheduler, num_steps=num_steps // 2)
    assert moments_fault(fewer.images.flatten(1), mean, cov) is not None
    assert output.images.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_two_chains_have_the_moments_of_the_formula(scheduler: str) -> None:
    coarse, fine = release_posterior(), data_posterior()
    output = run(coarse, fine, scheduler=scheduler, num_steps=130, chain="noise_to_noise")
    stochastic = scheduler == "ddpm"
    mean, cov = chain_moments(
        ABAR, trailing_levels(100, 100), lambda t: coarse,
        mean=[0, 0], cov=np.eye(2), stochastic=stochastic,
    )  # fmt: skip
    mean, cov = chain_moments(
        ABAR, trailing_levels(T0, T0), lambda t: fine, mean=mean, cov=cov, stochastic=stochastic
    )
    assert moments_fault(output.images.flatten(1), mean, cov) is None
    assert sorted(set(coarse.levels)) == list(range(1, 101))
    assert sorted(set(fine.levels)) == list(range(1, T0 + 1))


LONG = make_schedule("linear")


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    ("scheduler", "num_steps", "slack"),
    [
        ("ddpm", 1300, 0.06),
        ("ddim", 1300, 0.02),
        ("ddim", 700, 0.03),  # does not divide T
        ("dpm_solver", 120, 0.06),
        ("EulerDiscreteScheduler", 700, 0.03),
        ("UniPCMultistepScheduler", 120, 0.06),
    ],
)
def test_samples_are_distributed_as_the_data(
    chain: str, scheduler: str, num_steps: int, slack: float
) -> None:
    abar, t0 = LONG.alphas_cumprod, 300
    fine = coarse = GaussianPosterior(abar, MEAN, COV)
    if chain == "noise_to_noise":
        a0 = abar[t0]
        coarse = GaussianPosterior(abar, a0**0.5 * MEAN, a0 * COV + (1 - a0) * np.eye(2))
    options = {"schedule": LONG, "t0": t0, "scheduler": scheduler, "chain": chain}
    n = 4000 if num_steps > 100 else 20_000
    output = run(coarse, fine, n, num_steps=num_steps, **options)
    samples = output.images.flatten(1)
    assert moments_fault(samples, MEAN, COV, slack=slack) is None
    assert moments_fault(0.8 * samples, MEAN, COV, slack=slack) is not None
    if chain == "truncated":  # planted fault: the coarse model of the other chain
        a0 = abar[t0]
        wrong = GaussianPosterior(abar, a0**0.5 * MEAN, a0 * COV + (1 - a0) * np.eye(2))
        images = run(wrong, fine, n, num_steps=num_steps, **options).images.flatten(1)
        assert moments_fault(images, MEAN, COV, slack=slack) is not None


# --- The hand-over --------------------------------------------------------------------------

MU_G, MU_M = np.array([2.0, 0.0]), np.array([-1.0, 1.0])


def experts(t0: int = T0) -> tuple[GaussianPosterior, GaussianPosterior, np.ndarray]:
    """Coarse and fine posteriors of unit covariance, and the mean of METHOD.md section 4."""
    sigma2 = (1 - ABAR[t0]) / ABAR[t0]
    expected = (MU_G + sigma2 * MU_M) / (1 + sigma2)
    unit = np.eye(2)
    return GaussianPosterior(ABAR, MU_G, unit), GaussianPosterior(ABAR, MU_M, unit), expected


def handed_over(output: SamplerOutput, t0: int = T0) -> str | None:
    coarse, fine, expected = experts(t0)
    mean, cov = chain_moments(
        ABAR, trailing_levels(100, 100), lambda t: coarse if t > t0 else fine,
        mean=MU_G * 0, cov=np.eye(2), stochastic=True,
    )  # fmt: skip
    a_T = ABAR[100] ** 0.5  # pure noise instead of N(a_T mu_G, I) shifts the mean by a_T a_0^2 mu_G
    assert np.allclose(mean, expected, atol=2 * a_T)
    return moments_fault(output.images.flatten(1), mean, cov)


@pytest.mark.slow
@pytest.mark.parametrize("t0", [10, 30, 70])
def test_the_mean_is_that_of_section_4(t0: int) -> None:
    coarse, fine, _ = experts(t0)
    assert handed_over(run(coarse, fine, t0=t0), t0) is None
    assert coarse.levels == list(range(100, t0, -1))
    assert fine.levels == list(range(t0, 0, -1))


@pytest.mark.slow
def test_faults_in_the_hand_over_are_detected() -> None:
    coarse, fine, _ = experts()

    def above(x_t: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        return (fine if int(t[0]) <= T0 + 3 else coarse)(x_t, t, **given)

    n = 8000
    assert handed_over(run(coarse, fine, n)) is None
    assert handed_over(run(coarse, fine, n, t0=T0 + 3)) is not None  # at the wrong level
    assert handed_over(run(coarse, fine, n, t0=T0 - 3)) is not None
    assert handed_over(run(above, fine, n)) is not None  # fine used above t0
    assert handed_over(run(fine, coarse, n)) is not None  # swapped
    assert handed_over(run(None, fine, n)) is not None
    assert handed_over(run(coarse, None, n)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "dpm_solver"])
def test_deterministic_samplers_keep_more_of_the_coarse_mean(scheduler: str) -> None:
    # The probability flow keeps x_t - a_t mu at unit covariance, so the coarse mean keeps weight
    # a_t0 = (1 + sigma^2)^-1/2, where the ancestral sampler of section 4 leaves it a_t0^2.
    abar, t0 = LONG.alphas_cumprod, 300
    coarse, fine = (GaussianPosterior(abar, m, np.eye(2)) for m in (MU_G, MU_M))
    weight = abar[t0] ** 0.5
    options = {"schedule": LONG, "t0": t0, "scheduler": scheduler, "num_steps": 1000}
    images = run(coarse, fine, 4000, **options).images.flatten(1)
    expected = weight * MU_G + (1 - weight) * MU_M
    assert moments_fault(images, expected, np.eye(2), slack=0.03) is None
    section4 = weight**2 * MU_G + (1 - weight**2) * MU_M
    assert moments_fault(images, section4, np.eye(2), slack=0.03) is not None


def test_the_coarse_estimate_is_the_coarse_models_last_word() -> None:
    n = 500
    coarse, fine, _ = experts()
    output = run(coarse, fine, n, scheduler="ddim")
    assert output.coarse is not None
    # At t0 + 1 the estimate is K x + k with x ~ N(a mu_G, about 1).
    assert np.abs(output.coarse.flatten(1).mean(0).numpy() - MU_G).max() < 0.3
    constant = GaussianPosterior(ABAR, [3.0, 4.0], 1e-9 * np.eye(2))
    output = run(constant, fine, n, chain="noise_to_noise", num_steps=130)
    assert output.coarse is not None  # scaled back from x_tilde to clean images
    back = output.coarse.flatten(1) * ABAR[T0] ** 0.5
    assert torch.allclose(back, torch.tensor([3.0, 4.0]).expand(n, 2), atol=1e-3)
    assert run(None, fine, n).coarse is None
    assert run(coarse, fine, n, t0=100).coarse is None
