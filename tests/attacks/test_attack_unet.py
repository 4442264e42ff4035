"""`fedpdm attack --unet`: any diffusers directory, any images; what is asked of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from fedpdm.attacks.jobs.unet import UNetDenoiser, open_unet, read_images
from fedpdm.cli import main
from fedpdm.diffusion.schedule import make_schedule
from tests.support.command_line import without_advice


def tiny(**given: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1, "norm_num_groups": 4, **given,
    }  # fmt: skip
    return UNet2DModel(**options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A labelled model with its scheduler, and two sets of images beside it."""
    tiny(num_class_embeds=3).save_pretrained(tmp_path / "model" / "unet")
    DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction").save_pretrained(
        tmp_path / "model" / "scheduler"
    )
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        images = rng.integers(0, 256, (24, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(24) % 2)
    return tmp_path


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_predictions_are_diffusers_own(prediction: str) -> None:
    """The oracle is diffusers: its DDPM step says what x0 it sees in the same output."""
    network, schedule = tiny(), make_schedule("linear", num_steps=100)
    denoiser = UNetDenoiser(network, schedule, prediction=prediction)
    scheduler = DDPMScheduler(
        trained_betas=schedule.betas.astype(np.float32), prediction_type=prediction,
        num_train_timesteps=100, clip_sample=False,
    )  # fmt: skip
    x, none = torch.randn(2, 1, 8, 8), torch.tensor([-1, -1])
    with torch.no_grad():
        for t in (1, 40, 100):
            answer = denoiser(x, torch.tensor([t, t]), labels=none)
            raw = network(x, t - 1).sample
            wanted = scheduler.step(raw, t - 1, x).pred_original_sample
            assert torch.allclose(answer, wanted, rtol=1e-3, atol=1e-3)


def test_directories_are_understood(folder: Path, tmp_path: Path) -> None:
    model = open_unet(folder / "model", null_label=2)
    assert model.target.schedule.num_steps == 50
    assert model.target.labels_known
    denoiser: Any = model.target.denoiser
    assert denoiser.prediction == "v_prediction"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    none = denoiser(x, t, labels=torch.tensor([-1, -1]))
    assert torch.equal(none, denoiser(x, t, labels=torch.tensor([2, 2])))
    assert not torch.equal(none, denoiser(x, t, labels=torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="--null-label"):
        open_unet(folder / "model").target.denoiser(x, t, labels=torch.tensor([-1, -1]))

    tiny(out_channels=2).save_pretrained(tmp_path / "plain")  # it predicts variances too
    with pytest.raises(ValueError, match="--prediction"):
        open_unet(tmp_path / "plain")
    with pytest.raises(ValueError, match="--betas"):
        open_unet(tmp_path / "plain", prediction="epsilon")
    plain = open_unet(tmp_path / "plain", prediction="epsilon", betas=(1e-4, 0.02), num_steps=1000)
    assert not plain.target.labels_known
    assert plain.target.schedule.alpha_bar(690) == pytest.approx(
        make_schedule("linear").alpha_bar(690)
    )
    assert plain.target.denoiser(x, t, labels=torch.tensor([-1, -1])).shape == x.shape


def test_images_from_folders_and_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for at, name in enumerate(("cat", "cat", "dog", "ant")):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[at]).save(tmp_path / "set" / name / f"{at}.png")
    images, labels = read_images(tmp_path / "set", option="--members", channels=3)
    order = [3, 0, 1, 2]
    assert np.array_equal(images, pixels[order].transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 1, 2]
    np.savez(tmp_path / "set.npz", images=pixels)
    images, labels = read_images(tmp_path / "set.npz", option="--members", channels=3)
    assert np.array_equal(images, pixels.transpose(0, 3, 1, 2))
    assert labels.tolist() == [0] * 4


@pytest.mark.slow
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["attack", "--unet", str(folder / "model"), "--members", str(folder / "a.npz")]
    command += ["--non-members", str(folder / "b.npz"), "--out", str(folder / "out")]
    assert main([*command, "--attacks", "loss,pia,clid"]) == 0
    assert "clid is left out" in capsys.readouterr().err
    facts = json.loads((folder / "out" / "attacks.json").read_text())
    assert [each["name"] for each in facts["attacks"]] == ["loss on unet", "pia on unet"]
    assert facts["attacks"][0]["scores"]["num_members"] == 24
    assert facts["attacks"][0]["parameters"]["t"] == 50  # 200 is more than this model's T
    text = (folder / "out" / "summary.md").read_text()
    assert "is what was said, not checked" in text
    assert main([*command, "--attacks", "clid", "--null-label", "2"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"--unet": "nothing"}, "is no diffusers model directory"),
        ({"--members": "nothing.npz"}, "--members: "),
        ({"--members": "wrong.npz"}, "--members: images must be of the model's shape (1, 8, 8)"),
        ({"--non-members": "a.npz"}, "--non-members: 24 images are members too"),
        ({"--non-members": "other.npz"}, "no non-members of the members' classes"),
        ({"--non-members": "many.npz"}, "labels must be in [0, 2], got 7"),
        ({"--attacks": "linkage"}, "linkage needs a run"),
        ({"--betas": "1"}, "--betas: must be like"),
        ({"--betas": "0,2"}, "--betas: must be in (0, 1)"),
        ({"--prediction": "noise"}, "--prediction: must be of epsilon"),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, str], line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    np.savez(folder / "wrong.npz", images=rng.integers(0, 256, (4, 9, 9), dtype=np.uint8))
    eights = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(folder / "other.npz", images=eights, labels=[2] * 4)
    np.savez(folder / "many.npz", images=eights, labels=[0, 1, 2, 7])
    given = {"--unet": "model", "--members": "a.npz", "--non-members": "b.npz"} | changes
    words = ["attack", "--out", str(folder / "out")]
    for name, value in given.items():
        words += [name, str(folder / value) if name in list(given)[:3] else value]
    assert main(words) == 2
    said = without_advice(capsys.readouterr().err).strip().splitlines()
    assert line in said[-1]
    assert sum(each.startswith("fedpdm: ") for each in said) == 1
