"""What baselines promise, and what is refused: configs, messages and exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import pld, rdp

from clients import workers
from clients.workers import borrowed
from fedpdm import wire
from fedpdm.config import ConfigError, config_to_yaml
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.dpsgd import PrivateTrainer
from fedpdm.privacy.statement import baseline_statement, plain_text
from fedpdm.publishing.export import export_pipeline
from fedpdm.storage.files import write_tensors
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.types import CoarseUpdate
from strategies.roster import ClientFailure
from tests.support.baselines import BASELINES, CPU, DELTA, EPSILON, KINDS, baseline, local_of
from tests.support.refusals import Refuser
from tests.support.strategy_fakes import START, arrays, drift, fedavg_server, fit_result, tensors

# --- DP-SGD's noise -------------------------------------------------------------------------


@pytest.fixture
def empty_shelf() -> Iterator[None]:
    workers._shelf.clear()
    yield
    workers._shelf.clear()


def spent(accountant: Any, sigma: float, *, num_images: int, steps: int) -> float:
    """Epsilon of DP-SGD by batches of 16, by an accountant of dp_accounting."""
    step = dp_accounting.PoissonSampledDpEvent(
        16 / num_images, dp_accounting.GaussianDpEvent(sigma)
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.slow
@pytest.mark.usefixtures("empty_shelf")
def test_the_noise_is_calibrated_for_each_clients_own_number_of_images(tmp_path: Path) -> None:
    config = baseline(
        "dp_sgd", run={"rounds": 3}, partition={"kind": "dirichlet", "alpha": 1.0}, fine={"lr": 0.1}
    )
    sizes, sigmas = [], []
    for client in (0, 1):
        local = local_of(config, tmp_path, client)
        with borrowed(local, "coarse", device=CPU, fresh=False) as trainer:
            assert isinstance(trainer, PrivateTrainer)
        privacy = trainer.privacy
        assert (privacy.max_steps, trainer.settings.batch_size) == (9, 16)
        assert (privacy.max_grad_norm, privacy.multiplicity) == (1.0, 4)
        sizes.append(len(local.held.train))
        sigmas.append(privacy.noise_multiplier)
    assert sizes[0] < len(local.held.images) < sizes[1] + len(local.held.heldout) + 1
    for num_images, sigma in zip(sizes, sigmas, strict=True):
        exact = spent(pld.PLDAccountant(), sigma, num_images=num_images, steps=9)
        assert EPSILON * (1 - 1e-3) < exact <= EPSILON * (1 + 1e-9)
        bound = spent(rdp.RdpAccountant(), sigma, num_images=num_images, steps=9)
        assert EPSILON < bound < 1.5 * EPSILON  # another accountant's, which is never below
    # Planted faults: the other client's noise, and a round more than was planned.
    assert spent(pld.PLDAccountant(), sigmas[1], num_images=sizes[0], steps=9) > 1.1 * EPSILON
    assert spent(pld.PLDAccountant(), sigmas[0], num_images=sizes[0], steps=12) > 1.05 * EPSILON


@pytest.mark.usefixtures("empty_shelf")
def test_fine_models_are_trained_without_that_noise(tmp_path: Path) -> None:
    for kind in ("fedavg", "pfdm"):
        config = baseline(kind)
        local = local_of(config, tmp_path, 0)
        with borrowed(local, "coarse", device=CPU, fresh=False) as trainer:
            assert not isinstance(trainer, PrivateTrainer)


def test_a_batch_that_is_no_part_of_the_images_is_refused(tmp_path: Path) -> None:
    config = baseline("dp_sgd", coarse={"batch_size": 55})
    with pytest.raises(
        ClientFailure,
        match=r"client 0: coarse\.batch_size: DP-SGD needs at most the client's 54 images, got 55",
    ) as caught:
        run_in_process(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


# --- Statements -----------------------------------------------------------------------------

PROMISES = {
    "alone": ("none", 0.0, "nothing is sent", "no model and no image leaves it"),
    "centralised": ("raw", None, "no privacy", "Nothing is promised"),
    "fedavg": ("raw", None, "no privacy", "Nothing is promised"),
    "dp_sgd": ("dp_sgd", EPSILON, "add or remove one, by DP-SGD", "(3, 1e-05)-differentially"),
}


@pytest.mark.parametrize("kind", BASELINES)
def test_statement(kind: str) -> None:
    name, epsilon, guarantee, words = PROMISES[kind]
    statement = baseline_statement(baseline(kind))
    assert json.loads(json.dumps(statement)) == statement
    assert (statement["baseline"], statement["epsilon"]) == (name, epsilon)
    assert statement["delta"] == DELTA
    assert statement["simulation"] is True
    assert guarantee in statement["guarantee"]
    text = plain_text(statement)
    assert "This run is a baseline." in text
    assert words in text
    # Nobody may read a local guarantee into a baseline.
    assert "local differential privacy per image" not in statement["guarantee"]
    assert "What is protected" not in text
    if name == "dp_sgd":
        assert "no local differential privacy" in text
        assert "who knows the seed can remove it" in text
    if name in ("dp_sgd", "none"):
        assert "Losses and image metrics, computed on raw images, are reported" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "fedavg"])
def test_a_run_leaves_its_statement(tmp_path: Path, kind: str) -> None:
    config = baseline(kind, run={"rounds": 1})
    run_in_process(config, tmp_path / "run")
    statement = baseline_statement(config)
    assert RunDirectory(tmp_path / "run").read_json("privacy.json") == statement
    assert (tmp_path / "run" / "privacy.txt").read_text() == plain_text(statement)
    assert f"baseline: {statement['guarantee']}" in (tmp_path / "run" / "log.txt").read_text()


# --- Configs --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["coarse.images=raw", "run.simulation=false"],
            "coarse.images: raw is a baseline for simulations (run.simulation: true)",
        ),
        (
            ["coarse.images=dp_sgd", "run.simulation=false"],
            "coarse.images: dp_sgd is a baseline for simulations (run.simulation: true)",
        ),
        (
            ["coarse.training=none", "run.simulation=false"],
            "coarse.training: none is a baseline for simulations (run.simulation: true)",
        ),
        (
            ["coarse.images=raw", "coarse.training=none"],
            "coarse.images: raw needs coarse.training, got none",
        ),
        (
            ["coarse.images=dp_sgd", "coarse.training=server"],
            "coarse.images: dp_sgd needs coarse.training: federated",
        ),
        (
            ["coarse.images=dp_sgd", "coarse.class_balance=0.5"],
            "coarse.class_balance: must be 0 with coarse.images: dp_sgd, which draws images alike, "
            "got 0.5",
        ),
        (
            ["coarse.images=dp_sgd", "privacy.epsilon=null", "privacy.t0=600"],
            "privacy.epsilon: coarse.images: dp_sgd needs it, got null",
        ),
        (
            ["coarse.training=none", "fine.t_range=below_t0"],
            "fine.t_range: must be all with coarse.training: none",
        ),
        (
            ["sampling.coarse_worth=10", "fine.t_range=below_t0"],
            "fine.t_range: must be all with sampling.coarse_worth",
        ),
        (
            ["sampling.coarse_worth=10", "coarse.objective=noise_to_noise"],
            "sampling.coarse_worth: needs coarse.objective: truncated, got noise_to_noise",
        ),
        (["sampling.coarse_worth=0"], "sampling.coarse_worth: must be greater than 0, got 0"),
        (["coarse.images=clean"], "coarse.images: must be one of released, raw, dp_sgd, got"),
        (["coarse.noise_multiplicity=0"], "coarse.noise_multiplicity: must be at least 1, got 0"),
    ],
)
def test_config_refused_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    words: str,
) -> None:
    assert words in Refuser(tmp_path, capsys, monkeypatch).run_line(*settings)


def test_configs_that_are_accepted() -> None:
    """The refusals are of the combinations, not of their parts."""
    for kind, has_release, has_fine in (
        ("pfdm", True, True), ("alone", False, True), ("centralised", False, False),
        ("fedavg", False, False), ("dp_sgd", False, False),
    ):  # fmt: skip
        config = baseline(kind, sampling={"coarse_worth": 5.0})
        assert (config.kind.releases, config.kind.has_fine_model) == (has_release, has_fine)
        assert config_to_yaml(config)
    baseline("alone", coarse={**KINDS["alone"], "objective": "noise_to_noise"},
             sampling={"coarse_worth": 5.0})  # fmt: skip
    with pytest.raises(ConfigError, match="coarse_worth"):
        baseline("pfdm", coarse={"objective": "noise_to_noise"}, sampling={"coarse_worth": 5.0})


# --- Messages -------------------------------------------------------------------------------


def raw_update(client_id: int, basis: str) -> CoarseUpdate:
    return CoarseUpdate(
        weights=tensors(drift(client_id)), num_examples=10, client_id=client_id, round=1,
        seeded=False, basis=basis,
    )  # fmt: skip


@pytest.mark.parametrize("basis", ["raw", "dp_sgd", "anything"])
def test_weights_of_raw_images_are_not_encoded_outside_simulation(basis: str) -> None:
    for simulation in ({}, {"simulation": False}):
        with pytest.raises(
            wire.WireError,
            match=f"^an update from {basis} images may not leave outside simulation$",
        ):
            wire.encode_update(raw_update(0, basis), **simulation)
    assert wire.encode_update(raw_update(0, "released"))
    message = wire.encode_update(raw_update(0, basis), simulation=True)
    options: Any = {"like": tensors(START), "round": 1, "who": "client 0"}
    assert wire.decode_update(message, basis=basis, **options).basis == basis
    with pytest.raises(
        wire.WireError,
        match=f"^update of client 0: made from {basis} images, expected released$",
    ):
        wire.decode_update(message, **options)


@pytest.mark.parametrize(
    ("expected", "sent"), [("released", "raw"), ("released", "dp_sgd"), ("dp_sgd", "raw")]
)
def test_the_server_takes_no_update_of_another_basis(
    tmp_path: Path, expected: str, sent: str
) -> None:
    """One client of two has trained on other images than the run says; the rest is as it should."""

    def answer(client_id: int, basis: str) -> Any:
        message = wire.encode_update(raw_update(client_id, basis), simulation=True)
        return fit_result(message, 10, {"client_id": client_id, "coarse_loss": 0.5})

    server = fedavg_server(tmp_path / "run", clients=(0, 1), basis=expected, simulation=True)
    server.ask(1)
    line = f"client 1: update of client 1: made from {sent} images, expected {expected}"
    with pytest.raises(ClientFailure, match=re.escape(line)):
        server.take(1, {0: answer(0, expected), 1: answer(1, sent)})
    for name, tensor in arrays(server.strategy.weights).items():
        assert (tensor == START[name]).all()
    good = fedavg_server(tmp_path / "good", clients=(0, 1), basis=expected, simulation=True)
    moved = good.round(1, {k: answer(k, expected) for k in (0, 1)})
    assert any((moved[name] != START[name]).any() for name in START)


# --- Exports --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    refuser = Refuser(tmp_path, capsys, monkeypatch)
    run = RunDirectory(tmp_path / "run")
    run.open(baseline(kind), resume=False)
    write_tensors(run.root / "coarse.safetensors", {"w": torch.ones(2)})
    run.write_json("privacy.json", baseline_statement(baseline(kind)))
    words = "this run is a baseline, without a coarse and a fine model"
    with pytest.raises(ValueError, match=words) as caught:
        export_pipeline(run, client_id=0, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert words in refuser.line("export", run.root, "--client", 0, "--out", tmp_path / "out")
