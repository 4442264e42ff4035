"""Coarse and fine model mixed above t0, and the fine stage by itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy import optimize

from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import SamplerOutput, SamplerSettings, refine, sample_two_stage
from fedpdm.setup.build import coarse_share
from tests.support.federations import small_config
from tests.support.oracles import (
    Array,
    GaussianPosterior,
    chain_moments,
    moments_fault,
    trailing_levels,
)

# diffusers' solver under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHORT = make_schedule("linear", num_steps=100, beta_start=1e-3, beta_end=0.2)
ABAR = SHORT.alphas_cumprod
T0 = 30
MU_G, COV_G = np.array([2.0, 0.0]), np.array([[1.2, 0.4], [0.4, 0.3]])
MU_M, COV_M = np.array([-1.0, 1.0]), np.array([[0.5, -0.2], [-0.2, 0.9]])
SCHEDULERS = ("ddpm", "ddim", "dpm_solver")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def experts() -> tuple[GaussianPosterior, GaussianPosterior]:
    return GaussianPosterior(ABAR, MU_G, COV_G), GaussianPosterior(ABAR, MU_M, COV_M)


def run(coarse: object, fine: object, n: int = 300, **options: object) -> SamplerOutput:
    given = {"schedule": SHORT, "t0": T0, "scheduler": "ddpm", "num_steps": 100, **options}
    labels = given.pop("labels", torch.zeros(n, dtype=torch.int64))
    x_T = torch.randn((n, 1, 1, 2), generator=generator(10))
    settings = SamplerSettings(**given)  # type: ignore[arg-type]
    return sample_two_stage(coarse, fine, x_T, settings, labels=labels, generator=generator(11))  # type: ignore[arg-type]


class Mixed:
    """The affine answer of two Gaussian posteriors, `share` of the first's, by arithmetic."""

    def __init__(self, share: float) -> None:
        self.share, self.parts = share, experts()

    def affine(self, t: int) -> tuple[Array, Array]:
        (a, b), (c, d) = (part.affine(t) for part in self.parts)
        return self.share * a + (1 - self.share) * c, self.share * b + (1 - self.share) * d


# --- The share in the sampler ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_whole_and_no_share_are_the_models_by_themselves(scheduler: str, guidance: float) -> None:
    options = {"scheduler": scheduler, "guidance": guidance, "num_steps": 20}

    def images(share: float) -> torch.Tensor:
        return run(*experts(), coarse_share=torch.tensor([share, share]), **options).images

    handed_over = run(*experts(), **options).images
    alone = run(None, experts()[1], **options).images
    assert torch.equal(images(1.0), handed_over)
    assert torch.equal(images(0.0), alone)
    assert not torch.allclose(handed_over, alone, atol=0.1)
    between = images(0.5)
    assert not torch.allclose(between, handed_over, atol=0.1)
    assert not torch.allclose(between, alone, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.8])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_mixture_has_the_moments_of_the_formula(scheduler: str, share: float) -> None:
    def fault(asked: float) -> str | None:
        shares = torch.tensor([asked, 0.5])
        output = run(*experts(), 20_000, scheduler=scheduler, coarse_share=shares)
        return moments_fault(output.images.flatten(1), mean, cov)

    mixed, (_, fine) = Mixed(share), experts()
    mean, cov = chain_moments(
        ABAR,
        trailing_levels(100, 100),
        lambda t: mixed if t > T0 else fine,  # type: ignore[arg-type, return-value]
        mean=[0, 0],
        cov=np.eye(2),
        stochastic=scheduler == "ddpm",
    )
    assert fault(share) is None
    assert fault(1 - share) is not None  # planted faults
    assert fault(1.0) is not None
    assert fault(0.0) is not None


def test_the_mean_of_unit_components() -> None:
    """METHOD.md section 4 with a coarse mean that is itself a weighted one."""
    coarse, fine = (GaussianPosterior(ABAR, mean, np.eye(2)) for mean in (MU_G, MU_M))
    share, sigma2 = 0.4, (1 - ABAR[T0]) / ABAR[T0]
    images = run(coarse, fine, 20_000, coarse_share=torch.full((2,), share)).images.flatten(1)
    above = share * MU_G + (1 - share) * MU_M
    expected = (above + sigma2 * MU_M) / (1 + sigma2)
    # A chain of 100 steps loses 7 % of the variance.
    assert moments_fault(images, expected, np.eye(2), slack=0.05) is None
    unmixed = (MU_G + sigma2 * MU_M) / (1 + sigma2)
    assert moments_fault(images, unmixed, np.eye(2), slack=0.05) is not None


def test_calls_and_levels_of_a_mixture() -> None:
    coarse, fine = experts()
    output = run(coarse, fine, 3, coarse_share=torch.full((2,), 0.5))
    assert coarse.levels == list(range(100, T0, -1))
    assert fine.levels == list(range(100, 0, -1))
    assert all(flag is None for flag in coarse.flags)
    assert all(flag is not None and not flag.any() for flag in fine.flags)
    assert output.coarse is not None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_shares_by_label(guidance: float) -> None:
    """Constant answers, handed over at 0: what comes out is the mixture itself."""

    def answer(value: float) -> object:
        def denoise(x_t: torch.Tensor, t: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full_like(x_t, value)

        return denoise

    labels = torch.tensor([2, NO_LABEL, 0, 1, NO_LABEL, 2])
    share = torch.tensor([1.0, 0.25, 0.0, 0.6], dtype=torch.float64)
    output = run(
        answer(8.0), answer(-2.0), 6, t0=0, labels=labels, coarse_share=share, scheduler="ddim",
        guidance=guidance,
    )  # fmt: skip
    expected = [-2.0, 4.0, 8.0, 0.5, 4.0, -2.0]
    assert output.images[:, 0, 0, 1].tolist() == pytest.approx(expected, abs=1e-5)
    assert output.images.dtype == torch.float32


def test_one_model_alone_has_nothing_to_share() -> None:
    coarse, fine = experts()
    share = torch.full((2,), 0.3)
    for first, second in ((coarse, None), (None, fine)):
        with_share = run(first, second, coarse_share=share, num_steps=20).images
        assert torch.equal(with_share, run(first, second, num_steps=20).images)


def test_shares_are_refused_with_two_chains() -> None:
    words = "coarse_share needs the chain truncated, got 'noise_to_noise'"
    with pytest.raises(ValueError, match=f"^{words}$"):
        run(*experts(), chain="noise_to_noise", coarse_share=torch.full((2,), 0.5))


# --- The share that a config asks for -------------------------------------------------------


def test_share_of_a_client() -> None:
    labels = np.repeat([0, 1, 3], [30, 10, 5])
    assert coarse_share(small_config(), labels, num_classes=4) is None
    config = small_config(sampling={"coarse_worth": 10.0})
    share = coarse_share(config, labels, num_classes=4)
    assert share is not None
    assert share.dtype == torch.float32
    expected = [10 / 40, 10 / 20, 1.0, 10 / 15, 10 / (10 + 45 / 4)]
    assert share.tolist() == pytest.approx(expected, rel=1e-6)
    for count, chosen in zip((30, 10, 5), (0.25, 0.5, 2 / 3), strict=True):
        best = optimize.minimize_scalar(  # variance of the weighted mean of both estimates
            lambda w, n=count: w**2 / 10 + (1 - w) ** 2 / n, bounds=(0, 1), method="bounded"
        )
        assert best.x == pytest.approx(chosen, abs=1e-4)


# --- The fine stage by itself ---------------------------------------------------------------


def noised(n: int, t: int) -> torch.Tensor:
    """Images of N(MU_M, COV_M) at level t, by arithmetic; float32 (n, 1, 1, 2)."""
    rng = np.random.default_rng(3)
    x_0 = rng.multivariate_normal(MU_M, COV_M, size=n)
    x_t = ABAR[t] ** 0.5 * x_0 + (1 - ABAR[t]) ** 0.5 * rng.standard_normal((n, 2))
    return torch.from_numpy(x_t).float().view(n, 1, 1, 2)


def refined(x_t: torch.Tensor, fine: object, t: int, **options: object) -> torch.Tensor:
    labels = torch.zeros(len(x_t), dtype=torch.int64)
    settings = SamplerSettings(schedule=SHORT, t0=T0, **options)  # type: ignore[arg-type]
    return refine(fine, x_t, settings, t=t, labels=labels, generator=generator(11))  # type: ignore[arg-type]


def test_refining_from_level_0_gives_the_images_back() -> None:
    x = noised(5, 0)
    fine = experts()[1]
    assert torch.equal(refined(x, fine, 0), x)
    assert fine.levels == []


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [100, 20])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_refining_from_level_T_is_sampling_alone(scheduler: str, num_steps: int) -> None:
    x_T = torch.randn((300, 1, 1, 2), generator=generator(10))
    options = {"scheduler": scheduler, "num_steps": num_steps}
    images = refined(x_T, experts()[1], 100, **options)
    assert torch.equal(images, run(None, experts()[1], **options).images)
    assert not torch.equal(refined(x_T, experts()[1], 90, **options), images)


@pytest.mark.slow
@pytest.mark.parametrize("t", [10, 40, 70])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_refining_noised_images_has_the_moments_of_the_formula(scheduler: str, t: int) -> None:
    fine, n = experts()[1], 20_000
    images = refined(noised(n, t), fine, t, scheduler=scheduler, num_steps=t).flatten(1)
    assert fine.levels == list(range(t, 0, -1))
    assert all(flag is not None and not flag.any() for flag in fine.flags)
    mean, cov = chain_moments(
        ABAR, trailing_levels(t, t), lambda _: fine, mean=ABAR[t] ** 0.5 * MU_M,
        cov=ABAR[t] * COV_M + (1 - ABAR[t]) * np.eye(2), stochastic=scheduler == "ddpm",
    )  # fmt: skip
    assert moments_fault(images, mean, cov) is None
    assert np.allclose(mean, MU_M, atol=0.02)  # whatever the level
    # Planted faults: told another level, and images that were not noised.
    wrong = refined(noised(n, t), fine, t // 2, scheduler=scheduler, num_steps=t).flatten(1)
    assert moments_fault(wrong, mean, cov) is not None
    clean = refined(noised(n, 0), fine, t, scheduler=scheduler, num_steps=t).flatten(1)
    assert moments_fault(clean, mean, cov) is not None


@pytest.mark.slow
@pytest.mark.parametrize("t", [100, 300, 700])
def test_refining_with_the_exact_posterior_returns_the_distribution(t: int) -> None:
    """Mean and variance of the data themselves, at every level, on the chain of T = 1000."""
    schedule = make_schedule("linear")
    abar = schedule.alphas_cumprod
    rng, n = np.random.default_rng(4), 6000
    x_0 = rng.multivariate_normal(MU_M, COV_M, size=n)
    x_t = abar[t] ** 0.5 * x_0 + (1 - abar[t]) ** 0.5 * rng.standard_normal((n, 2))
    fine = GaussianPosterior(abar, MU_M, COV_M)
    images = refine(
        fine, torch.from_numpy(x_t).float().view(n, 1, 1, 2),
        SamplerSettings(schedule=schedule, t0=0, num_steps=t), t=t,
        labels=torch.zeros(n, dtype=torch.int64), generator=generator(1),
    ).flatten(1)  # fmt: skip
    assert moments_fault(images, MU_M, COV_M, slack=0.03) is None
    assert moments_fault(0.8 * images, MU_M, COV_M, slack=0.03) is not None


@pytest.mark.parametrize("t", [-1, 101])
def test_refining_from_nowhere_is_refused(t: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"t must be in [0, 100], got {t}")):
        refined(noised(2, 0), experts()[1], t)
