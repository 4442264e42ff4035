"""How the sampler asks its denoisers: calls, flags, labels, guidance, batches, errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.sampling import make_scheduler, sample
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import (
    CHAINS,
    SamplerOutput,
    SamplerSettings,
    sample_in_batches,
    sample_two_stage,
)
from tests.support.cases import every
from tests.support.oracles import (
    GaussianPosterior,
    MixturePosterior,
    binomial_bounds,
    moments_fault,
)

# diffusers' solver under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHORT = make_schedule("linear", num_steps=100, beta_start=1e-3, beta_end=0.2)
ABAR = SHORT.alphas_cumprod
T0 = 30


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data_posterior() -> GaussianPosterior:
    return GaussianPosterior(ABAR, [1.5, -0.5], [[1.2, 0.4], [0.4, 0.3]])


def run(coarse: object, fine: object, n: int = 4, **options: object) -> SamplerOutput:
    given = {"schedule": SHORT, "t0": T0, "scheduler": "ddpm", "num_steps": 100, **options}
    labels = given.pop("labels", torch.zeros(n, dtype=torch.int64))
    x_T = torch.randn((n, 1, 1, 2), generator=generator(10))
    settings = SamplerSettings(**given)  # type: ignore[arg-type]
    return sample_two_stage(coarse, fine, x_T, settings, labels=labels, generator=generator(11))  # type: ignore[arg-type]


# --- Calls, flags, labels, guidance ---------------------------------------------------------


@pytest.mark.slow
@every(
    "options, coarse_calls, fine_calls",
    [
        ({}, 70, 30),
        ({"num_steps": 500}, 70, 30),
        ({"num_steps": 10}, 7, 3),
        ({"t0": 0}, 100, 0),
        ({"t0": 100}, 0, 100),
        ({"num_steps": 1}, 1, 0),
        ({"chain": "noise_to_noise", "num_steps": 130}, 100, 30),
        ({"chain": "noise_to_noise", "num_steps": 999}, 100, 30),
        ({"chain": "noise_to_noise", "num_steps": 13}, 10, 3),
        ({"chain": "noise_to_noise", "num_steps": 1}, 1, 1),
        ({"chain": "noise_to_noise", "num_steps": 20, "t0": 0}, 20, 0),
        ({"chain": "noise_to_noise", "num_steps": 200, "t0": 1}, 100, 1),
    ],
)
@every("scheduler", ["ddpm", "ddim", "dpm_solver"])
def test_each_denoiser_is_called_as_often_as_its_share(
    scheduler: str, options: dict[str, object], coarse_calls: int, fine_calls: int
) -> None:
    coarse, fine = data_posterior(), data_posterior()
    output = run(coarse, fine, scheduler=scheduler, **options)
    assert (len(coarse.levels), len(fine.levels)) == (coarse_calls, fine_calls)
    assert bool(torch.isfinite(output.images).all())


@pytest.mark.parametrize("chain", CHAINS)
def test_one_denoiser_alone_runs_the_whole_chain(chain: str) -> None:
    fine, coarse = data_posterior(), data_posterior()
    alone = run(None, fine, chain=chain)
    assert alone.coarse is None
    attacker = run(coarse, None, num_steps=130, chain=chain)
    assert attacker.coarse is not None
    assert fine.levels == coarse.levels == list(range(100, 0, -1))


def test_only_the_fine_model_sees_the_flag_and_it_is_unset() -> None:
    coarse, fine = data_posterior(), data_posterior()
    run(coarse, fine, guidance=2.0)
    assert all(flag is None for flag in coarse.flags)
    assert all(flag is not None and flag.tolist() == [False] * 8 for flag in fine.flags)
    fine.flags.clear()
    x_T = torch.randn((4, 1, 1, 2), generator=generator(10))
    given = {"labels": torch.zeros(4, dtype=torch.int64), "generator": generator(11)}
    sample(fine, x_T, schedule=SHORT, **given)  # type: ignore[arg-type]
    assert all(flag is None for flag in fine.flags)
    assert len(fine.flags) == 50


def test_guidance_moves_away_from_the_unlabelled_answer() -> None:
    def constant(x_t: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        value = torch.where(given["labels"] == NO_LABEL, -1.0, given["labels"] + 2.0)
        return value.view(-1, 1, 1, 1).expand_as(x_t)

    labels = torch.tensor([0, 3, NO_LABEL])
    for weight in (0.0, 1.0, 2.5):
        output = run(constant, constant, 3, labels=labels, guidance=weight, scheduler="ddim")
        expected = [-1 + weight * (2 + 1), -1 + weight * (5 + 1), -1.0]
        assert output.images[:, 0, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_labels_choose_the_component_and_no_label_means_all() -> None:
    mixture = MixturePosterior(ABAR, [[4.0, 0.0], [-4.0, 0.0]], 0.25)
    n = 3000
    labels = torch.tensor([0, 1, NO_LABEL]).repeat_interleave(n // 3)
    images = run(mixture, mixture, n, labels=labels).images.flatten(1)
    assert moments_fault(images[:1000], [4, 0], 0.25 * np.eye(2), slack=0.15) is None
    assert moments_fault(images[1000:2000], [-4, 0], 0.25 * np.eye(2), slack=0.15) is None
    low, high = binomial_bounds(1000, 0.5)
    assert low <= int((images[2000:, 0] > 0).sum()) <= high
    assert float(images[2000:, 0].abs().min()) > 1


def test_the_same_seeds_repeat_and_batches_keep_their_order() -> None:
    fine = data_posterior()
    assert torch.equal(run(fine, fine, 50).images, run(fine, fine, 50).images)

    calls = {"coarse": 0, "fine": 0}

    def by_label(role: str) -> DenoisingFunction:
        def ask(x_t: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            calls[role] += 1
            return given["labels"].view(-1, 1, 1, 1).expand_as(x_t).to(x_t.dtype)

        return ask  # type: ignore[return-value]

    def batches(coarse: DenoisingFunction | None, size: int = 256) -> SamplerOutput:
        return sample_in_batches(
            coarse, by_label("fine"),
            SamplerSettings(schedule=SHORT, t0=T0, num_steps=10, batch_size=size),
            image_shape=(2, 3, 4), labels=labels, generator=generator(0),
        )  # fmt: skip

    labels = torch.arange(7)
    for size, num_batches in ((3, 3), (7, 1), (100, 1)):
        calls.update(coarse=0, fine=0)
        output = batches(by_label("coarse"), size)
        assert output.images.shape == (7, 2, 3, 4)
        assert output.coarse is not None
        assert output.images[:, 0, 0, 0].round().tolist() == labels.tolist()
        assert calls == {"coarse": 7 * num_batches, "fine": 3 * num_batches}
    assert batches(None).coarse is None


# --- Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t0": -1}, "t0 must be in [0, 100], got -1"),
        ({"t0": 101}, "t0 must be in [0, 100], got 101"),
        ({"num_steps": 0}, "sampling.num_steps must be at least 1, got 0"),
        ({"chain": "both"}, "chain must be one of truncated, noise_to_noise, got 'both'"),
        ({"scheduler": "euler"}, "one of ddpm, ddim, dpm_solver or a diffusers scheduler class"),
        ({"scheduler": "UNet2DModel"}, "or a diffusers scheduler class, got 'UNet2DModel'"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot be used here: "),
    ],
)
def test_bad_requests_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(data_posterior(), data_posterior(), **options)


def test_a_denoiser_is_needed() -> None:
    with pytest.raises(ValueError, match="sample needs a coarse or a fine denoiser"):
        run(None, None)


@pytest.mark.parametrize("name", ["ddpm", "DDPMScheduler", "DDIMScheduler"])
def test_no_scheduler_clips_to_the_unshifted_range(name: str) -> None:
    assert make_scheduler(name, SHORT.betas).config.clip_sample is False
    far = GaussianPosterior(ABAR, [7.0, -9.0], 0.01 * np.eye(2))
    images = run(far, far, 50, scheduler=name).images.flatten(1)
    assert torch.allclose(images.mean(0), torch.tensor([7.0, -9.0]), atol=0.2)


@pytest.mark.parametrize("num_steps", [100, 50, 20])
def test_ddim_is_diffusers_ddim_wherever_that_one_is_right(num_steps: int) -> None:
    coarse, fine = data_posterior(), GaussianPosterior(ABAR, [-1.0, 1.0], np.eye(2))
    ours = run(coarse, fine, 20, scheduler="ddim", num_steps=num_steps)
    theirs = run(coarse, fine, 20, scheduler="DDIMScheduler", num_steps=num_steps)
    assert torch.allclose(ours.images, theirs.images, atol=2e-4)
