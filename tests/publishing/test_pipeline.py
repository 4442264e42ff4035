"""The diffusers pipeline against the sampler, and exports against the run they come from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fedpdm.data import denormalize
from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser, DenoiserSpec
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.diffusion.schedule import NoiseSchedule, make_schedule
from fedpdm.diffusion.twostage import SamplerSettings, as_asked, sample_two_stage, stages
from fedpdm.publishing.pipeline import PFDMPipeline
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

T, T0, SHIFT = 40, 24, -1.0
LABELS = torch.tensor([0, 2, NO_LABEL])


def make_denoiser(
    schedule: NoiseSchedule, *, resolution: int, prediction: str, is_fine: bool
) -> Denoiser:
    spec = DenoiserSpec(
        preset=PRESETS["tiny"],
        resolution=resolution,
        channels=1,
        num_classes=3,
        prediction=prediction,
        knows_clipping=is_fine,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7 + is_fine)
        return Denoiser(spec, schedule).eval()


def make_pair(
    *, resolution: int = 8, predictions: tuple[str, str] = ("v", "v")
) -> tuple[NoiseSchedule, Denoiser, Denoiser]:
    schedule = make_schedule("linear", num_steps=T, beta_start=0.004, beta_end=0.3)
    coarse = make_denoiser(
        schedule, resolution=resolution, prediction=predictions[0], is_fine=False
    )
    fine = make_denoiser(schedule, resolution=resolution, prediction=predictions[1], is_fine=True)
    return schedule, coarse, fine


def wrap(
    schedule: NoiseSchedule,
    coarse: Denoiser | None,
    fine: Denoiser,
    *,
    scheduler: str = "ddim",
    **options: Any,
) -> PFDMPipeline:
    made = make_scheduler(scheduler, schedule.betas)
    made.register_to_config(trained_betas=schedule.betas.tolist())
    first: Any = None if coarse is None else coarse.network
    second: Any = fine.network
    pipeline = PFDMPipeline(
        first,
        second,
        made,
        coarse_prediction="sample" if coarse is None else coarse.spec.prediction,
        fine_prediction=fine.spec.prediction,
        num_classes=3,
        resolution=fine.spec.resolution,
        **{"t0": T0, "shift": SHIFT, **options},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The same images as fedpdm.diffusion.sampling.


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["truncated", "noise_to_noise"])
@pytest.mark.parametrize("scheduler", ["dpm_solver", "ddim", "ddpm"])
@pytest.mark.parametrize(
    ("resolution", "predictions", "guidance", "method"),
    [
        (8, ("v", "v"), 1.0, "pfdm"),
        (7, ("epsilon", "sample"), 2.0, "pfdm"),  # 7: padded to the network's stride
        (7, ("v", "epsilon"), 1.0, "alone"),
        (8, ("sample", "v"), 0.5, "coarse"),
    ],
)
def test_same_images_as_sampling(
    chain: str,
    scheduler: str,
    resolution: int,
    predictions: tuple[str, str],
    guidance: float,
    method: str,
) -> None:
    schedule, coarse, fine = make_pair(resolution=resolution, predictions=predictions)
    x_T = torch.randn((3, 1, resolution, resolution), generator=seeded(1))
    expected = sample_two_stage(
        None if method == "alone" else coarse,
        None if method == "coarse" else fine,
        x_T,
        SamplerSettings(
            schedule=schedule,
            t0=T0,
            scheduler=scheduler,
            num_steps=6,
            chain=chain,
            guidance=guidance,
        ),
        labels=LABELS,
        generator=seeded(),
    ).images
    pipeline = wrap(schedule, coarse, fine, scheduler=scheduler, chain=chain)
    images = pipeline.generate(
        x_T,
        LABELS,
        num_inference_steps=6,
        generator=seeded(),
        guidance_scale=guidance,
        method=method,
    )
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    other = pipeline.generate(x_T, [1, 1, 1], num_inference_steps=6, generator=seeded())
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)  # the check can fail


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("share", [None, [1.0, 0.3, 0.0, 0.65]], ids=["handed over", "mixed"])
@torch.no_grad()
def test_the_same_model_answers_at_every_level(share: list[float] | None, guidance: float) -> None:
    """The export's copy of the rule against the denoiser that the sampler asks."""
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine, coarse_share=share)
    given = None if share is None else torch.tensor(share)
    settings = SamplerSettings(schedule=schedule, t0=T0, guidance=guidance, coarse_share=given)
    (stage,) = stages(*as_asked(coarse, fine, settings), settings)
    x = torch.randn((3, 1, 8, 8), generator=seeded(1))
    index = torch.where(LABELS == NO_LABEL, 3, LABELS)
    answers = []
    for level in range(1, T + 1):
        t = torch.full((3,), level)
        answers.append(stage.denoiser(x, t, labels=LABELS))
        found = pipeline._answer(x, level, index, guidance, "pfdm", T0)
        torch.testing.assert_close(found, answers[-1], rtol=1e-4, atol=1e-4)
    steps = torch.stack([(b - a).abs().mean() for a, b in itertools.pairwise(answers)])
    assert int(steps.argmax()) == T0 - 1  # between T0 and T0 + 1: a shifted level would show


@pytest.mark.slow
def test_call_draws_noise_and_scales_pixels() -> None:
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine, scheduler="ddpm", guidance_scale=1.5)
    generator = seeded()
    guidance = 1.5  # the pipeline's default
    expected = sample_two_stage(
        coarse,
        fine,
        torch.randn((3, 1, 8, 8), generator=generator),
        SamplerSettings(schedule=schedule, t0=T0, scheduler="ddpm", num_steps=6, guidance=guidance),
        labels=LABELS,
        generator=generator,
    ).images
    pixels = denormalize(expected, shift=SHIFT).numpy()
    assert pixels.std() > 5

    def draw(output_type: str) -> Any:
        return pipeline(
            LABELS, num_inference_steps=6, generator=seeded(), output_type=output_type
        ).images

    as_pt, as_np, as_pil = draw("pt"), draw("np"), draw("pil")
    assert as_pt.shape == (3, 1, 8, 8)
    assert as_pt.dtype == torch.float32
    np.testing.assert_allclose(as_pt.numpy() * 255, pixels, atol=0.51)
    np.testing.assert_array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in as_pil] == ["L"] * 3
    np.testing.assert_array_equal(np.stack(as_pil)[:, None], pixels)


@pytest.mark.slow
def test_swapped_schedulers() -> None:
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine)
    x_T = torch.randn((3, 1, 8, 8), generator=seeded(1))

    steps = 0

    def draw() -> torch.Tensor:
        return pipeline.generate(x_T, LABELS, num_inference_steps=steps, generator=seeded())

    # diffusers' DDIM needs steps that divide a chain: 10 of 40; and 10 of 40, then 6 of 24.
    for chain, steps in (("truncated", 10), ("noise_to_noise", 16)):  # noqa: B007
        pipeline.register_to_config(chain=chain)
        pipeline.scheduler = make_scheduler("ddim", schedule.betas)
        ddim = draw()
        # Its defaults would clip to [-1, 1] and take 1000 linear betas.
        pipeline.scheduler = DDIMScheduler(timestep_spacing="trailing")
        torch.testing.assert_close(draw(), ddim)
        # DDIM is Euler's method in sigma = sqrt((1 - abar) / abar) (Song et al. 2021, Eq. 14).
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        torch.testing.assert_close(draw(), ddim, rtol=1e-3, atol=2e-3)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is not defined on betas"):
        draw()
    with pytest.raises(ValueError, match="has no trained_betas"):
        PFDMPipeline(pipeline.coarse_unet, pipeline.fine_unet, DDIMScheduler())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
    ],
)
def test_other_schedulers_run(name: str) -> None:
    """Also those that take the noise only: the answer is converted."""
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine, scheduler=name, chain="noise_to_noise")
    x_T = torch.randn((3, 1, 8, 8), generator=seeded(1))
    images = pipeline.generate(x_T, LABELS, num_inference_steps=16, generator=seeded())
    pipeline.scheduler = make_scheduler("ddim", schedule.betas)
    ddim = pipeline.generate(x_T, LABELS, num_inference_steps=16, generator=seeded())
    assert torch.isfinite(images).all()
    assert 0.5 < float(images.std() / ddim.std()) < 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 3]}, r"labels must be in \[0, 2\], or -1 for no label, got 3"),
        ({"labels": -2}, r"labels must be in \[0, 2\], or -1 for no label, got -2"),
        ({"labels": []}, "labels must be a whole number or a non-empty list"),
        ({"labels": [0.5]}, "labels must be a whole number or a non-empty list"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be finite and at least 0, got -1"),
        ({"method": "best"}, "method must be one of pfdm, alone, coarse, got 'best'"),
        ({"method": "alone"}, "method alone needs a fine model .* trained at t <= 24 of 40"),
        ({"output_type": "jpg"}, "output_type must be pil, np or pt, got 'jpg'"),
    ],
)
def test_call_refuses(options: dict[str, Any], message: str) -> None:
    pipeline = wrap(*make_pair(), fine_t_max=T0)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"labels": [0], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t0": 41}, r"t0 must be in \[0, 40\], got 41"),
        ({"chain": "long"}, "chain must be one of truncated, noise_to_noise, got 'long'"),
    ],
)
def test_pipeline_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(*make_pair(), **options)


def test_not_finite_is_an_error() -> None:
    schedule, coarse, fine = make_pair()
    with torch.no_grad():
        next(fine.network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        wrap(schedule, coarse, fine)([0], num_inference_steps=3)
