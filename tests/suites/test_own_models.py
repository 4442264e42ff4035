"""Own models that all methods share: the very ones of a run, kept, resumed, stopped early."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.training import LocalTraining
from fedpdm.engines.inprocess import run_in_process
from fedpdm.setup.pair import client_weights
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.suites.own_models import heldout_loss, own_config, own_models
from fedpdm.suites.shared_own import shared_config
from tests.support.federations import small_config

CONFIG = small_config(
    run={"rounds": 2},
    data={"max_images": 600, "holdout_fraction": 0.2},
    coarse={"training": "server"},
    fine={"clipped_fraction": 0.0},
    evaluation={"image_metrics": False},
)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_they_are_those_of_a_run_bit_for_bit(tmp_path: Path) -> None:
    run_in_process(CONFIG, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    stages = own_models(CONFIG, 1, kept=tmp_path / "kept")
    store = ClientStore(run.client_path(1), store_label(CONFIG, 1))
    assert len(stages) == 2
    assert equal(stages[-1], client_weights(store))
    assert not equal(stages[0], stages[-1])


@pytest.mark.slow
def test_a_draw_of_the_noise_changes_nothing_but_the_release(tmp_path: Path) -> None:
    """A whole run with another draw: same images, same own models, another shared model."""
    privacy = dataclasses.replace(CONFIG.privacy, noise_draw=1)
    drawn = dataclasses.replace(CONFIG, privacy=privacy)
    assert own_config(drawn) == own_config(CONFIG)
    for name, config in (("first", CONFIG), ("second", drawn)):
        run_in_process(config, tmp_path / name)
    first, second = (RunDirectory(tmp_path / name) for name in ("first", "second"))
    for client in range(CONFIG.partition.num_clients):
        own = [
            client_weights(ClientStore(run.client_path(client), store_label(config, client)))
            for run, config in ((first, CONFIG), (second, drawn))
        ]
        assert equal(*own)
    assert first.read_json("partition.json") == second.read_json("partition.json")
    assert not equal(first.load_shared(), second.load_shared())
    spent = [run.read_json("privacy.json")["epsilon"] for run in (first, second)]
    assert spent[0] == spent[1]


def test_one_model_serves_methods_that_differ_above_it(tmp_path: Path) -> None:
    other = small_config(
        run={"rounds": 2},
        data={"max_images": 600, "holdout_fraction": 0.2},
        coarse={"training": "federated"},
        privacy={"epsilon": 1.0, "clip_norm": 3.0},
        fine={"clipped_fraction": 0.0, "t_range": "below_t0"},
        sampling={"guidance": 2.0},
    )
    assert own_config(CONFIG) == own_config(other)
    more = dataclasses.replace(CONFIG, fine=dataclasses.replace(CONFIG.fine, augment="affine"))
    seed = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, seed=4))
    assert len({own_config(each) for each in (CONFIG, more, seed)}) == 3
    clipped = [
        dataclasses.replace(
            CONFIG,
            fine=dataclasses.replace(CONFIG.fine, clipped_fraction=0.1),
            privacy=dataclasses.replace(CONFIG.privacy, clip_norm=norm),
        )
        for norm in (4.0, 8.0)
    ]
    assert own_config(clipped[0]) != own_config(clipped[1])  # clipped images are in the training


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_a_finished_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = own_models(CONFIG, 0, kept=tmp_path / "whole")
    real, calls = LocalTraining.train_fine, []

    def stopped(self: LocalTraining, round: int) -> dict[str, Any]:
        calls.append(round)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, round)

    monkeypatch.setattr(LocalTraining, "train_fine", stopped)
    with pytest.raises(KeyboardInterrupt):
        own_models(CONFIG, 0, kept=tmp_path / "kept")
    again = own_models(CONFIG, 0, kept=tmp_path / "kept")
    assert calls == [1, 2, 2]
    assert all(equal(a, b) for a, b in zip(again, whole, strict=True))
    own_models(CONFIG, 0, kept=tmp_path / "kept")
    assert calls == [1, 2, 2]
    assert not list((tmp_path / "kept").glob("*/run"))


def test_a_failure_has_the_clients_line(tmp_path: Path) -> None:
    diverging = dataclasses.replace(
        CONFIG, fine=dataclasses.replace(CONFIG.fine, lr=1e30, grad_clip=1e30)
    )
    with pytest.raises(RuntimeError, match=r"client 0: .*loss"):
        own_models(diverging, 0, kept=tmp_path)


@pytest.mark.slow
def test_heldout_loss_weighs_classes_equally_and_repeats(tmp_path: Path) -> None:
    (_, last) = own_models(CONFIG, 0, kept=tmp_path)
    value = heldout_loss(CONFIG, 0, last)
    assert value == heldout_loss(CONFIG, 0, last)
    noisy = {name: tensor + torch.randn_like(tensor) for name, tensor in last.items()}
    assert heldout_loss(CONFIG, 0, noisy) > value


def test_the_shared_run_trains_no_own_model_and_is_the_same_otherwise() -> None:
    shared = shared_config(CONFIG)
    assert shared.fine.steps_per_round == 0
    assert (shared.coarse, shared.privacy, shared.partition, shared.run) == (
        CONFIG.coarse, CONFIG.privacy, CONFIG.partition, CONFIG.run
    )  # fmt: skip
    sums = small_config(run={"rounds": 3}, coarse={"training": "server"},
                        privacy={"release": "statistics"}, sampling={"handover": 77})  # fmt: skip
    assert shared_config(sums).sampling.handover == 77
