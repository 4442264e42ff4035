"""Denoisers on a known network: padding, prediction types, timesteps and the label table."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser, DenoiserSpec
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.schedule import make_schedule, q_sample
from tests.support.cases import every

LINEAR = make_schedule("linear")


def make_spec(**options: object) -> DenoiserSpec:
    given = {
        "preset": "micro",
        "resolution": 8,
        "channels": 1,
        "num_classes": 10,
        "prediction": "v",
        "knows_clipping": False,
        **options,
    }
    given["preset"] = PRESETS[str(given["preset"])]
    return DenoiserSpec(**given)  # type: ignore[arg-type]


class KnownNetwork(nn.Module):
    """Stands for a U-Net: keeps its inputs and gives a fixed answer."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> SimpleNamespace:
        self.x, self.timestep, self.class_labels = x, timestep, class_labels
        return SimpleNamespace(sample=self.answer)


def known(spec: DenoiserSpec, answer: torch.Tensor) -> tuple[Denoiser, KnownNetwork]:
    denoiser = Denoiser(spec, LINEAR)
    network = KnownNetwork(answer)
    denoiser.network = network
    return denoiser, network


def noised(t: torch.Tensor, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn((len(t), 1, side, side), generator=generator) for _ in range(2))
    return x_0, noise, q_sample(LINEAR, x_0, t, noise=noise)


# --- Prediction types and timesteps ---------------------------------------------------------


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_the_right_raw_output_gives_back_the_clean_image(prediction: str) -> None:
    t = torch.tensor([1, 2, 100, 500, 900, 1000])
    x_0, noise, x_t = noised(t)
    abar = torch.tensor([math.prod(1 - np.linspace(1e-4, 0.02, 1000)[:k]) for k in t.tolist()])
    a, s = (v.float().view(-1, 1, 1, 1) for v in (abar.sqrt(), (1 - abar).sqrt()))
    raw = {"sample": x_0, "epsilon": noise, "v": a * noise - s * x_0}
    denoiser, network = known(make_spec(prediction=prediction), raw[prediction])
    x0_hat = denoiser(x_t, t, labels=torch.zeros(6, dtype=torch.int64))
    # epsilon divides by a, which is 0.006 at T.
    assert torch.allclose(x0_hat, x_0, rtol=1e-3, atol=5e-4)
    assert x0_hat.dtype == torch.float32
    assert network.timestep.tolist() == (t - 1).tolist()  # diffusers counts from 0
    wrong, _ = known(make_spec(prediction=prediction), raw[prediction] + 0.05)
    assert not torch.allclose(wrong(x_t, t, labels=t * 0), x_0, rtol=1e-3, atol=5e-3)


def test_half_precision_outputs_become_float32() -> None:
    t = torch.tensor([10])
    denoiser, _ = known(make_spec(), torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16))
    assert denoiser(noised(t)[2], t, labels=t * 0).dtype == torch.float32


# --- Padding --------------------------------------------------------------------------------


@every(
    "preset, resolution, padded",
    [
        ("micro", 8, 8),
        ("micro", 9, 10),
        ("small", 28, 28),
        ("small", 32, 32),
        ("small", 27, 28),
        ("small", 30, 32),
        ("paper", 28, 32),
        ("paper", 32, 32),
        ("paper", 33, 40),
        ("tiny", 1, 2),
        ("tiny_patch", 16, 16),
        ("tiny_patch", 17, 20),
    ],
)
def test_images_are_padded_to_a_multiple_of_the_stride(
    preset: str, resolution: int, padded: int
) -> None:
    assert make_spec(preset=preset, resolution=resolution).padded_resolution == padded


@pytest.mark.parametrize("side", [5, 7, 9])
def test_padding_is_zero_outside_and_cropped_again(side: int) -> None:
    t = torch.tensor([3, 700])
    spec = make_spec(resolution=side, prediction="sample")
    answer = (
        torch.arange((side + 1) ** 2).float().view(1, 1, side + 1, side + 1).expand(2, 1, -1, -1)
    )
    denoiser, network = known(spec, answer)
    x_t = noised(t, side)[2]
    x0_hat = denoiser(x_t, t, labels=t * 0)
    assert torch.equal(x0_hat, answer[..., :side, :side])
    assert network.x.shape == (2, 1, side + 1, side + 1)
    assert torch.equal(network.x[..., :side, :side], x_t)
    assert float(network.x[..., side, :].abs().sum() + network.x[..., :, side].abs().sum()) == 0.0


def test_a_patch_is_pixels_of_one_place() -> None:
    """What the network sees at a position are the 2 x 2 pixels there, and its answer is theirs."""
    torch.manual_seed(0)
    spec = make_spec(preset="tiny_patch", resolution=16, prediction="sample")
    denoiser = Denoiser(spec, LINEAR)
    denoiser.network = Remember()
    x_t = torch.randn(2, 1, 16, 16)
    assert torch.equal(denoiser(x_t, torch.tensor([3, 7]), labels=torch.tensor([0, 1])), x_t)
    seen = denoiser.network.seen
    assert seen.shape == (2, 4, 8, 8)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        place = x_t[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(seen[:, :, row, column], place.flatten(1))


class Remember(torch.nn.Module):
    """A network that answers with what it was shown."""

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> SimpleNamespace:
        self.seen = x
        return SimpleNamespace(sample=x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "resolution", "channels"),
    [
        ("micro", 8, 1),
        ("micro", 7, 3),
        ("tiny", 16, 3),
        ("tiny_patch", 16, 1),
        ("tiny_patch", 15, 3),
        ("small", 28, 1),
        ("small", 29, 3),
    ],
)
def test_real_networks_keep_the_shape_and_are_finite(
    preset: str, resolution: int, channels: int
) -> None:
    torch.manual_seed(0)
    spec = make_spec(preset=preset, resolution=resolution, channels=channels, knows_clipping=True)
    denoiser = Denoiser(spec, LINEAR).eval()
    x = torch.randn(2, channels, resolution, resolution)
    t, labels = torch.tensor([1, 1000]), torch.tensor([3, NO_LABEL])
    with torch.no_grad():
        x0_hat = denoiser(x, t, labels=labels)
        assert x0_hat.shape == x.shape
        assert bool(torch.isfinite(x0_hat).all())
        # t, label and flag each reach the network.
        for other in (
            denoiser(x, t - torch.tensor([-500, 500]), labels=labels),
            denoiser(x, t, labels=labels.flip(0)),
            denoiser(x, t, labels=labels, clipped=torch.tensor([True, True])),
        ):
            assert bool(((other - x0_hat).abs().amax((1, 2, 3)) > 1e-5).all())
        unset = denoiser(x, t, labels=labels, clipped=torch.tensor([False, False]))
        assert torch.equal(unset, x0_hat)


# --- Conditions -----------------------------------------------------------------------------


def test_the_label_table_has_no_collisions() -> None:
    spec = make_spec(num_classes=3, knows_clipping=True)
    assert spec.num_conditions == 8
    denoiser = Denoiser(spec, LINEAR)
    labels = torch.tensor([0, 1, 2, NO_LABEL] * 2)
    clipped = torch.tensor([False] * 4 + [True] * 4)
    assert denoiser.condition(labels, clipped).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert denoiser.condition(labels[:4], None).tolist() == [0, 1, 2, 3]
    plain = make_spec(num_classes=3)
    assert plain.num_conditions == 4
    assert Denoiser(plain, LINEAR).condition(labels[:4], None).tolist() == [0, 1, 2, 3]
    table = denoiser.network.class_embedding
    assert isinstance(table, nn.Embedding)
    assert table.num_embeddings == 8


def test_the_condition_reaches_the_network() -> None:
    t = torch.tensor([5, 6, 7])
    denoiser, network = known(make_spec(knows_clipping=True), torch.zeros(3, 1, 8, 8))
    flag = torch.tensor([True, False, True])
    denoiser(noised(t)[2], t, labels=torch.tensor([4, NO_LABEL, NO_LABEL]), clipped=flag)
    assert network.class_labels.tolist() == [15, 10, 21]


def test_a_coarse_denoiser_has_no_flag() -> None:
    denoiser = Denoiser(make_spec(), LINEAR)
    with pytest.raises(ValueError, match="this denoiser was built without the clipped flag"):
        denoiser.condition(torch.tensor([1]), torch.tensor([False]))


# --- Presets and specs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("nano", 0.042),
        ("micro", 0.4),
        ("tiny", 0.7),
        ("tiny_patch", 1.6),
        ("small", 2.6),
        ("paper", 35.7),
    ],
)
def test_presets_have_the_advertised_size(preset: str, millions: float) -> None:
    spec = make_spec(preset=preset, resolution=32, channels=3)
    with torch.device("meta"):
        denoiser = Denoiser(spec, LINEAR)
    count = sum(p.numel() for p in denoiser.network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    advertised = re.search(r"about ([\d.]+) M", PRESETS[preset].description)
    assert advertised is not None
    assert count / 1e6 == pytest.approx(float(advertised[1]), rel=0.03)


def test_the_paper_preset_is_ho_et_als_network() -> None:
    # google/ddpm-cifar10-32 has 35,746,307 parameters; ours adds a label table of 11 x 512.
    with torch.device("meta"):
        denoiser = Denoiser(make_spec(preset="paper", resolution=32, channels=3), LINEAR)
    assert sum(p.numel() for p in denoiser.network.parameters()) == 35_746_307 + 11 * 512
    assert PRESETS["paper"].prediction == "epsilon"
    assert PRESETS["paper"].unet["dropout"] == 0.1


def test_schedule_tables_do_not_travel_with_the_weights() -> None:
    names = Denoiser(make_spec(), LINEAR).state_dict().keys()
    assert names
    assert all(name.startswith("network.") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "score"}, "prediction must be sample, epsilon or v, got 'score'"),
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_bad_specs_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_spec(**options)
