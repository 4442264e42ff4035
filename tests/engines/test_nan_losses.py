"""A loss that is not a number: the run stops, says where, keeps the last good state, goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.training
from fedpdm.config import config_to_yaml
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import CONFIG, call, forget_surroundings, in_process, without_advice
from tests.support.federations import small_config

TWO_ROUNDS = small_config(
    run={"rounds": 2},
    data={"max_images": 120},
    partition={"num_clients": 2},
    sampling={"num_steps": 2},
    evaluation={"image_metrics": False},
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch, tmp_path)
    return tmp_path


def write(folder: Path, config: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(config_to_yaml(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (
            ("fine.lr=1e30", "fine.grad_clip=1e30", "fine.steps_per_round=40"),
            "fine",
        ),
        (("coarse.lr=1e30", "coarse.steps_per_round=40"), "coarse"),
    ],
)
def test_divergence_names_client_round_model_and_step(
    folder: Path, settings: tuple[str, ...], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    assert in_process(write(folder, CONFIG), "--out", folder / "out", *sets) == 1
    last = without_advice(capsys.readouterr().err).splitlines()[-1]
    what = rf"round 1 {model}: (loss|gradient) is (nan|inf) at step \d+"
    failed = [f"client {client}: client {client} {what}" for client in range(2)]
    assert re.fullmatch(f"fedpdm: round 1 fit: {'; '.join(failed)}", last), last
    checkpoint = RunDirectory(folder / "out").load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[0] == 0  # the weights that the run began with
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint[1].values())


def fail_in_round_2(real: Callable[..., Any]) -> Callable[..., Any]:
    """`fine_batch_loss` of a machine that computes nonsense at one step: the third of round 2.

    Of the 4 steps per round with a checkpoint after 2, that is the first after the checkpoint.
    """
    steps = 0

    def build(*arguments: Any, **options: Any) -> Any:
        loss = real(*arguments, **options)

        def broken(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            nonlocal steps
            steps += 1
            value: torch.Tensor = loss(indices, generator)
            # Two clients take 4 steps each in round 1; client 0 comes first in round 2.
            return value * float("nan") if steps == 2 * 4 + 3 else value

        return broken

    return build


@pytest.mark.slow
def test_last_good_state_is_kept_and_the_run_resumes_from_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, out, undisturbed = write(folder, TWO_ROUNDS), folder / "out", folder / "good"
    assert in_process(experiment, "--out", undisturbed) == 0
    with monkeypatch.context() as patch:
        real = clients.training.fine_batch_loss
        patch.setattr(clients.training, "fine_batch_loss", fail_in_round_2(real))
        assert in_process(experiment, "--out", out) == 1
    last = without_advice(capsys.readouterr().err).splitlines()[-1]
    assert last == "fedpdm: round 2 fit: client 0: client 0 round 2 fine: loss is nan at step 7"

    checkpoint = RunDirectory(out).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[0] == 1
    for tensors in (
        checkpoint[1],
        *(ClientStore(out / "clients" / str(c)).load_state(1, "fine") or {} for c in range(2)),
    ):
        assert tensors
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert ClientStore(out / "clients" / "0").last_round() == 1
    partial = ClientStore(out / "clients" / "0").load_partial(2)
    assert partial is not None
    assert partial[0] == 1  # the two good steps of round 2
    assert call("show", out) == 2

    assert in_process("--resume", "--out", out) == 0
    assert "resumed after round 1 of 2" in capsys.readouterr().out
    ours, theirs = (read_tensors(root / "coarse.safetensors")[0] for root in (out, undisturbed))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for client in range(2):
        ours, theirs = (
            ClientStore(root / "clients" / str(client)).load_state(2, "fine")
            for root in (out, undisturbed)
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
