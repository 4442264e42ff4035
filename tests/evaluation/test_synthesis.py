"""Images of finished runs: which models draw them, from which weights and seeds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpdm.config import RunConfig
from fedpdm.data import denormalize
from fedpdm.data.loading import load_split
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.twostage import SamplerSettings, sample_two_stage
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import Synthesizer, open_synthesizer
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import build_denoiser, coarse_share
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import read_tensors, write_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.baselines import baseline, local_of

LABELS = np.array([0, 3, 9, 3, -1], dtype=np.int64)
KINDS = ("pfdm", "alone", "fedavg")
FINE = Path("rounds", "000002", "fine.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with large steps, after which weights and averages are far apart."""
    root = tmp_path_factory.mktemp("synthesis")
    for kind in KINDS:
        run_in_process(config_of(kind), root / kind)
    return {kind: root / kind for kind in KINDS}


def config_of(kind: str) -> RunConfig:
    return baseline(
        kind,
        coarse={"lr": 0.02},
        fine={"lr": 0.02},
        sampling={"coarse_worth": 5.0, "batch_size": 2},
    )


@pytest.fixture
def copied(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the PFDM run, to be damaged."""
    return Path(shutil.copytree(finished["pfdm"], tmp_path / "run"))


def drawn(out: Path, client: int = 0, seed: int = 7) -> np.ndarray:
    return open_synthesizer(RunDirectory(out), client).sample(LABELS, seed=seed)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of two sets of images in grey levels."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def loaded(out: Path, role: str, tensors: dict[str, torch.Tensor], prefix: str) -> Denoiser:
    """A denoiser with the weights that have a prefix."""
    config = RunDirectory(out).config()
    model = build_denoiser(set_up(config), role)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            parameter.copy_(tensors[prefix + name])
    return model.eval()


def by_hand(coarse: Denoiser | None, fine: Denoiser | None, out: Path) -> np.ndarray:
    """What client 1 draws for LABELS with seed 7, two at a time."""
    config = RunDirectory(out).config()
    setup = set_up(config)
    t0 = 1000 if setup.plan is None else setup.plan.t0
    local = local_of(config, out, 1)
    share = coarse_share(config, local.held.train_labels, num_classes=10)
    generator = torch_generator(7, Purpose.SAMPLING, client=1)
    images = []
    for part in torch.from_numpy(LABELS).split(2):
        x_T = torch.randn((len(part), 3, 8, 8), generator=generator)
        output = sample_two_stage(
            coarse, fine, x_T,
            SamplerSettings(
                schedule=setup.schedule, t0=t0, scheduler="dpm_solver", num_steps=3,
                coarse_share=share,
            ),
            labels=part, generator=generator,
        )  # fmt: skip
        images.append(denormalize(output.images, shift=-1.0).numpy())
    return np.concatenate(images)


# --- Which weights --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_drawn_with_the_averaged_weights(finished: dict[str, Path], kind: str) -> None:
    out = finished[kind]
    checkpoint = read_tensors(out / "server" / "checkpoint.safetensors")[0]

    def models(average: bool) -> tuple[Denoiser | None, Denoiser | None]:
        coarse = fine = None
        if kind != "alone":
            prefix = "ema." if average else "weights."
            coarse = loaded(out, "coarse", checkpoint, prefix)
        if kind != "fedavg":
            state = read_tensors(out / "clients" / "1" / FINE)[0]
            fine = loaded(out, "fine", state, "ema." if average else "model.")
        return coarse, fine

    found = drawn(out, client=1)
    assert (found.dtype, found.shape) == (np.uint8, (5, 3, 8, 8))
    assert found.std() > 5
    assert apart(found, by_hand(*models(True), out)) < 0.01
    assert apart(found, by_hand(*models(False), out)) > 2  # planted: the raw weights


@pytest.mark.slow
def test_raw_weights_and_moments_are_not_read(copied: Path) -> None:
    path = copied / "clients" / "0" / FINE
    before, (state, metadata) = drawn(copied), read_tensors(path)
    for name, tensor in state.items():
        if name.startswith(("model.", "exp_avg")):
            state[name] = torch.full_like(tensor, float("nan"))
    write_tensors(path, state, metadata)
    assert np.array_equal(drawn(copied), before)
    for name, tensor in state.items():
        if name.startswith("ema."):
            state[name] = 1.5 * tensor
    write_tensors(path, state, metadata)
    assert apart(drawn(copied), before) > 3


# --- Which models ---------------------------------------------------------------------------


def test_each_kind_of_run_has_its_models(finished: dict[str, Path]) -> None:
    for kind, coarse, fine in (("pfdm", 1, 1), ("alone", 0, 1), ("fedavg", 1, 0)):
        synthesizer = open_synthesizer(RunDirectory(finished[kind]), 0)
        assert (synthesizer.coarse is not None, synthesizer.fine is not None) == (coarse, fine)
        assert synthesizer.config == config_of(kind)
        local = local_of(synthesizer.config, finished[kind], 0)
        assert np.array_equal(synthesizer.own.train_labels, local.held.train_labels)


def test_alone(finished: dict[str, Path]) -> None:
    """The fine model at every t: of a PFDM run the images of training alone, which they are."""
    shared = open_synthesizer(RunDirectory(finished["pfdm"]), 0)
    alone = shared.alone()
    assert (alone.coarse, alone.fine) == (None, shared.fine)
    images = alone.sample(LABELS, seed=7)
    baseline_run = open_synthesizer(RunDirectory(finished["alone"]), 0)
    assert np.array_equal(images, baseline_run.sample(LABELS, seed=7))
    assert np.array_equal(images, baseline_run.alone().sample(LABELS, seed=7))
    assert apart(images, shared.sample(LABELS, seed=7)) > 0.5
    words = "^training alone needs a fine model that was trained at every t$"
    with pytest.raises(ValueError, match=words):
        open_synthesizer(RunDirectory(finished["fedavg"]), 0).alone()


@pytest.mark.slow
def test_a_fine_model_below_t0_cannot_be_alone(tmp_path: Path) -> None:
    config = baseline("pfdm", run={"rounds": 1}, fine={"t_range": "below_t0"})
    run_in_process(config, tmp_path / "run")
    synthesizer = open_synthesizer(RunDirectory(tmp_path / "run"), 0)
    assert synthesizer.settings.coarse_share is None
    assert synthesizer.sample(LABELS, seed=0).shape == (5, 3, 8, 8)
    with pytest.raises(ValueError, match="training alone needs a fine model that was trained at"):
        synthesizer.alone()


# --- Which noise ----------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_seeds_draw_equal_images(finished: dict[str, Path]) -> None:
    out = finished["pfdm"]
    synthesizer: Synthesizer = open_synthesizer(RunDirectory(out), 0)
    first = synthesizer.sample(LABELS, seed=7)
    assert np.array_equal(first, synthesizer.sample(LABELS, seed=7))
    assert np.array_equal(first, drawn(out))  # opened anew
    images = load_split(config_of("pfdm"), "train")
    again = open_synthesizer(RunDirectory(out), 0, images=images)
    assert np.array_equal(first, again.sample(LABELS, seed=7))
    assert apart(first, drawn(out, seed=8)) > 3
    assert apart(first, drawn(out, client=1)) > 3
    assert apart(first, synthesizer.sample(LABELS[::-1].copy(), seed=7)) > 0.2


# --- Errors ---------------------------------------------------------------------------------


def refusal(out: Path, client: int = 0) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(ValueError, match=r".") as caught:
        open_synthesizer(RunDirectory(out), client)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_run(tmp_path: Path) -> None:
    assert "is not a run directory (config.yaml is missing)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "missing"), [("pfdm", "coarse.safetensors"), ("alone", "privacy.json")]
)
def test_a_run_that_has_not_finished(
    finished: dict[str, Path], tmp_path: Path, kind: str, missing: str
) -> None:
    """Fine models of an earlier round are there, but are not the run's."""
    out = Path(shutil.copytree(finished[kind], tmp_path / "run"))
    (out / missing).unlink()
    assert refusal(out) == f"{out}: this run has not finished ({missing} is missing)"


def test_no_such_client(finished: dict[str, Path]) -> None:
    for client in (2, -1):
        line = refusal(finished["pfdm"], client)
        assert f"partition.num_clients: 2, but there is a client {client}" in line


def test_a_client_without_a_fine_model(copied: Path) -> None:
    shutil.rmtree(copied / "clients" / "1" / "rounds")
    store = copied / "clients" / "1"
    assert refusal(copied, 1) == f"{store}: client 1 has no fine model there"
    drawn(copied, 0)  # the other client's is


def test_damaged_files(copied: Path) -> None:
    path = copied / "clients" / "0" / FINE
    whole, (state, metadata) = path.read_bytes(), read_tensors(path)
    name = next(name for name in state if name.startswith("ema."))
    write_tensors(path, {k: v for k, v in state.items() if k != name}, metadata)
    assert re.search(r"^fine weights: names do not match; missing \['", refusal(copied))
    path.write_bytes(whole[:1000])
    assert "fine.safetensors" in refusal(copied)
    (copied / "coarse.safetensors").write_bytes(b"no such thing")
    assert "coarse.safetensors" in refusal(copied)
