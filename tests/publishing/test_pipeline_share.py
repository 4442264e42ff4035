"""`coarse_share` in the diffusers pipeline and in exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.twostage import SamplerSettings, sample_two_stage
from fedpdm.publishing.export import export_pipeline, load_pipeline
from fedpdm.storage.client_store import ClientStore
from tests.publishing.test_export import FakeRun
from tests.publishing.test_pipeline import LABELS, T0, make_pair, wrap
from tests.support.toys import seeded

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SHARE = [1.0, 0.3, 0.0, 0.65]  # of three classes and no label


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dpm_solver", "ddim", "ddpm"])
@pytest.mark.parametrize(
    ("resolution", "predictions", "guidance"),
    [(8, ("v", "v"), 1.0), (7, ("epsilon", "sample"), 2.0)],
)
def test_same_images_as_sampling(
    scheduler: str, resolution: int, predictions: tuple[str, str], guidance: float
) -> None:
    schedule, coarse, fine = make_pair(resolution=resolution, predictions=predictions)
    labels = torch.cat([LABELS, torch.tensor([1])])
    x_T = torch.randn((4, 1, resolution, resolution), generator=seeded(1))
    expected = sample_two_stage(
        coarse, fine, x_T,
        SamplerSettings(
            schedule=schedule, t0=T0, scheduler=scheduler, num_steps=6, guidance=guidance,
            coarse_share=torch.tensor(SHARE),
        ),
        labels=labels, generator=seeded(),
    ).images  # fmt: skip

    def generated(share: list[float] | None, method: str = "pfdm") -> torch.Tensor:
        pipeline = wrap(schedule, coarse, fine, scheduler=scheduler, coarse_share=share)
        return pipeline.generate(
            x_T, labels, num_inference_steps=6, generator=seeded(), guidance_scale=guidance,
            method=method,
        )  # fmt: skip

    torch.testing.assert_close(generated(SHARE), expected, rtol=1e-4, atol=1e-4)
    # Class 0 has its whole share, class 2 none; the others lie between, and the check can fail.
    whole, alone = generated(None), generated(None, "alone")
    torch.testing.assert_close(expected[0], whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected[1], alone[1], rtol=1e-4, atol=1e-4)
    for index in (2, 3):
        for other in (whole, alone):
            assert not torch.allclose(expected[index], other[index], rtol=1e-2, atol=1e-2)
    for method in ("alone", "coarse"):  # one model: nothing to share
        assert torch.equal(generated(SHARE, method), generated(None, method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse_share": SHARE[:3]}, "coarse_share must be 4 numbers in [0, 1], got [1.0, 0.3"),
        ({"coarse_share": [0.0, 0.0, 0.0, 1.5]}, "coarse_share must be 4 numbers in [0, 1]"),
        ({"coarse_share": [0.0, 0.0, 0.0, float("nan")]}, "coarse_share must be 4 numbers in"),
        (
            {"coarse_share": SHARE, "chain": "noise_to_noise"},
            "coarse_share needs the chain truncated and a fine model for every t, got "
            "'noise_to_noise' and fine_t_max None",
        ),
        (
            {"coarse_share": SHARE, "fine_t_max": T0},
            "coarse_share needs the chain truncated and a fine model for every t, got "
            "'truncated' and fine_t_max 24",
        ),
    ],
)
def test_pipeline_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(*make_pair(), **options)


@pytest.mark.slow
def test_an_export_keeps_the_share(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path / "run", sampling={"coarse_worth": 10.0})
    counts = np.array([40, 3, 0, 7, 5, 1, 2, 9, 8, 25])
    ClientStore(fake.run.client_path(0)).save_class_counts(counts)
    out = export_pipeline(fake.run, client_id=0, out=tmp_path / "export")
    share = [*(10 / (10 + counts)), 10 / (10 + counts.mean())]
    pipeline = load_pipeline(out)
    assert pipeline.config["coarse_share"] == pytest.approx(share, rel=1e-6)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([int(counts.argmax()), int(counts.argmin()), -1])
    x_T = torch.randn((3, *fake.spec.shape), generator=seeded(1))
    found = pipeline.generate(x_T, labels, num_inference_steps=8, generator=seeded())

    def sampled(given: torch.Tensor | None) -> torch.Tensor:
        return sample_two_stage(
            fake.averaged(fake.coarse), fake.averaged(fake.fine[0]), x_T,
            SamplerSettings(
                schedule=fake.schedule, t0=600, scheduler=fake.config.sampling.scheduler,
                num_steps=8, coarse_share=given,
            ),
            labels=labels, generator=seeded(),
        ).images  # fmt: skip

    torch.testing.assert_close(found, sampled(torch.tensor(share)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, sampled(None), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_deployed_client_with_a_share_is_exported(tmp_path: Path) -> None:
    """Its images are not at hand, how many there are of each class is in its store."""
    fake = FakeRun(
        tmp_path / "run",
        run={"simulation": False},
        sampling={"coarse_worth": 10.0},
        evaluation={"image_metrics": False},
    )
    store = ClientStore(fake.run.client_path(0))
    with pytest.raises(ValueError, match=r"classes\.json: sampling\.coarse_worth .* no file$"):
        export_pipeline(fake.run, client_id=0, out=tmp_path / "export")
    (store.root / "classes.json").write_text("[1, -2]\n")
    with pytest.raises(ValueError, match=r"classes\.json: must be a list of counts"):
        export_pipeline(fake.run, client_id=0, out=tmp_path / "export")
    store.save_class_counts(np.array([1, 2]))
    with pytest.raises(ValueError, match=r"needs 10 counts of images, found 2$"):
        export_pipeline(fake.run, client_id=0, out=tmp_path / "export")
    assert not (tmp_path / "export").exists()
    store.save_class_counts(np.array([10, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
    out = export_pipeline(fake.run, client_id=0, out=tmp_path / "export")
    assert load_pipeline(out).config["coarse_share"][:2] == pytest.approx([0.5, 1.0])
