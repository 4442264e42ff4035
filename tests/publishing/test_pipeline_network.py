"""A network above the hand-over in the diffusers pipeline and in exports, against fedpdm's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.from_gaussians import sample_from_gaussians
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import SamplerSettings
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.publishing.building import gaussian_component
from fedpdm.publishing.export import export_pipeline, load_pipeline, open_source, sample_grid
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.storage.run_directory import RunDirectory
from tests.publishing.test_pipeline import SHIFT, T0, T, make_pair, wrap
from tests.publishing.test_pipeline_gaussians import LABELS, SHAPE, drawn, gaussians
from tests.support.network_runs import network_run
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

LEVELS = (16, 34)  # around T0


def models(**options: Any) -> tuple[PFDMPipeline, NetworkAboveGaussians, Denoiser]:
    schedule, coarse, fine = make_pair()
    g = gaussians()
    made = wrap(
        schedule, coarse, fine, gaussians=gaussian_component(g),
        **{"coarse_levels": list(LEVELS), **options},
    )  # fmt: skip
    return made, NetworkAboveGaussians(coarse, g, schedule, levels=LEVELS), fine


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dpm_solver", "ddpm"])
@pytest.mark.parametrize("method", ["pfdm", "coarse"])
@pytest.mark.parametrize(
    ("candidates", "told", "guidance"), [(1, True, 2.0), (3, False, 1.0)]
)  # fmt: skip
def test_same_images_as_sampling(
    scheduler: str, method: str, candidates: int, told: bool, guidance: float
) -> None:
    """Down to t0 and by the fine model, or to the end by the network and its Gaussians."""
    pipeline, coarse, fine = models(
        scheduler=scheduler, candidates=candidates, fine_labels=told, guidance_scale=guidance
    )
    settings = SamplerSettings(
        schedule=coarse.schedule, t0=T0, scheduler=scheduler, num_steps=10, guidance=guidance,
        fine_labels=told, candidates=candidates,
    )  # fmt: skip
    expected = sample_from_gaussians(
        coarse, fine if method == "pfdm" else None, settings, image_shape=SHAPE, labels=LABELS,
        generator=seeded(3),
    ).images.clamp(-1.0 - SHIFT, 1.0 - SHIFT)  # fmt: skip
    options: dict[str, Any] = {"generator": seeded(3), "method": method, "num_inference_steps": 10}
    found = drawn(pipeline, LABELS, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=4e-3)  # half a pixel's step
    other = drawn(pipeline, LABELS.roll(1), **options | {"generator": seeded(3)})
    assert not torch.allclose(other, found, atol=0.05)  # the check can fail


def test_what_gaussians_expect_is_fedpdms() -> None:
    g, schedule = gaussians(), make_pair()[0]
    made, whole = gaussian_component(g), GaussianDenoiser(g, schedule)
    x = torch.randn((len(LABELS), *SHAPE), generator=seeded(1))
    for t in (1, 8, T):
        abar = float(schedule.alphas_cumprod[t])
        found = made.expected(x.flatten(1), LABELS, abar).view(x.shape)
        expected = whole(x, torch.full((len(LABELS),), t), labels=LABELS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_given_images_may_begin_above_the_hand_over() -> None:
    pipeline, _, _ = models()
    image = torch.rand((2, *SHAPE), generator=seeded(4))
    labels, options = torch.tensor([0, 2]), {"image": image, "num_inference_steps": 10}
    low = drawn(pipeline, labels, strength=0.2, generator=seeded(5), **options)
    high = drawn(pipeline, labels, strength=0.9, generator=seeded(5), **options)
    assert low.shape == high.shape == (2, *SHAPE)
    assert not torch.allclose(low, high, atol=0.05)


def test_both_parts_belong_together() -> None:
    schedule, coarse, fine = make_pair()
    both: dict[str, Any] = {"gaussians": gaussian_component(gaussians())}
    for given, options, words in (
        (coarse, {"coarse_levels": [4, 9]}, r"both with coarse_levels, got \[4, 9\]"),
        (None, {**both, "coarse_levels": [4, 9]}, "both with coarse_levels"),
        (coarse, {**both, "coarse_levels": [0, 9]}, r"in \[1, 40\] in this order, got 0, 9"),
        (coarse, {**both, "coarse_levels": [9, 4]}, r"in \[1, 40\] in this order, got 9, 4"),
        (coarse, {**both, "coarse_levels": [4, 41]}, r"in \[1, 40\] in this order, got 4, 41"),
        (
            coarse,
            {**both, "coarse_levels": [4, 9], "chain": "noise_to_noise"},
            "the chain truncated",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            wrap(schedule, given, fine, **options)


# Exports of runs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("network") / "run"
    run_in_process(network_run(), out)
    return out


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "client1"
    return export_pipeline(RunDirectory(finished), client_id=1, out=out)


@pytest.mark.slow
def test_an_export_samples_as_its_client(finished: Path, exported: Path) -> None:
    one = open_synthesizer(RunDirectory(finished), 1)
    labels = np.array([3, -1, 7, 0])
    expected = one.draw_pixels(labels, generator=seeded(2))
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    names = ("t0", "coarse_levels", "candidates", "fine_labels")
    assert [pipeline.config[name] for name in names] == [150, [100, 300], 4, False]
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    found: Any = pipeline(labels.tolist(), generator=seeded(2), **options).images
    difference = np.abs((found * 255.0).round().numpy() - expected)
    assert difference.max() <= 1.0
    assert np.mean(difference > 0) < 0.01


def test_an_export_holds_the_network_and_its_gaussians(finished: Path, exported: Path) -> None:
    assert sorted(os.listdir(exported)) == [
        "README.md", "coarse_unet", "fine_unet", "gaussians", "model_index.json",
        "pfdm_sampling.py", "pipeline.py", "privacy.json", "scheduler",
    ]  # fmt: skip
    assert json.loads((exported / "model_index.json").read_text())["coarse_levels"] == [100, 300]
    at_home, away = open_source(finished, client=1), open_source(exported)
    assert at_home.digest() == away.digest()


def test_the_card_says_what_this_mechanism_sends(finished: Path, exported: Path) -> None:
    card = " ".join((exported / "README.md").read_text().split())
    privacy = RunDirectory(finished).read_json("privacy.json")
    assert "went on with 2 rounds of noised sums of gradients" in card
    assert "noised to t = 300 of 1000, which `coarse_unet` takes down to t0 = 150" in card
    assert "Of 4 candidates the one is kept" in card
    noise = privacy["gradient_noise_multiplier"]
    assert f"| {privacy['epsilon']:.4g} | 1e-05 | 6 around -1 | 1 | {noise:.4g} |" in card
    assert "whether it was drawn for a round of gradients or not" in card
    assert "it is told to nobody which" in card
    assert "`coarse_unet` and `gaussians` may be shared without it." in card
    for word in ("{", "}", "t0 | clip norm", "which is also the most"):
        assert word not in card


def test_pictures_of_an_export_and_of_the_run(
    finished: Path, exported: Path, tmp_path: Path
) -> None:
    pictures = [
        sample_grid(
            path, labels=None, num=10, out=tmp_path / f"{number}.png", num_steps=2, device="cpu",
            client=client, method=method,
        ).read_bytes()
        for number, (path, client, method) in enumerate(
            [(exported, None, "pfdm"), (finished, 1, "pfdm"), (exported, None, "coarse")]
        )
    ]  # fmt: skip
    assert pictures[0] == pictures[1] != pictures[2]
