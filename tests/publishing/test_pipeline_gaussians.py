"""Class Gaussians in the diffusers pipeline and in exports, against fedpdm's own sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from fedpdm.config import RunConfig
from fedpdm.data import denormalize
from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser
from fedpdm.diffusion.from_gaussians import likeliest, sample_from_gaussians
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.twostage import SamplerSettings, refine
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.publishing.building import gaussian_component
from fedpdm.publishing.export import export_pipeline, load_pipeline, sample_grid
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.setup.choice import SamplingChoice, save_choice
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.run_directory import RunDirectory
from tests.publishing.test_pipeline import SHIFT, T0, T, make_pair, wrap
from tests.support.federations import small_config
from tests.support.gaussian_toys import dense_covariance, gaussians_of
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CHOSEN = ("t0", "fine_labels", "candidates", "own_classes")
SHAPE = (1, 8, 8)
LABELS = torch.tensor([0, 2, NO_LABEL, 1, 2])


def gaussians(*, r: int = 3) -> ClassGaussians:
    """Of classes 0 and 2, in float32 as an export keeps them; class 1 has none."""
    g = gaussians_of(3, pixels=64, r=r, weights=True)
    g = ClassGaussians(**{**vars(g), "classes": torch.tensor([0, 2, 2])})
    return ClassGaussians(**g.tensors())


def pipeline_of(g: ClassGaussians, **options: Any) -> tuple[PFDMPipeline, Denoiser, Any]:
    schedule, _, fine = make_pair()
    made = wrap(schedule, None, fine, gaussians=gaussian_component(g), **options)
    return made, fine, schedule


def drawn(pipeline: PFDMPipeline, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """In model scale."""
    given: dict[str, Any] = {"num_inference_steps": 6, "output_type": "pt", **options}
    images: Any = pipeline(labels, **given).images
    return images * 2.0 - (1.0 + SHIFT)


# The same images as fedpdm.diffusion.from_gaussians.


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dpm_solver", "ddim", "ddpm"])
@pytest.mark.parametrize(
    ("candidates", "told", "guidance", "r", "own"),
    [
        (1, False, 1.0, 3, []), (3, False, 1.0, 3, []), (3, True, 2.0, 3, [1, 2]),
        (4, False, 1.0, 0, [0]),
    ],
)  # fmt: skip
def test_same_images_as_sampling(
    scheduler: str, candidates: int, told: bool, guidance: float, r: int, own: list[int]
) -> None:
    g = gaussians(r=r)
    pipeline, fine, schedule = pipeline_of(
        g, scheduler=scheduler, candidates=candidates, fine_labels=told, guidance_scale=guidance,
        own_classes=own,
    )  # fmt: skip
    settings = SamplerSettings(
        schedule=schedule, t0=T0, scheduler=scheduler, num_steps=6, guidance=guidance,
        fine_labels=told, candidates=candidates, own_classes=tuple(own),
    )  # fmt: skip
    expected = sample_from_gaussians(
        GaussianDenoiser(g, schedule), fine, settings, image_shape=SHAPE, labels=LABELS,
        generator=seeded(3),
    ).images  # fmt: skip
    pixels = denormalize(expected, shift=SHIFT).float()
    found = drawn(pipeline, LABELS, generator=seeded(3))
    shown = (found + SHIFT + 1.0) * 127.5
    assert float((shown - pixels).abs().max()) <= 0.51  # rounding to whole pixels
    other = drawn(pipeline, LABELS.roll(1), generator=seeded(3))
    assert not torch.allclose(other, found, atol=0.05)  # the check can fail


def test_the_draws_alone_are_the_coarse_images() -> None:
    g = gaussians()
    pipeline, _, schedule = pipeline_of(g, candidates=4)
    settings = SamplerSettings(schedule=schedule, t0=T0, candidates=4)
    expected = sample_from_gaussians(
        GaussianDenoiser(g, schedule), None, settings, image_shape=SHAPE, labels=LABELS,
        generator=seeded(3),
    ).images.clamp(-1.0 - SHIFT, 1.0 - SHIFT)  # fmt: skip
    found = drawn(pipeline, LABELS, generator=seeded(3), method="coarse")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_posteriors_are_torchs_and_fedpdms() -> None:
    """Of the component by itself: dense normals, and the choice between candidates."""
    g, abar = gaussians(), 0.6
    made = gaussian_component(g)
    x = torch.randn((12, 64), generator=seeded(1))
    dense = [
        MultivariateNormal(
            abar**0.5 * g.means[j],
            abar * torch.from_numpy(dense_covariance(g, j)) + (1 - abar) * torch.eye(64),
        ).log_prob(abar**0.5 * x.double())
        for j in range(3)
    ]
    share = g.weights[1:] / g.weights[1:].sum()
    second = torch.stack([dense[1] + share[0].log(), dense[2] + share[1].log()]).logsumexp(dim=0)
    joint = torch.stack([dense[0], second], dim=1).log_softmax(dim=1)
    for column, label in ((0, 0), (1, 2)):
        found = made.log_posterior(x, torch.full((12,), label), abar)
        torch.testing.assert_close(found, joint[:, column], rtol=1e-6, atol=1e-6)
    assert bool(made.log_posterior(x, torch.ones(12, dtype=torch.int64), abar).isnan().all())
    images, labels = x.view(12, *SHAPE), torch.tensor([0, 2, 0])
    kept = likeliest(g, images, labels, count=4, abar=abar)
    own = made.log_posterior(x, labels.repeat_interleave(4), abar).view(3, 4).argmax(dim=1)
    assert torch.equal(torch.arange(3) * 4 + own, kept)


@pytest.mark.slow
def test_given_images_are_refined_as_below_the_hand_over() -> None:
    pipeline, fine, schedule = pipeline_of(gaussians(), fine_labels=False)
    image = torch.rand((2, *SHAPE), generator=seeded(4))
    noise = torch.randn((2, *SHAPE), generator=seeded(5))
    abar = float(schedule.alphas_cumprod[T0])
    x_t = abar**0.5 * (image * 2.0 - 1.0 - SHIFT) + (1.0 - abar) ** 0.5 * noise
    settings = SamplerSettings(
        schedule=schedule, t0=T0, num_steps=round(20 * T0 / T), fine_labels=False
    )
    expected = refine(
        fine, x_t, settings, t=T0, labels=torch.tensor([0, 2]), generator=seeded(5)
    ).clamp(-1.0 - SHIFT, 1.0 - SHIFT)
    found = drawn(pipeline, torch.tensor([0, 2]), image=image, generator=seeded(5),
                  num_inference_steps=20)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    same = drawn(pipeline, torch.tensor([2, 0]), image=image, generator=seeded(5),
                 num_inference_steps=20)  # fmt: skip
    torch.testing.assert_close(found, same)  # not told: no label matters
    alone = drawn(pipeline, torch.tensor([0, 2]), method="alone", generator=seeded(5))
    assert alone.shape == (2, *SHAPE)


IMAGE = torch.full((1, *SHAPE), 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": IMAGE, "strength": 0.9}, "refined by the fine model alone: .* t0 = 24 of 40"),
        ({"image": IMAGE, "method": "coarse"}, "got coarse and 24"),
        ({"method": "best"}, "method must be one of pfdm, alone, coarse"),
        ({"method": "coarse", "num_inference_steps": 0}, "num_inference_steps must be at least 1"),
    ],
)
def test_what_gaussians_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    pipeline, _, _ = pipeline_of(gaussians())
    with pytest.raises(ValueError, match=words):
        pipeline([0], **options)
    with pytest.raises(ValueError, match="got pfdm and 40"):
        pipeline.generate(torch.zeros(1, *SHAPE), [0])


def test_a_pipeline_has_one_shared_model() -> None:
    schedule, coarse, fine = make_pair()
    g = gaussian_component(gaussians())
    for given, options, words in (
        (coarse, {"gaussians": g}, "give coarse_unet or gaussians, or both"),
        (None, {}, "give coarse_unet or gaussians, or both"),
        (None, {"gaussians": g, "chain": "noise_to_noise"}, "gaussians need the chain truncated"),
        (None, {"gaussians": g, "coarse_share": [0.5] * 4}, "and no coarse_share"),
        (coarse, {"candidates": 2}, "candidates must be at least 1, and 1 without gaussians"),
        (None, {"gaussians": g, "candidates": 0}, "candidates must be at least 1"),
        (coarse, {"own_classes": [1]}, "own_classes need gaussians and a fine model for every t"),
        (None, {"gaussians": g, "own_classes": [1], "fine_t_max": 9}, "and fine_t_max 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            wrap(schedule, given, fine, **options)


# Exports of runs.


def config_of(**sampling: Any) -> RunConfig:
    return small_config(
        run={"rounds": 3},
        partition={"num_clients": 2},
        coarse={"training": "server"},
        privacy={"release": "statistics", "clip_norm": 6.0},
        sampling={"scheduler": "ddim", **sampling},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "run"
    run_in_process(config_of(), out)
    store = ClientStore(out / "clients" / "1", store_label(config_of(), 1))
    with store.lock():  # client 1 has chosen something of its own
        choice = SamplingChoice(
            handover=220, fine_labels=True, candidates=2, why="a test", own_classes=(7,)
        )
        save_choice(store, choice, round=3)
    return out


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_pipeline(
        RunDirectory(finished), client_id=1, out=tmp_path_factory.mktemp("exports") / "client1"
    )


@pytest.mark.slow
def test_an_export_samples_as_its_client(finished: Path, exported: Path) -> None:
    one = open_synthesizer(RunDirectory(finished), 1)
    assert (one.settings.t0, one.settings.fine_labels, one.settings.candidates) == (220, True, 2)
    labels = np.array([3, -1, 7, 0])
    expected = one.draw_pixels(labels, generator=seeded(2))
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    assert {key: pipeline.config[key] for key in CHOSEN} == {
        "t0": 220, "fine_labels": True, "candidates": 2, "own_classes": [7],
    }  # fmt: skip
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    found: Any = pipeline(labels.tolist(), generator=seeded(2), **options).images
    difference = np.abs((found * 255.0).round().numpy() - expected)
    assert difference.max() <= 1.0
    assert np.mean(difference > 0) < 0.01
    other = open_synthesizer(RunDirectory(finished), 0)
    assert (other.settings.t0, other.settings.fine_labels) == (150, False)


def test_an_export_holds_the_gaussians(exported: Path) -> None:
    assert sorted(os.listdir(exported)) == [
        "README.md", "fine_unet", "gaussians", "model_index.json", "pfdm_sampling.py",
        "pipeline.py", "privacy.json", "scheduler",
    ]  # fmt: skip
    index = json.loads((exported / "model_index.json").read_text())
    assert index["coarse_unet"] == [None, None]
    library, name = index["gaussians"]
    assert (exported / "gaussians" / f"{library}.py").is_file()
    assert name == "GaussianClasses"
    assert {path.suffix for path in exported.rglob("*.*")} == {
        ".json", ".md", ".py", ".safetensors",
    }  # fmt: skip


WITHOUT_FEDPDM = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fedpdm", "clients", "strategies"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import numpy, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe([1, 5, -1], num_inference_steps=3, output_type="pt",
              generator=torch.Generator().manual_seed(6)).images
numpy.save(out, images.numpy())
assert not [name for name in sys.modules if name.split(".")[0] == "fedpdm"]
"""


@pytest.mark.slow
def test_diffusers_draws_the_same_without_fedpdm(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.npy"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FEDPDM, str(exported), str(out)], cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    ours: Any = pipeline([1, 5, -1], generator=seeded(6), **options).images
    np.testing.assert_allclose(np.load(out), ours.numpy(), atol=1e-4)


def test_no_code_of_the_directory_is_run_here(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(exported), str(copy)], check=True)
    for path in copy.rglob("*.py"):
        path.write_text("raise SystemExit('executed')\n")
    pipeline = load_pipeline(copy)
    assert pipeline.gaussians is not None
    weights = copy / "gaussians" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"copy: cannot be loaded: .+") as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value)


def test_the_card_says_what_this_mechanism_sends(finished: Path, exported: Path) -> None:
    card = " ".join((exported / "README.md").read_text().split())
    assert "A U-Net for 8x8 images of 10 classes and a Gaussian for each class" in card
    assert "noised to t0 = 220 of 1000" in card
    assert "`fine_unet`, client 1's, takes it from there to a clean image, told the class." in card
    assert "Of 2 candidates the one is kept" in card
    assert "Classes 7, of which the client has many images, are drawn by `fine_unet` alone" in card
    privacy = RunDirectory(finished).read_json("privacy.json")
    assert f"| {privacy['epsilon']:.4g} | 1e-05 | 6 around -1 |" in card
    assert "No image is sent by itself." in card
    assert "how many images of each class all clients have together" in card
    assert "`gaussians` may be shared without it." in card
    for word in ("coarse_unet", "{", "}", "t0 | clip norm"):
        assert word not in card


def test_pictures_of_an_export(exported: Path, tmp_path: Path) -> None:
    out = sample_grid(
        exported, labels=None, num=20, out=tmp_path / "grid.png", num_steps=2, device="cpu"
    )
    again = sample_grid(
        exported, labels=None, num=20, out=tmp_path / "again.png", num_steps=2, device="cpu"
    )
    assert out.read_bytes() == again.read_bytes()
    coarse = sample_grid(
        exported, labels=None, num=20, out=tmp_path / "coarse.png", method="coarse", device="cpu"
    )
    assert coarse.read_bytes() != out.read_bytes()


@pytest.mark.slow
def test_a_store_of_another_run_is_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = small_config(
        run={"rounds": 3}, partition={"num_clients": 2}, coarse={"training": "server"},
        privacy={"release": "statistics", "clip_norm": 5.0},
    )  # fmt: skip
    run_in_process(config, other)
    store = other / "clients" / "0"
    for path in store.rglob("*.json"):
        path.write_text(path.read_text())  # whatever its label says
    with pytest.raises(ValueError, match=r"belongs to|another|label"):
        export_pipeline(RunDirectory(finished), client_id=0, store=store, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
