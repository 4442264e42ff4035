"""Baselines in the in-process engine: what they train on, what they send, what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.config import RunConfig
from fedpdm.data.spec import build_image_spec
from fedpdm.diffusion.training import BatchLoss, OptimizerSettings, Trainer
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.calibration import UnreachableEpsilonError
from fedpdm.privacy.dpsgd import DpSgdSettings, PrivateTrainer, dp_sgd_noise_multiplier
from fedpdm.privacy.planning import build_release_plan
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.losses import raw_coarse_batch_loss
from fedpdm.setup.run_setup import build_schedule, set_up
from fedpdm.storage.client_store import ClientStore
from strategies.answers import ClientAnswer
from strategies.baselines import TrainingAlone
from strategies.roster import ClientFailure
from tests.support.baselines import (
    BASELINES,
    CPU,
    DELTA,
    EPSILON,
    KINDS,
    baseline,
    distance,
    failing_request,
    final_weights,
    local_of,
    spied_run,
    untrained,
)
from tests.support.strategy_fakes import settings
from tests.support.toys import same

Sent = list[tuple[str, list[bytes], list[bytes]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Path, Sent]]:
    """A run of each kind, with image metrics."""
    root, runs = tmp_path_factory.mktemp("baselines"), {}
    for kind in KINDS:
        config = baseline(kind, evaluation={"image_metrics": True})
        runs[kind] = config, root / kind, spied_run(config, root / kind)
    return runs


def optimizer_settings(config: RunConfig, steps: int) -> OptimizerSettings:
    """Those of the shared model, key by key."""
    section = config.coarse
    return OptimizerSettings(
        lr=section.lr,
        batch_size=section.batch_size,
        total_steps=steps,
        warmup_steps=section.warmup_steps,
        decay=section.decay,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
        ema_decay=section.ema_decay,
        precision=config.run.precision,
    )


def loss_on(
    config: RunConfig, trainer: Trainer, images: np.ndarray, labels: np.ndarray
) -> BatchLoss:
    return raw_coarse_batch_loss(
        set_up(config), trainer.model, images=images, labels=labels, training=True, device=CPU,
    )  # fmt: skip


def test_the_loss_of_raw_images_is_the_ddpm_loss_of_the_formula() -> None:
    config = baseline("fedavg", coarse={"label_dropout": 0.5})
    model = untrained(config)
    local = local_of(config, Path("unused"), 0)
    images, labels = local.held.images.images[:20].copy(), local.held.images.labels[:20].copy()
    loss = raw_coarse_batch_loss(
        set_up(config), model, images=images, labels=labels, training=True, device=CPU,
    )  # fmt: skip
    indices = torch.arange(20)
    found = loss(indices, torch.Generator().manual_seed(4))
    draws = torch.Generator().manual_seed(4)
    dropped = torch.rand(20, generator=draws) < 0.5
    t = torch.randint(1, 1001, (20,), generator=draws)
    noise = torch.randn((20, 3, 8, 8), generator=draws)
    abar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t - 1].view(-1, 1, 1, 1)
    x_0 = torch.from_numpy(images).double() / 127.5  # -1 is black, and the shift
    x_t = (abar.sqrt() * x_0 + (1 - abar).sqrt() * noise).float()
    asked = torch.from_numpy(labels).masked_fill(dropped, -1)
    error = (model(x_t, t, labels=asked) - x_0).square().mean(dim=(1, 2, 3))
    assert 0 < int(dropped.sum()) < 20
    torch.testing.assert_close(
        found, (error / (1 - abar.flatten())).float(), rtol=1e-4, atol=1e-6
    )  # SNR + 1


# --- What is trained on what ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "first"])
def test_centralised_training_is_one_loop_over_everybodys_training_images(
    finished: dict[str, tuple[RunConfig, Path, Sent]], who: str
) -> None:
    config, out, _ = finished["centralised"]
    clients = [local_of(config, out, client) for client in ((0, 1) if who == "all" else (0,))]
    images = np.concatenate([local.held.images.images[local.held.train] for local in clients])
    labels = np.concatenate([local.held.train_labels for local in clients])
    assert len(images) == 54 * len(clients)
    model = untrained(config)
    trainer = Trainer(model, optimizer_settings(config, 2 * 6), device=CPU)
    for round in (1, 2):
        trainer.train(
            loss_on(config, trainer, images, labels),
            sample_weights=torch.ones(len(images), dtype=torch.float64),
            num_steps=6,  # as many as both clients would take
            generator=torch_generator(3, Purpose.SERVER_TRAINING, round=round),
        )
    # Planted fault: one client's images alone are not enough.
    assert same(final_weights(out), trainer.ema()) is (who == "all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedavg", "dp_sgd"])
def test_one_client_of_federated_averaging_is_local_training(tmp_path: Path, kind: str) -> None:
    config = baseline(
        kind, data={"max_images": 60}, partition={"num_clients": 1}, aggregation={"ema_decay": 0.0}
    )
    run_in_process(config, tmp_path / "run")
    local = local_of(config, tmp_path / "run", 0)
    model = untrained(config)
    options = optimizer_settings(config, 2 * 3)
    trainer = Trainer(model, options, device=CPU)
    if kind == "dp_sgd":
        sigma = dp_sgd_noise_multiplier(
            epsilon=EPSILON, delta=DELTA, sample_rate=16 / 54, num_steps=6
        )
        private = DpSgdSettings(noise_multiplier=sigma, max_grad_norm=1.0, multiplicity=4)
        trainer = PrivateTrainer(model, options, private, device=CPU)
    start = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    images, labels = local.held.images.images[local.held.train], local.held.train_labels
    for round in (1, 2):  # one uninterrupted model and optimiser
        trainer.train(
            loss_on(config, trainer, images, labels),
            sample_weights=torch.ones(54, dtype=torch.float64),
            num_steps=3,
            generator=torch_generator(3, Purpose.COARSE_TRAINING, client=0, round=round),
        )
    found = final_weights(tmp_path / "run")
    assert distance(found, start) > 0.1
    assert distance(found, dict(trainer.weights())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedavg", "dp_sgd"])
def test_variants_of_the_average(tmp_path: Path, kind: str) -> None:
    """FedProx without its pull is FedAvg, with it stays nearer; int8 sends a quarter."""
    chosen: dict[str, dict[str, Any]] = {
        "plain": {},
        "no pull": {"method": "fedprox", "proximal_mu": 0.0},
        "pull": {"method": "fedprox", "proximal_mu": 100.0},
        "int8": {"encoding": "int8"},
    }
    start = dict(untrained(baseline(kind)).network.named_parameters())
    weights, up = {}, {}
    for name, aggregation in chosen.items():
        config = baseline(kind, run={"rounds": 1}, aggregation={"ema_decay": 0.0, **aggregation})
        run_in_process(config, tmp_path / name)
        weights[name] = final_weights(tmp_path / name)
        (record,) = json.loads((tmp_path / name / "metrics.json").read_text())["rounds"]
        up[name] = record["bytes_up"]
    moved = distance(weights["plain"], start)
    assert same(weights["no pull"], weights["plain"])
    assert not same(weights["pull"], weights["plain"])
    assert distance(weights["pull"], start) < moved
    assert 0 < distance(weights["int8"], weights["plain"]) < moved
    assert up["int8"] < 0.35 * up["plain"]  # a small network's names count


@pytest.mark.slow
def test_training_alone_gives_the_fine_models_of_a_pfdm_run(
    finished: dict[str, tuple[RunConfig, Path, Sent]], tmp_path: Path
) -> None:
    """Fine training does not hear of the shared model: bit for bit the same state."""
    run_in_process(baseline("alone", run={"seed": 4}), tmp_path / "other")
    for client in (0, 1):
        states = [
            ClientStore(out / "clients" / str(client)).load_state(2, "fine")
            for out in (finished["alone"][1], finished["pfdm"][1], tmp_path / "other")
        ]
        assert int(states[0]["step"]) == 8
        assert same(states[0], states[1])
        assert not same(states[0], states[2])


# --- What is sent ---------------------------------------------------------------------------


@pytest.mark.slow
def test_training_alone_sends_not_one_byte(
    finished: dict[str, tuple[RunConfig, Path, Sent]],
) -> None:
    _, out, sent = finished["alone"]
    assert [kind for kind, *_ in sent].count("fit") == 4
    assert [kind for kind, *_ in sent].count("evaluate") == 4
    assert all(asked == answered == [] for _, asked, answered in sent)
    for record in json.loads((out / "metrics.json").read_text())["rounds"]:
        assert record["bytes_up"] == record["bytes_down"] == 0
        assert "heldout_coarse_loss" not in record
    assert any(asked and answered for _, asked, answered in finished["pfdm"][2])  # it can be seen
    for kind, asked, answered in finished["centralised"][2]:  # no weights to train, no answer
        assert (bool(asked), answered) == (kind == "evaluate", [])


def test_training_alone_takes_no_message() -> None:
    strategy = TrainingAlone(
        settings=settings(), weights={}, run=None, announce=print, finish=None  # type: ignore[arg-type]
    )  # fmt: skip
    answer = ClientAnswer(client_id=2, num_examples=5, metrics={})
    strategy.accept(1, answer, [])
    with pytest.raises(wire.WireError, match="client 2 sent a message where none was asked for"):
        strategy.accept(1, answer, [np.zeros(3, np.uint8)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASELINES)
def test_no_baseline_makes_a_release(
    finished: dict[str, tuple[RunConfig, Path, Sent]], kind: str
) -> None:
    def left_over(out: Path) -> list[str]:
        names = ("ledger.jsonl", "releases", "privacy.json", "privacy.txt")
        folders = [*(out / "clients").iterdir(), out / "server"]
        return [str(f / name) for f in folders for name in names if (f / name).exists()]

    _, out, _ = finished[kind]
    assert left_over(out) == []
    rounds = json.loads((out / "metrics.json").read_text())["rounds"]
    assert [c["num_released"] for record in rounds for c in record["clients"]] == [0] * 4
    assert len(left_over(finished["pfdm"][1])) == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASELINES)
def test_a_budget_that_no_release_reaches_is_no_matter(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Only the run with a release is calibrated, and refused."""
    asked: list[int] = []

    def out_of_reach(*_: Any, **__: Any) -> int:
        asked.append(1)
        raise UnreachableEpsilonError("out of reach")

    monkeypatch.setattr("fedpdm.privacy.mechanism.images.calibrate_t0", out_of_reach)
    config, spec = baseline(kind), build_image_spec(baseline(kind))
    assert build_release_plan(config, build_schedule(config), spec) is None
    assert not asked
    with pytest.raises(UnreachableEpsilonError):
        build_release_plan(baseline("pfdm"), build_schedule(config), spec)


# --- What is left behind --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_measures_its_own_models(
    finished: dict[str, tuple[RunConfig, Path, Sent]], kind: str
) -> None:
    _, out, _ = finished[kind]
    wanted = {"pfdm": {"pfdm", "alone"}, "alone": {"alone"}}.get(kind, {"shared"})
    final = json.loads((out / "metrics.json").read_text())["final"]
    names = {name.split("_")[1] for name in final["clients"][0] if name.endswith("_frechet")}
    assert names == wanted | {"own"}
    assert ("heldout_coarse_loss" in final) is (kind != "alone")
    for client in (0, 1):
        store = ClientStore(out / "clients" / str(client))
        samples = store.load_samples()
        assert samples is not None
        assert samples.keys() - {"labels", "coarse"} == wanted
        assert bool(store.load_state(2, "fine")) is (kind in ("pfdm", "alone"))
    assert (out / "coarse.safetensors").exists() is (kind != "alone")
    told = (out / "log.txt").read_text()
    (row,) = [line for line in told.splitlines() if line.startswith("  client 1 ")]
    distances = [final["clients"][1].get(f"all_{m}_frechet") for m in (*sorted(wanted), "own")]
    cells = [f"{value:.2f}" for value in distances]
    assert [cell for cell in row.split()[3:6] if cell != "-"] == (
        cells if kind != "pfdm" else [cells[1], cells[0], cells[2]]
    )
    assert ("  shared  alone" in told) is (wanted == {"shared"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASELINES)
def test_an_interrupted_baseline_resumes_to_the_same_weights(
    finished: dict[str, tuple[RunConfig, Path, Sent]], tmp_path: Path, kind: str
) -> None:
    """The second client's connection breaks in the second round; moments come from the disk."""
    config, reference, _ = finished[kind]
    with failing_request(4), pytest.raises(ClientFailure, match="the client is gone"):
        run_in_process(config, tmp_path)
    assert not (tmp_path / "privacy.json").exists()
    run_in_process(config, tmp_path, resume=True)
    if kind != "alone":
        assert same(final_weights(tmp_path), final_weights(reference))
    for client in (0, 1):
        one, other = (
            [ClientStore(out / "clients" / str(client)).load_state(2, role) for role in
             ("coarse", "fine")]
            for out in (tmp_path, reference)
        )  # fmt: skip
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
        assert bool(one[0]) is (kind in ("fedavg", "dp_sgd"))
