"""The library's front door, by what the modules behind it promise."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedpdm
import fedpdm.api
from fedpdm.config import ConfigError, RunConfig, config_from_mapping
from fedpdm.data import ImageSet
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.events import release_event
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.run_setup import build_schedule
from fedpdm.storage.files import StoreError
from tests.support.apart import run_apart


def settings(**sections: Any) -> RunConfig:
    """Digits for two clients, networks of no quality."""
    small = {"preset": "nano", "batch_size": 8, "steps_per_round": 2, "warmup_steps": 1}
    given: dict[str, Any] = {
        "name": "front-door",
        "data": {"name": "digits", "max_images": 160},
        "partition": {"num_clients": 2, "majority_classes": 5, "majority_ratio": 4},
        "privacy": {"epsilon": 10, "clip_norm": 5},
        "coarse": small,
        "fine": small,
        "sampling": {"num_steps": 3},
    }
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section}
    return fedpdm.configure(**given)


@pytest.fixture(scope="module")
def clients() -> tuple[ImageSet, ...]:
    config = settings()
    return fedpdm.share_out(config, fedpdm.load_images(config))


LAZY = """
import sys
import fedpdm
heavy = {"torch", "numpy", "flwr", "diffusers", "scipy"} & set(sys.modules)
assert not heavy, heavy
assert "calibrate" in dir(fedpdm)
try:
    fedpdm.calibrat
except AttributeError as error:
    assert str(error) == "module 'fedpdm' has no attribute 'calibrat'", error
else:
    raise AssertionError("there is no such name")
assert "torch" not in sys.modules
from fedpdm import calibrate
assert "torch" in sys.modules and "flwr" not in sys.modules
"""


@pytest.mark.slow
def test_importing_the_package_imports_no_library() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there() -> None:
    offered = [name for name, value in vars(fedpdm.api).items() if inspect.isfunction(value)]
    assert sorted(fedpdm.__all__) == sorted(offered)
    for name in fedpdm.__all__:
        assert getattr(fedpdm, name) is getattr(fedpdm.api, name)
        assert getattr(fedpdm, name).__doc__, name


# What the documentation, the examples and the notebook named before the modules moved.
OLD_PATHS = {
    "fedpdm.accountant": "epsilon_spent",
    "fedpdm.api.models": "train_coarse",
    "fedpdm.api.releasing": "release",
    "fedpdm.api.running": "run",
    "fedpdm.attacks.auditing": "audit",
    "fedpdm.attacks.linkage": "linkage_attack",
    "fedpdm.attacks.membership.running": "run_membership",
    "fedpdm.build": "load_public build_schedule",
    "fedpdm.calibration": "calibrate Calibration calibrate_t0 UnreachableEpsilonError",
    "fedpdm.cli": "main",
    "fedpdm.config": "ToyConfig config_reference",
    "fedpdm.data.imageset": "ImageSet",
    "fedpdm.denoisers": "Denoiser",
    "fedpdm.export": "export_pipeline load_pipeline sample_grid",
    "fedpdm.ledger": "read_ledger",
    "fedpdm.mechanism": "release",
    "fedpdm.mechanism.events": "release_event",
    "fedpdm.mechanism.gaussian": "clip_l2",
    "fedpdm.noise": "SystemNoise",
    "fedpdm.objectives": "denoising_loss",
    "fedpdm.pictures": "draw_image_grid",
    "fedpdm.pipeline": "PFDMPipeline",
    "fedpdm.releases.store": "ReleaseStore",
    "fedpdm.sampling": "sample",
    "fedpdm.schedule": "make_schedule",
    "fedpdm.training": "Trainer",
    "fedpdm.types": "ReleasedDataset CoarseUpdate TrainReport SamplerOutput",
    "fedpdm.wire": "decode_update",
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["import {0}", "from {1} import {2}", "from {0} import {3}"])
def test_paths_that_the_documentation_once_named_still_import(form: str, tmp_path: Path) -> None:
    """In a process that has imported other people's libraries and next to nothing of ours."""
    lines = ["import sys, fedpdm", "assert 'fedpdm.api.models' not in sys.modules"]
    for path, names in OLD_PATHS.items():
        package, _, module = path.rpartition(".")
        lines.append(form.format(path, package, module, names.replace(" ", ", ")))
        lines += [f"fedpdm{path.removeprefix('fedpdm')}.{name}" for name in names.split()]
    script = tmp_path / "paths.py"
    script.write_text("\n".join(lines))
    done = run_apart(script)
    assert done.returncode == 0, done.stderr


def test_a_moved_module_is_loaded_once() -> None:
    for old, new in (
        ("fedpdm.mechanism.gaussian", "fedpdm.privacy.mechanism.gaussian"),
        ("fedpdm.releases", "fedpdm.privacy.releases"),
    ):
        module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__name__ == new
    assert importlib.import_module("fedpdm.types").ReleasedDataset is ReleasedDataset
    with pytest.raises(ModuleNotFoundError, match=r"fedpdm\.privacy\.mechanism\.guessing"):
        importlib.import_module("fedpdm.mechanism.guessing")
    with pytest.raises(ModuleNotFoundError, match=r"fedpdm\.newcomer"):
        importlib.import_module("fedpdm.newcomer")


def test_configure_is_the_yaml_files_reading(tmp_path: Path) -> None:
    assert fedpdm.configure() == RunConfig()
    path = tmp_path / "mine.yaml"
    path.write_text("privacy: {epsilon: 3, clip_norm: 4}\nrun: {seed: 5}\n")
    expected = config_from_mapping(
        {"name": "mine", "privacy": {"epsilon": 1, "clip_norm": 4}, "run": {"seed": 5}}
    )
    assert fedpdm.configure(path, privacy={"epsilon": 1}) == expected
    with pytest.raises(ConfigError, match=r"privacy\.clipnorm: unknown key; did you mean clip_n"):
        fedpdm.configure(privacy={"clipnorm": 3})


def test_clients_share_all_images(clients: tuple[ImageSet, ...]) -> None:
    everything = fedpdm.load_images(settings())
    together = {row.tobytes() for images in clients for row in images.image_digests()}
    assert together == {row.tobytes() for row in everything.image_digests()}
    assert sum(map(len, clients)) == len(together)


def test_a_release_is_made_once_and_accounted_for(
    clients: tuple[ImageSet, ...], tmp_path: Path
) -> None:
    config, schedule = settings(), build_schedule(settings())
    assert fedpdm.account(tmp_path / "new").images == 0
    first = fedpdm.release(config, clients[0], tmp_path / "store")
    again = fedpdm.release(config, clients[0], str(tmp_path / "store"))
    assert torch.equal(first.x_tilde, again.x_tilde)
    setting = fedpdm.calibrate(fedpdm.make_schedule("linear"), epsilon=10, delta=1e-5, clip_norm=5)
    assert first.parameters.t0 == setting.t0 == 567  # docs/method.md section 2
    event = release_event(schedule, t0=567, clip_norm=5)
    spent = fedpdm.account(tmp_path / "store")
    assert spent.distribution == ((epsilon_spent([event], delta=1e-5), len(clients[0])),)
    dearer = settings(privacy={"epsilon": 12})
    with pytest.raises(StoreError, match="is a new release"):
        fedpdm.release(dearer, clients[0], tmp_path / "store")
    fedpdm.release(dearer, clients[0], tmp_path / "store", allow_new_release=True)
    assert fedpdm.account(tmp_path / "store").largest > 12
    with pytest.raises(StoreError, match="is the store of client 0, not of client 1"):
        fedpdm.release(config, clients[1], tmp_path / "store", client=1)


def test_the_config_of_a_baseline_releases_nothing(
    clients: tuple[ImageSet, ...], tmp_path: Path
) -> None:
    for section in ({"training": "none"}, {"images": "raw"}):
        with pytest.raises(ConfigError, match=r"coarse: images \w+, training \w+ releases nothing"):
            fedpdm.release(settings(coarse=section), clients[0], tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_only_releases_reach_the_coarse_model(
    clients: tuple[ImageSet, ...], tmp_path: Path
) -> None:
    config = settings()
    made = [fedpdm.release(config, own, tmp_path / str(m)) for m, own in enumerate(clients)]
    steps: list[int] = []
    coarse = fedpdm.train_coarse(
        config, made, num_steps=3, progress=lambda done, total, _: steps.append((done, total)[0])
    )
    assert steps[-1] == 3
    assert not coarse.training
    same = fedpdm.train_coarse(config, made, num_steps=3)
    other = fedpdm.train_coarse(config, made[:1], num_steps=3)

    def differs(a: Any, b: Any) -> bool:
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return any(not torch.equal(p, q) for p, q in pairs)

    assert not differs(coarse, same)
    assert differs(coarse, other)
    assert coarse.spec.num_classes == 10
    assert not coarse.spec.knows_clipping
    with pytest.raises(ValueError, match="at least one release"):
        fedpdm.train_coarse(config, [])
    with pytest.raises(ValueError, match=r"releases\[0\] must have t0 = 5\d\d, .* got 567"):
        fedpdm.train_coarse(settings(privacy={"epsilon": 12}), made)
    with pytest.raises(
        ValueError, match=r"images must be 3x16x16, as config\.data says, got 3x8x8"
    ):
        fedpdm.train_coarse(settings(data={"resolution": 16}), made)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        fedpdm.train_coarse(config, made, num_steps=0)


@pytest.mark.slow
def test_training_learns(clients: tuple[ImageSet, ...]) -> None:
    """The fine model's loss on fixed draws falls; equal seeds repeat, clients differ."""
    config = settings(fine={"lr": 0.003}, run={"seed": 4})
    losses: list[float] = []
    fine = fedpdm.train_fine(
        config, clients[0], num_steps=100, progress=lambda *report: losses.append(report[2])
    )
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:2])
    few = [fedpdm.train_fine(config, clients[0], num_steps=1, client=m) for m in (0, 0, 1)]
    first, same, other = (next(model.parameters()) for model in few)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    drawn = fedpdm.sample(config, None, fine, [3, -1], seed=2)
    assert drawn.shape == (2, 3, 8, 8)
    assert drawn.dtype == np.uint8


@pytest.fixture(scope="module")
def models(clients: tuple[ImageSet, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    config, folder = settings(), tmp_path_factory.mktemp("stores")
    made = [fedpdm.release(config, own, folder / str(m)) for m, own in enumerate(clients)]
    return fedpdm.train_coarse(config, made), fedpdm.train_fine(config, clients[0])


@pytest.mark.slow
def test_sampling_asks_coarse_then_fine(models: Any, clients: tuple[ImageSet, ...]) -> None:
    coarse, fine = models
    config, asked = settings(sampling={"num_steps": 20}), []
    hooks = [
        model.register_forward_pre_hook(lambda _, given, name=name: asked.append((name, given[1])))
        for name, model in (("coarse", coarse), ("fine", fine))
    ]
    both = fedpdm.sample(config, coarse, fine, [1, 2], seed=5)
    for hook in hooks:
        hook.remove()
    assert {name for name, t in asked if int(t[0]) > 567} == {"coarse"}
    assert {name for name, t in asked if int(t[0]) <= 567} == {"fine"}
    assert np.array_equal(both, fedpdm.sample(config, coarse, fine, np.array([1, 2]), seed=5))
    for other in (
        fedpdm.sample(config, coarse, fine, [1, 2], seed=6),
        fedpdm.sample(config, None, fine, [1, 2], seed=5),
        fedpdm.sample(config, coarse, None, [1, 2], seed=5),
    ):
        assert not np.array_equal(both, other)
    mixed = settings(sampling={"num_steps": 20, "coarse_worth": 30.0})
    with pytest.raises(ConfigError, match="mixing needs the client's images"):
        fedpdm.sample(mixed, coarse, fine, [1, 2])
    drawn = fedpdm.sample(mixed, coarse, fine, [1, 2], own=clients[0], seed=5)
    assert not np.array_equal(both, drawn)
    for wrong in ([10], [-2], [], [[1]]):
        with pytest.raises(ValueError, match=r"labels must be whole numbers in \[-1, 9\]"):
            fedpdm.sample(config, coarse, fine, wrong)
    with pytest.raises(ValueError, match="give a coarse model, a fine model, or both"):
        fedpdm.sample(config, None, None, [1])


@pytest.mark.slow
def test_attacks_see_what_they_should(
    models: Any, clients: tuple[ImageSet, ...], tmp_path: Path
) -> None:
    coarse, fine = models
    config = settings()
    link = fedpdm.attack_uploads(config, clients[0], tmp_path / "store", seed=1)
    assert link.agrees  # with the AUC that follows from the noise
    assert fedpdm.account(tmp_path / "store").releases_per_image == 1
    weak = settings(privacy={"epsilon": 200})
    assert fedpdm.attack_uploads(weak, clients[0], tmp_path / "weak").auc > link.auc + 0.1
    others = fedpdm.load_images(config, "test").subset(np.arange(40))
    some = clients[0].subset(np.arange(40))
    options: dict[str, Any] = {"coarse": coarse, "fine": fine}
    for target in ("coarse", "fine", "combined"):
        found = fedpdm.attack_model(config, some, others, target=target, **options)
        assert found.scores.num_members == found.scores.num_non_members == 40
    # The attacks work: images that a model is told are members of itself twice over are found.
    assert fedpdm.attack_model(config, some, some, **options).scores.auc.value == 0.5
    with pytest.raises(ValueError, match="target must be one of coarse, got 'fine'"):
        fedpdm.attack_model(config, some, others, coarse=coarse, target="fine")


@pytest.mark.slow
def test_an_overfitted_fine_model_is_caught(clients: tuple[ImageSet, ...]) -> None:
    """Few images, many steps: membership shows, so the attack is not deaf."""
    config = settings(fine={"lr": 0.006, "batch_size": 12})
    members, others = clients[0].subset(np.arange(12)), clients[1].subset(np.arange(60))
    fine = fedpdm.train_fine(config, members, num_steps=150)
    found = fedpdm.attack_model(
        config, members, others, fine=fine, target="fine", attack="loss"
    ).scores
    assert found.auc.value > 0.75


@pytest.mark.slow
def test_a_federation_and_its_export(tmp_path: Path) -> None:
    config = settings(run={"rounds": 1}, evaluation={"image_metrics": False})
    run = fedpdm.run(config, tmp_path / "run")
    pipeline = fedpdm.load_pipeline(fedpdm.export_client(run, tmp_path / "out", client=1))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline([0], num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 8, 8, 3)
    with pytest.raises(ConfigError, match="this run has finished; choose another --out"):
        fedpdm.run(config, tmp_path / "run")
