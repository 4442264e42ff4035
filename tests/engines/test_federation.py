"""A whole federation in this process, with the real clients and strategies."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fedpdm import wire
from fedpdm.config import RunConfig, config_to_yaml
from fedpdm.diffusion.training import Trainer, class_weights
from fedpdm.engines import inprocess
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.mechanism import select
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import build_denoiser, build_optimizer_settings
from fedpdm.setup.losses import coarse_batch_loss
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_tensors
from strategies.roster import ClientFailure
from tests.support.apart import run_apart, start_apart, wait_until
from tests.support.federations import client_of, initial_message, small_config


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "coarse.safetensors")[0]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = final_weights(a), final_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def release_digests(out: Path) -> dict[str, str]:
    """The file of each client that has made one release, by client."""
    paths = sorted((out / "clients").glob("*/releases/*.safetensors"))
    assert {path.name for path in paths} <= {"000001.safetensors"}
    digests = {path.parts[-3]: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(digests) == len(paths)
    return digests


@pytest.fixture(scope="module")
def finished(small_run: Path) -> tuple[RunConfig, Path]:
    """One small run, start to end."""
    return small_config(), small_run


@pytest.mark.slow
def test_run_leaves_everything_behind(finished: tuple[RunConfig, Path]) -> None:
    _, out = finished
    for name in (
        "config.yaml", "metrics.json", "privacy.json", "samples.png", "partition.png",
        "coarse.safetensors", "log.txt",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    metrics = json.loads((out / "metrics.json").read_text())
    assert [record["round"] for record in metrics["rounds"]] == [1, 2]
    assert [c["client_id"] for c in metrics["final"]["clients"]] == [0, 1, 2]
    assert all(record["coarse_known"] < 1 for record in metrics["rounds"])
    assert metrics["final"]["heldout_coarse_known"] < 1
    privacy = json.loads((out / "privacy.json").read_text())
    assert privacy["t0"] == 642
    assert privacy["epsilon"] == pytest.approx(9.956, abs=5e-4)
    assert "seeded" in privacy["noise_source"]
    assert yaml.safe_load((out / "config.yaml").read_text())["privacy"]["epsilon"] == 10.0


@pytest.mark.slow
def test_seed_repeats_and_another_seed_differs(
    finished: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    _, out = finished
    unjudged = {"image_metrics": False}  # of which the weights know nothing
    run_in_process(small_config(evaluation=unjudged), tmp_path / "again")
    assert_same_weights(out, tmp_path / "again")
    assert release_digests(out) == release_digests(tmp_path / "again")
    run_in_process(small_config(run={"seed": 4}, evaluation=unjudged), tmp_path / "other")
    assert release_digests(out) != release_digests(tmp_path / "other")
    name = next(iter(final_weights(out)))
    assert not torch.equal(final_weights(out)[name], final_weights(tmp_path / "other")[name])


@pytest.mark.slow
def test_federated_run_improves_the_coarse_loss(tmp_path: Path) -> None:
    config = small_config(
        run={"rounds": 4},
        data={"max_images": None},
        coarse={"steps_per_round": 15, "batch_size": 64, "lr": 1e-3, "class_balance": 0.0},
        fine={"steps_per_round": 1},
        evaluation={"image_metrics": False},
    )
    run_in_process(config, tmp_path / "run")
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]
    untrained = 0.0
    for client in range(3):
        loss, count, metrics = client_of(config, tmp_path / "fresh", client).evaluate(
            initial_message(config), {"round": 0, "final": False}
        )
        assert "error" not in metrics
        untrained += loss * count
    untrained /= sum(c["num_heldout"] for c in final["clients"])
    # Knowing each image exactly would gain C^2 / (192 sigma^2), about 0.005.
    assert final["heldout_coarse_loss"] < untrained - 5e-4


@pytest.mark.slow
def test_one_client_federated_equals_centralised(tmp_path: Path) -> None:
    config = small_config(
        partition={"kind": "iid", "num_clients": 1},
        run={"rounds": 3},
        fine={"steps_per_round": 0},
        aggregation={"ema_decay": 0.0},
        evaluation={"image_metrics": False},
    )
    run_in_process(config, tmp_path / "run")
    setup = set_up(config)
    client = client_of(config, tmp_path / "run", 0)
    digests = release_digests(tmp_path / "run")
    train = select(client.work.release(), torch.from_numpy(client.local.held.train))
    assert release_digests(tmp_path / "run") == digests  # read back, not made
    model = build_denoiser(setup, "coarse")
    cpu = torch.device("cpu")
    trainer = Trainer(model, build_optimizer_settings(config, "coarse"), device=cpu)
    loss = coarse_batch_loss(setup, model, train, training=True, device=cpu)
    for round in (1, 2, 3):  # one uninterrupted model and optimiser
        trainer.train(
            loss,
            sample_weights=class_weights(train.labels, balance=config.coarse.class_balance),
            num_steps=config.coarse.steps_per_round,
            generator=torch_generator(3, Purpose.COARSE_TRAINING, client=0, round=round),
        )
    for name, value in final_weights(tmp_path / "run").items():
        torch.testing.assert_close(value, trainer.weights()[name], rtol=0, atol=1e-6)


def test_replayed_round_is_answered_from_the_store(tmp_path: Path) -> None:
    config = small_config()
    message, request = initial_message(config), {"round": 1, "phase": "coarse"}
    first = client_of(config, tmp_path, 0).fit(message, dict(request))
    state = ClientStore(tmp_path / "clients" / "0").load_state(1, "fine")["step"]
    second = client_of(config, tmp_path, 0).fit(message, dict(request))
    assert wire.fingerprint(first[0]) == wire.fingerprint(second[0])
    assert second[2]["replayed"] is True
    assert "replayed" not in first[2]
    assert ClientStore(tmp_path / "clients" / "0").load_state(1, "fine")["step"] == state == 4


def test_replay_with_other_weights_is_refused(tmp_path: Path) -> None:
    config = small_config()
    client_of(config, tmp_path, 1).fit(initial_message(config), {"round": 1, "phase": "coarse"})
    other = initial_message(small_config(run={"seed": 9}))
    payload, count, metrics = client_of(config, tmp_path, 1).fit(
        other, {"round": 1, "phase": "coarse"}
    )
    assert (payload, count) == ([], 0)
    assert "other coarse weights" in str(metrics["error"])


@pytest.mark.slow
def test_changed_release_settings_are_refused(tmp_path: Path) -> None:
    message = initial_message(small_config())
    client_of(small_config(), tmp_path, 0).fit(message, {"round": 1, "phase": "coarse"})
    before = release_digests(tmp_path)
    shutil.rmtree(tmp_path / "clients" / "0" / "rounds")  # of another config: refused by themselves
    changed = small_config(privacy={"clip_norm": 7.0})
    _, _, metrics = client_of(changed, tmp_path, 0).fit(message, {"round": 2, "phase": "coarse"})
    assert re.search(
        r"clip_norm = 8\.0 \(now 7\.0\), .* releasing them again is a new release", metrics["error"]
    )
    assert len(before) == 1
    assert release_digests(tmp_path) == before


@pytest.mark.slow
def test_crash_between_rounds_then_resume(
    finished: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reference = finished
    config = small_config(evaluation={"image_metrics": False})
    real, calls = inprocess._LocalProxy.fit, []

    def crash(self: object, *args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 5:  # second client of the second round
            raise ConnectionError("the client is gone")
        return real(self, *args, **named)  # type: ignore[arg-type]

    out = tmp_path / "run"
    monkeypatch.setattr(inprocess._LocalProxy, "fit", crash)
    with pytest.raises(ClientFailure, match="the client is gone"):
        run_in_process(config, out)
    monkeypatch.undo()
    assert not (out / "coarse.safetensors").exists()
    released = release_digests(out)
    run_in_process(config, out, resume=True)
    assert_same_weights(reference, out)
    assert release_digests(out) == released


@pytest.mark.slow
def test_kill_in_the_middle_of_a_round_then_resume(tmp_path: Path) -> None:
    config = small_config(
        partition={"num_clients": 2},
        fine={"steps_per_round": 60, "checkpoint_every": 5},
        evaluation={"image_metrics": False},
    )
    run_in_process(config, tmp_path / "reference")
    experiment = tmp_path / "small.yaml"
    experiment.write_text(config_to_yaml(config))
    out = tmp_path / "run"
    command = ("run", experiment, "--engine", "inprocess", "--out", out)
    process = start_apart(*command)
    partial = out / "clients" / "1" / "partial" / "fine.safetensors"
    wait_until(partial.exists, process)
    process.interrupt(signal.SIGKILL)
    process.end()
    assert partial.exists(), "the kill was meant to hit a client in the middle of its round"
    released = release_digests(out)
    assert released.keys() >= {"0", "1"}
    done = run_apart(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "reference", out)
    after = release_digests(out)
    assert {client: after[client] for client in released} == released
    assert after == release_digests(tmp_path / "reference")


@pytest.mark.slow
def test_ctrl_c_ends_the_in_process_engine_at_once(tmp_path: Path) -> None:
    experiment, out = tmp_path / "small.yaml", tmp_path / "run"
    experiment.write_text(
        config_to_yaml(small_config(fine={"steps_per_round": 100_000, "checkpoint_every": 5}))
    )
    process = start_apart("run", experiment, "--engine", "inprocess", "--out", out)
    wait_until(lambda: list(out.glob("clients/*/partial/*")), process)
    process.interrupt()
    assert process.end() == 130
    assert "--resume continues the run" in "\n".join(process.errors)


@pytest.mark.slow
def test_server_training_uploads_once(tmp_path: Path) -> None:
    config = small_config(
        coarse={"training": "server"}, run={"rounds": 3}, evaluation={"image_metrics": False}
    )
    run_in_process(config, tmp_path / "run")
    rounds = json.loads((tmp_path / "run" / "metrics.json").read_text())["rounds"]
    uploads = [record["bytes_up"] for record in rounds]
    assert uploads[0] > 200 * 192 * 4 * 0.8
    assert uploads[1:] == [0, 0]
    assert [record["server_steps"] for record in rounds] == [9, 9, 9]


@pytest.mark.slow
def test_noise_to_noise_and_fine_below_t0(tmp_path: Path) -> None:
    config = small_config(
        coarse={"objective": "noise_to_noise"}, fine={"t_range": "below_t0"}, run={"rounds": 1}
    )
    run_in_process(config, tmp_path / "run")
    client = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]["clients"][0]
    assert "majority_pfdm_frechet" in client
    assert "majority_alone_frechet" not in client  # not trained above t0: there is no such model


def damage(out: Path, client: int) -> None:
    path = out / "clients" / str(client) / "releases" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.slow
def test_failed_client_stops_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(fine={"lr": 1e30, "grad_clip": 1e30, "steps_per_round": 40})
    with pytest.raises(ClientFailure, match=r"client \d round 1 fine: loss is nan at step \d+"):
        run_in_process(config, tmp_path / "run")
    assert "client 0" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_client_is_left_out_where_config_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(aggregation={"on_failure": "skip"}, evaluation={"image_metrics": False})
    real = inprocess._LocalProxy.fit

    def fit(self: inprocess._LocalProxy, *args: object, **named: object) -> object:
        store = tmp_path / "run" / "clients" / "1" / "rounds"
        if store.exists() and self._context.node_config["partition-id"] == 1:
            damage(tmp_path / "run", 1)
        return real(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(inprocess._LocalProxy, "fit", fit)
    run_in_process(config, tmp_path / "run")
    rounds = json.loads((tmp_path / "run" / "metrics.json").read_text())["rounds"]
    assert [len(record["clients"]) for record in rounds] == [3, 2]
    assert "client 1" in rounds[1]["failed"][0]
    assert "000001.safetensors: is not the file that the ledger" in rounds[1]["failed"][0]
    privacy = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert privacy["ledger_heads"].keys() == {"0", "2"}
    (line,) = privacy["unreadable_stores"]
    assert f"{line}\n" in (tmp_path / "run" / "privacy.txt").read_text()
    assert "clients/1/releases/000001.safetensors: is not the file" in line
