"""Exports by the conventions of diffusers and the Hugging Face Hub; given images refined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from fedpdm.data import normalize
from fedpdm.diffusion.twostage import SamplerSettings, refine
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement
from fedpdm.publishing.export import export_pipeline, load_pipeline
from fedpdm.publishing.model_card import model_card
from tests.publishing.test_pipeline import T0, T, make_pair, wrap
from tests.support.fake_runs import FakeRun
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return FakeRun(tmp_path_factory.mktemp("run") / "fake")


@pytest.fixture(scope="module")
def exported(fake: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_pipeline(
        fake.run, client_id=2, out=tmp_path_factory.mktemp("exports") / "client2"
    )


# Conventions.


def test_weights_are_safetensors_and_nothing_can_be_unpickled(exported: Path) -> None:
    files = sorted(path for path in exported.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".md", ".py", ".safetensors"}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert len(list(opened.keys())) > 0
        elif path.suffix == ".json":
            json.loads(content)
        # How pickles (protocol 2 and later) and torch's zip archives begin.
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))


def test_the_hub_reads_the_card(fake: FakeRun, exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert {"differential-privacy", "image-to-image", "arxiv:2504.00952"} <= set(card.data.tags)
    assert card.data.get("license") is None  # for its owner to choose
    assert card.text.lstrip().startswith("# fake: personalised diffusion model of client 2")


def test_the_card_has_the_ledgers_numbers(fake: FakeRun, exported: Path) -> None:
    statement = client_statement(ReleaseStore(fake.run.client_path(2)), delta=1e-5)
    lines = (exported / "README.md").read_text().splitlines()
    values = " | ".join(f"{value:.4g}" for value in statement["group_epsilon"].values())
    assert f"| epsilon at delta 1e-05 | {values} |" in lines
    assert any(f"head `{statement['ledger_head']}`" in line for line in lines)
    assert any("This is a **simulation**" in line for line in lines)


def test_what_a_run_is_called_cannot_write_the_card(fake: FakeRun, exported: Path) -> None:
    """Names and words of files are text in it: no heading, table, link, tag or formula."""
    hostile = "x\n## Privacy\n**fully anonymous** <img src=//y> |$"
    pipeline = load_pipeline(exported)
    run = fake.run.read_json("privacy.json") | {"does_not_protect": ["a"], "noise_source": "b"}
    client = client_statement(ReleaseStore(fake.run.client_path(2)), delta=1e-5)
    pipeline.register_to_config(id2label={"0": "zero", "1": "one"})
    honest = model_card(pipeline, name="fake", run=run, client=client)
    pipeline.register_to_config(id2label={"0": hostile, "1": "b\u202e"})
    run |= {"does_not_protect": [hostile], "noise_source": hostile}
    card = model_card(pipeline, name=hostile, run=run, client=client)
    shown = r"x \#\# Privacy \*\*fully anonymous\*\* &lt;img src=//y&gt; \|\$"
    assert card.count(shown) == 4
    assert r"1 b\\u202e" in card
    for mark in ("## ", "|", "**", "<", "`", "\n\n"):
        assert card.count(mark) - card.count(shown) * shown.count(mark) == honest.count(mark), mark


def test_a_second_release_shows_in_the_card(tmp_path: Path) -> None:
    """The ledger speaks, not the config: images noised twice have paid twice."""
    fake = FakeRun(tmp_path / "run", privacy={"epsilon": None, "t0": 600})
    once = export_pipeline(fake.run, client_id=0, out=tmp_path / "once")
    fake.release_again(0, t0=650)
    fake.release_again(0, t0=600)  # what there is already: free
    twice = export_pipeline(fake.run, client_id=0, out=tmp_path / "twice")

    def epsilons(folder: Path) -> list[float]:
        lines = (folder / "README.md").read_text().splitlines()
        row = next(line for line in lines if line.startswith("| epsilon at delta"))
        return [float(cell) for cell in row.split("|")[2:-1]]

    assert all(a < b for a, b in zip(epsilons(once), epsilons(twice), strict=True))


def load_as_others_do(exported: Path, custom_pipeline: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(
        str(exported), custom_pipeline=str(custom_pipeline), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipeline.py", ""])  # "": a directory, or a repository's name
def test_diffusers_loads_it_with_its_own_code(
    exported: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_as_others_do(exported, exported / name)
    assert type(pipeline).__module__.startswith("diffusers_modules.")
    ours = load_pipeline(exported)
    ours.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    drawn = [pipe([1, 5], generator=seeded(2), **options).images for pipe in (pipeline, ours)]
    torch.testing.assert_close(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", [UniPCMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler]
)
def test_schedulers_can_be_swapped(exported: Path, scheduler: Any) -> None:
    pipeline = load_as_others_do(exported, exported)
    before = pipeline([1], num_inference_steps=5, generator=seeded(2), output_type="pt").images
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    after = pipeline([1], num_inference_steps=5, generator=seeded(2), output_type="pt").images
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)
    refined = pipeline([1], image=after, strength=0.3, generator=seeded(2), output_type="pt")
    assert bool(torch.isfinite(refined.images).all())


# Given images.


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["truncated", "noise_to_noise"])
@pytest.mark.parametrize("t", [1, 9, T0])
def test_refinement_is_that_of_sampling(chain: str, t: int) -> None:
    """Noised as the formula says, then exactly `fedpdm.diffusion.twostage.refine`."""
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine, chain=chain)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 1, 8, 8), np.uint8)
    labels = torch.tensor([0, 2])
    noise = torch.randn((2, 1, 8, 8), generator=seeded(4))
    abar = float(np.prod(1.0 - schedule.betas[:t]))
    x_t = abar**0.5 * normalize(pixels, shift=-1.0) + (1.0 - abar) ** 0.5 * noise
    expected = refine(
        fine,
        x_t,
        SamplerSettings(schedule=schedule, t0=T0, num_steps=max(1, round(20 * t / T))),
        t=t,
        labels=labels,
        generator=seeded(),
    )
    image = torch.from_numpy(pixels).float() / 255.0
    drawn = pipeline(
        labels,
        image=image,
        strength=None if t == T0 else t / T,
        num_inference_steps=20,
        generator=seeded(4),
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn, (expected / 2.0).clamp(0.0, 1.0), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_strength_says_how_much_is_kept() -> None:
    schedule, coarse, fine = make_pair()
    pipeline = wrap(schedule, coarse, fine)
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    same = pipeline([1], image=picture, strength=0.0).images[0]
    assert np.array_equal(np.asarray(same), np.asarray(picture))

    def distance(strength: float) -> float:
        drawn = pipeline([1], image=picture, strength=strength, generator=seeded(1)).images[0]
        return float(np.abs(np.asarray(drawn, float) - np.asarray(picture, float)).mean())

    assert 0.0 < distance(0.1) < distance(0.6)
    x_T = torch.randn((1, 1, 8, 8), generator=seeded(1))
    fresh = pipeline.generate(x_T, [1])
    abar = float(schedule.alphas_cumprod[-1])
    given = normalize(np.asarray(picture)[None, None], shift=-1.0)
    whole = pipeline.generate(abar**0.5 * given + (1.0 - abar) ** 0.5 * x_T, [1], start=T)
    drawn = pipeline([1], image=picture, strength=1.0, generator=seeded(1), output_type="pt")
    torch.testing.assert_close(drawn.images, (whole / 2.0).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, fresh, atol=1e-6)  # a trace of the image is left


@pytest.mark.slow
def test_kinds_of_images_agree() -> None:
    """PIL, array and tensor are one; one image serves many labels, one label many images."""
    pipeline = wrap(*make_pair())
    pixels = np.random.default_rng(3).integers(0, 256, (2, 8, 8), np.uint8)
    array = pixels[..., None].astype(np.float32) / 255.0

    def draw(image: Any, labels: Any = (0, 2)) -> torch.Tensor:
        options: dict[str, Any] = {"num_inference_steps": 8, "output_type": "pt"}
        images: Any = pipeline(
            torch.tensor(labels), image=image, generator=seeded(1), **options
        ).images
        return images

    first = draw([Image.fromarray(one) for one in pixels])
    assert torch.equal(first, draw(array))
    assert torch.equal(first, draw(torch.from_numpy(array).permute(0, 3, 1, 2)))
    assert torch.equal(draw(array, (1, 1)), draw(array, (1,)))
    assert torch.equal(draw(array, (1, 1)), draw(array, 1))
    twice = draw(array[:1].repeat(2, axis=0))
    torch.testing.assert_close(twice, draw(array[:1]))
    torch.testing.assert_close(twice, draw(Image.fromarray(pixels[0])))
    assert not torch.equal(first, draw(array[::-1].copy()))


@pytest.mark.slow
def test_a_coarse_sample_is_refined_by_the_fine_model() -> None:
    """`method="coarse"`, then `image=`: below t0 only the fine network is asked."""
    pipeline = wrap(*make_pair())
    coarse = pipeline([0, 1], method="coarse", generator=seeded(1), output_type="pt").images
    asked: list[str] = []
    for name in ("coarse_unet", "fine_unet"):
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: asked.append(name))
    refined = pipeline([0, 1], image=coarse, generator=seeded(2), output_type="pt").images
    assert set(asked) == {"fine_unet"}
    assert len(asked) == round(25 * T0 / T)
    assert refined.shape == coarse.shape
    pipeline([0, 1], image=coarse, strength=1.0, generator=seeded(2))
    assert set(asked) == {"coarse_unet", "fine_unet"}


IMAGE = torch.full((1, 1, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength needs an image to start from, got 0.5 and none"),
        ({"image": IMAGE, "strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
        ({"image": IMAGE * 3}, r"values must be floating point in \[0, 1\]"),
        ({"image": IMAGE * torch.nan}, r"values must be floating point in \[0, 1\]"),
        ({"image": IMAGE[..., :4]}, r"with C, H, W = \(1, 8, 8\), got \(1, 1, 8, 4\)"),
        ({"image": IMAGE.repeat(3, 1, 1, 1)}, "3 images for 2 labels"),
        ({"image": Image.new("RGB", (9, 8))}, r"got \(1, 1, 8, 9\)"),
        ({"image": "cat.png"}, "image must be PIL images, an array"),
        ({"image": []}, "image must be PIL images, an array"),
        ({"image": IMAGE, "num_inference_steps": 0}, "num_inference_steps must be at least 1"),
    ],
)
def test_refinement_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(*make_pair())([0, 1], **options)


def test_two_chains_refine_below_the_hand_over_only() -> None:
    pipeline = wrap(*make_pair(), chain="noise_to_noise")
    for options in ({"strength": 0.9}, {"method": "coarse"}):
        with pytest.raises(ValueError, match=r"method pfdm and strength at most t0 / T = 0\.6"):
            pipeline([0], image=IMAGE, **options)
    alone = wrap(*make_pair(), fine_t_max=T0)
    alone([0], image=IMAGE, method="alone", num_inference_steps=4)
    with pytest.raises(ValueError, match="this one was trained at t <= 24 of 40"):
        alone([0], image=IMAGE, method="alone", strength=0.9)
