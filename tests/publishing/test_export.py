"""Exports against the run that they come from, and samples drawn from them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.twostage import SamplerSettings, sample_two_stage
from fedpdm.publishing.export import export_pipeline, load_pipeline, sample_grid
from fedpdm.storage.run_directory import RunDirectory
from tests.support.fake_runs import FakeRun
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


# Exports.


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return FakeRun(tmp_path_factory.mktemp("run") / "fake")


@pytest.fixture(scope="module")
def exported(fake: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "client2"
    out.mkdir()  # an empty directory is as good as none
    assert export_pipeline(fake.run, client_id=2, out=out) == out
    assert os.listdir(out.parent) == ["client2"]  # nothing temporary is left
    return out


def test_export_holds_the_run(fake: FakeRun, exported: Path) -> None:
    assert sorted(os.listdir(exported)) == [
        "README.md",
        "coarse_unet",
        "fine_unet",
        "model_index.json",
        "pfdm_sampling.py",
        "pipeline.py",
        "privacy.json",
        "scheduler",
    ]
    for folder, trainer in (("coarse_unet", fake.coarse), ("fine_unet", fake.fine[2])):
        saved = load_file(exported / folder / "diffusion_pytorch_model.safetensors")
        assert saved.keys() == trainer.ema().keys()
        assert all(torch.equal(saved[name], value) for name, value in trainer.ema().items())
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["trained_betas"] == fake.schedule.betas.tolist()
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == ("sample", "trailing")
    index = json.loads((exported / "model_index.json").read_text())
    expected = {
        "t0": 600,
        "chain": "truncated",
        "coarse_prediction": "v",
        "fine_prediction": "epsilon",
        "num_classes": 10,
        "resolution": 8,
        "shift": -1.0,
        "guidance_scale": 1.5,
        "fine_t_max": 1000,
        "id2label": {str(k): str(k) for k in range(10)},
    }
    assert {key: index[key] for key in expected} == expected
    statement = fake.run.read_json("privacy.json")
    for name in ("epsilon_distribution", "unreadable_stores"):  # number of images; places here
        del statement[name]
    assert json.loads((exported / "privacy.json").read_text()) == statement
    for path in exported.rglob("*.*"):
        assert path.suffix == ".safetensors" or str(fake.run.root) not in path.read_text()


def test_model_card_states_the_guarantee(fake: FakeRun, exported: Path) -> None:
    card = " ".join((exported / "README.md").read_text().split())
    assert f"| {fake.plan.epsilon_exact:.4g} | 1e-05 | 600 of 1000 | 10 around -1 |" in card
    assert "**`fine_unet` is not covered.**" in card
    assert "exposes that client's own images" in card
    assert "The noise of the release was seeded" in card


def test_loaded_pipeline_gives_the_runs_images(fake: FakeRun, exported: Path) -> None:
    labels = torch.tensor([4, NO_LABEL])
    x_T = torch.randn((2, *fake.spec.shape), generator=seeded(1))
    expected = sample_two_stage(
        fake.averaged(fake.coarse),
        fake.averaged(fake.fine[2]),
        x_T,
        SamplerSettings(
            schedule=fake.schedule,
            t0=600,
            scheduler=fake.config.sampling.scheduler,
            num_steps=8,
            guidance=1.5,
        ),
        labels=labels,
        generator=seeded(),
    ).images
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline.generate(x_T, labels, num_inference_steps=8, generator=seeded())
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


ALONE = """
import sys
sys.modules["fedpdm"] = None  # importing it fails
import socket
def refuse(*args): raise OSError("no network here")
socket.socket.connect = refuse
{code}
assert images[0].size == (8, 8) and len(images) == 3
import torch
pipe.set_progress_bar_config(disable=True)
x_T = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(1))
torch.save(pipe.generate(x_T, [7], num_inference_steps=4), "{result}")
"""


@pytest.mark.slow
def test_export_works_without_this_project(exported: Path, tmp_path: Path) -> None:
    """The code of the model card, in a fresh interpreter that has diffusers and torch only."""
    example = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert example is not None
    workplace, result = tmp_path / "copy", tmp_path / "result.pt"
    subprocess.run(["cp", "-r", str(exported), str(workplace)], check=True)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # beside other tests
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE.format(code=example[1], result=result)],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (workplace / "image.png").exists()
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn((1, 3, 8, 8), generator=seeded(1))
    torch.testing.assert_close(
        torch.load(result), pipeline.generate(x_T, [7], num_inference_steps=4)
    )


def test_export_refuses(fake: FakeRun, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already and is not an empty directory"):
        export_pipeline(fake.run, client_id=2, out=exported)
    with pytest.raises(ValueError, match=r"client 1 has no fine model there.*have one: 0, 2$"):
        export_pipeline(fake.run, client_id=1, out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        export_pipeline(fake.run, client_id=2, out=tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="is not a run directory"):
        export_pipeline(RunDirectory(tmp_path), client_id=0, out=tmp_path / "out")
    unfinished = RunDirectory(tmp_path / "unfinished")
    unfinished.open(fake.config, resume=False)
    with pytest.raises(ValueError, match=r"has not finished \(coarse.safetensors is missing\)"):
        export_pipeline(unfinished, client_id=0, out=tmp_path / "out")
    other = FakeRun(tmp_path / "other", privacy={"epsilon": None, "t0": 650})
    with pytest.raises(
        ValueError, match=r"released with t0 = 650, .*; the store belongs to another run"
    ):
        export_pipeline(fake.run, client_id=2, store=other.run.client_path(2), out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "other", "unfinished"]


def test_load_refuses(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an exported pipeline"):
        load_pipeline(tmp_path)
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(exported), str(damaged)], check=True)
    weights = damaged / "fine_unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged: cannot be loaded: .+") as caught:
        load_pipeline(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_sample_grid(exported: Path, tmp_path: Path) -> None:
    def draw(name: str, **options: Any) -> np.ndarray:
        out = tmp_path / name
        chosen = {"labels": [3], "num": 9, "num_steps": 2, "device": "cpu", **options}
        assert sample_grid(exported, out=out, **chosen) == out
        with Image.open(out) as picture:
            return np.asarray(picture.convert("RGB"))

    first = draw("a.png")
    assert min(first.shape[:2]) >= 3 * 48  # 3 rows and columns, enlarged to 48 pixels
    assert np.array_equal(first, draw("b.png"))
    assert not np.array_equal(first, draw("c.png", seed=1))
    assert not np.array_equal(first, draw("d.png", scheduler="ddpm"))
    for method in ("alone", "coarse"):
        assert not np.array_equal(first, draw("e.png", method=method))
    every = draw("all.png", labels=None, num=25)
    assert every.shape[0] >= 10 * 48  # a row per class
    assert every.shape[1] < 5 * 60

    for options, message in (
        (
            {"labels": [10]},
            r"label must be in \[-1, 9\] or the name of a class of the export .*, got 10",
        ),
        ({"labels": ["ten"]}, r"label must be in \[-1, 9\] or the name of a class .*, got ten"),
        ({"client": 1}, "client: .* is an export, of one client, got 1"),
        ({"num": 0}, "num must be at least 1 for each of 1 labels, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"scheduler": "best"}, "sampling.scheduler must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            draw("f.png", **options)
    with pytest.raises(ValueError, match=r"path must end in \.png"):
        draw("f.jpg")
