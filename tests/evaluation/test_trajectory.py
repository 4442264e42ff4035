"""States between noise and image: those of the sampler itself, shown on the images' scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.config import RunConfig
from fedpdm.data import denormalize
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import SamplerSettings, sample_in_batches
from fedpdm.diffusion.weights import load_named
from fedpdm.evaluation.trajectory import record_states
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.pair import ModelPair, shared_pair
from fedpdm.setup.run_setup import set_up
from tests.support.federations import small_config

SCHEDULE = make_schedule("linear", num_steps=1000)
T0 = 600
SHIFT = -0.5
LABELS = np.array([0, 1, 2, 1], dtype=np.int64)


def constant(value: float, null: float | None = None) -> Any:
    """A denoiser that always expects the same image; another one without a label."""

    def ask(x: torch.Tensor, t: Any, *, labels: torch.Tensor, clipped: Any = None) -> torch.Tensor:
        values = torch.where(labels < 0, value if null is None else null, value)
        return values.view(-1, 1, 1, 1).expand_as(x).to(x)

    return ask


def pair(coarse: Any, fine: Any, **options: Any) -> ModelPair[Any]:
    return ModelPair(
        coarse=coarse,
        fine=fine,
        spec=ImageSpec(channels=3, resolution=8, num_classes=3, shift=SHIFT),
        settings=SamplerSettings(**{"schedule": SCHEDULE, "t0": T0, "num_steps": 20, **options}),
        device=torch.device("cpu"),
    )


def level(x: float) -> int:
    """A clean, shifted value as a pixel, in float64."""
    return int(np.clip(np.round((x + SHIFT + 1.0) * 127.5), 0, 255))


OPTIONS: dict[str, dict[str, Any]] = {
    "truncated": {},
    "noise_to_noise": {"chain": "noise_to_noise"},
    "guided": {"guidance": 2.0},
    "mixed": {"coarse_share": torch.tensor([0.25, 0.5, 1.0, 0.5])},
    "ddpm": {"scheduler": "ddpm"},
    "sigmas": {"scheduler": "EulerDiscreteScheduler"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_recording_changes_nothing(options: dict[str, Any]) -> None:
    """The last state is what the sampler draws when nobody looks."""
    config = small_config()
    setup = set_up(config)
    torch.manual_seed(0)
    coarse, fine = (build_denoiser(setup, role).eval() for role in ("coarse", "fine"))
    spec = setup.spec
    assert spec.shape == (3, 8, 8)
    watched = pair(coarse, fine, **options)
    states = record_states(watched, LABELS, seed=5, client=2)
    output = sample_in_batches(
        coarse,
        fine,
        watched.settings,
        image_shape=spec.shape,
        labels=torch.from_numpy(LABELS),
        generator=torch_generator(5, Purpose.SAMPLING, client=2),
    )
    assert np.array_equal(states[-1].noisy, denormalize(output.images, shift=SHIFT).numpy())


@pytest.mark.parametrize("name", ["truncated", "noise_to_noise"])
def test_coarse_then_fine_from_noise_to_image(name: str) -> None:
    """Denoisers that expect constant images leave nothing to chance."""
    coarse = constant(0.75 * SCHEDULE.alpha_bar(T0) ** 0.5 if name == "noise_to_noise" else 0.75)
    states = record_states(pair(coarse, constant(0.25), chain=name), LABELS, seed=0)
    stages = [state.stage for state in states]
    middle = stages.index("fine")
    assert stages == ["coarse"] * middle + ["fine"] * (len(stages) - middle - 1) + ["image"]
    assert middle > 0
    for state in states[:-1]:
        wanted = level(0.75 if state.stage == "coarse" else 0.25)
        assert state.estimate is not None
        assert np.abs(state.estimate.astype(int) - wanted).max() <= 1  # of float32 factors
    if name == "truncated":
        assert all((s.t > T0) == (s.stage == "coarse") for s in states[:-1])
    else:
        assert all(s.t <= T0 for s in states if s.stage == "fine")
    ts = [state.t for state in states if state.stage == "fine"]
    assert ts == sorted(ts, reverse=True)
    assert (states[-1].noisy == level(0.25)).all()
    assert states[-1].estimate is None
    noise = states[0].noisy.astype(float)  # x_T: mid-grey, with a third of the pixels clamped
    assert abs(noise.mean() - 127.5) < 8.0
    assert 0.25 < ((noise == 0) | (noise == 255)).mean() < 0.40  # P(|N(0,1)| > 1) = 0.317


def test_states_are_shown_where_the_images_are() -> None:
    """The mean of a state is on the way from mid-grey to the image: a (x_0 - s) + a s = a x_0."""
    states = record_states(pair(None, constant(0.5), num_steps=50), np.zeros(64, int), seed=1)
    for state in states[25:-1]:
        a = SCHEDULE.alpha_bar(state.t) ** 0.5
        if (1.0 - a * a) ** 0.5 > 0.4:
            continue  # clamping moves the mean
        assert state.noisy.mean() == pytest.approx((a * (0.5 + SHIFT) + 1.0) * 127.5, abs=2.0)


def test_guidance_and_mixture_are_part_of_what_is_expected() -> None:
    guided = record_states(pair(None, constant(0.5, null=0.375), guidance=3.0), LABELS, seed=0)
    assert guided[0].estimate is not None
    assert (guided[0].estimate == level(0.375 + 3.0 * 0.125)).all()
    share = torch.tensor([0.25, 0.5, 1.0, 0.0])
    mixed = record_states(pair(constant(1.0), constant(0.0), coarse_share=share), LABELS, seed=0)
    assert [state.stage for state in mixed if state.t > T0] == ["both"] * 8
    assert mixed[0].estimate is not None
    for image, label in zip(mixed[0].estimate, LABELS, strict=True):
        assert (image == level(float(share[label]))).all()


@pytest.mark.parametrize("role", ["coarse", "fine"])
def test_one_model_alone_is_not_mixed_whatever_the_share(role: str) -> None:
    """Baselines of one model are sampled under the same config, which may have a share."""
    models = {"coarse": None, "fine": None, role: constant(0.5)}
    share = torch.tensor([0.25, 0.5, 1.0, 0.5])
    states = record_states(pair(**models, coarse_share=share), LABELS, seed=0)
    assert [state.stage for state in states] == [role] * 20 + ["image"]
    assert all((s.estimate == level(0.5)).all() for s in states[:-1] if s.estimate is not None)


def test_equal_seeds_draw_equal_noise_and_others_do_not() -> None:
    one = pair(None, constant(0.0))
    first = record_states(one, LABELS, seed=0)[0].noisy
    assert np.array_equal(first, record_states(one, LABELS, seed=0)[0].noisy)
    assert not np.array_equal(first, record_states(one, LABELS, seed=1)[0].noisy)
    assert not np.array_equal(first, record_states(one, LABELS, seed=0, client=1)[0].noisy)


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    setup = set_up(config)
    model = build_denoiser(setup, "coarse")
    return {name: value.detach() for name, value in model.network.named_parameters()}


def test_the_shared_model_alone_has_the_given_weights() -> None:
    config = small_config()
    weights = {name: torch.full_like(v, 0.01) for name, v in weights_of(config).items()}
    made = shared_pair(config, weights)
    setup = set_up(config)
    model = build_denoiser(setup, "coarse").eval()
    load_named(dict(model.network.named_parameters()), weights, what="weights")
    x = torch.randn((2, *setup.spec.shape), generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([900, 700]), torch.tensor([0, 1])
    with torch.no_grad():
        assert made.coarse is not None
        assert torch.equal(made.coarse(x, t, labels=labels), model(x, t, labels=labels))
    assert made.fine is None
    assert made.spec.num_classes == 10
    missing = dict(list(weights.items())[1:])
    with pytest.raises(ValueError, match="coarse weights"):
        shared_pair(config, missing)
