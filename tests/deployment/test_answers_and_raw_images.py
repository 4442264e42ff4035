"""What a deployed client answers is a function of its release, its config and clocks.

The same messages go to two clients with the same release but other raw images, and again to one
whose fine model is worthless, raises whenever it is used, or cannot be written. Everything that
they send, success or failure, is the same byte for byte but for `wire.CLOCKS`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import samples
from clients.local import LocalClient, open_local_client
from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.diffusion.training import Trainer
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError
from tests.support.deployments import Federation, deployment, with_releases_of
from tests.support.federations import initial_message

MODES = ("federated", "server")
PHASE = {"federated": "coarse", "server": "release"}


def local_of(federation: Federation) -> LocalClient:
    return open_local_client(dict(federation.nodes[0]), federation.run_config, 0)


def chosen_weights(federation: Federation, *, bias: float) -> wire.Message:
    """An attacker's: all zero but the last bias, so that `bias` is all that the model says."""
    first = wire.decode_model(initial_message(run_config_of(federation.run_config)))
    name = next(name for name in first if name.endswith("conv_out.bias"))
    zeros = {key: torch.zeros_like(value) for key, value in first.items()}
    return wire.encode_model({**zeros, name: torch.full_like(first[name], bias)})


def probes(federation: Federation, training: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(kind, config, weights) of honest and hostile messages; None for the first weights."""
    phase = PHASE[training]
    biases = {bias: chosen_weights(federation, bias=bias) for bias in (1e6, 1.05221e20, 3e38)}
    yield "get_properties", {}, None
    yield "evaluate", {"round": 1, "final": True}, None  # before any training
    yield "train", {"round": 1, "phase": phase}, None
    yield "evaluate", {"round": 1, "final": False}, None
    for weights in (None, *biases.values()):
        yield "evaluate", {"round": 1, "final": True}, weights
    yield "train", {"round": 1, "phase": phase}, None  # a replay
    yield "train", {"round": 2, "phase": phase}, biases[1e6]
    yield "train", {"round": 3, "phase": phase}, biases[3e38]
    yield "train", {"round": 3, "phase": "fine"}, None
    yield "train", {"round": 4, "phase": "nonsense"}, None
    yield "evaluate", {"round": 3, "final": True}, None
    yield "get_properties", {}, None


def answers(federation: Federation, training: str) -> list[bytes]:
    for kind, config, weights in probes(federation, training):
        federation.ask(0, kind, config, weights=weights)
    return [sent.timeless() for sent in federation.sent]


class Mine:
    """In place of a trainer of the fine model: whatever is asked of it fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} of patient-100-000-Jansson.png")


def raise_on_use(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalTraining.borrowed

    @contextmanager
    def borrowed(self: LocalTraining, role: str, **options: Any) -> Iterator[Any]:
        if role == "fine":
            yield Mine()
            return
        with real(self, role, **options) as trainer:
            yield trainer

    monkeypatch.setattr(LocalTraining, "borrowed", borrowed)


def nan_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ClientStore.load_state

    def load_state(self: ClientStore, round: int, name: str) -> dict[str, torch.Tensor]:
        state = real(self, round, name)
        if name != "fine":
            return state
        return {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v
                for k, v in state.items()}  # fmt: skip

    monkeypatch.setattr(ClientStore, "load_state", load_state)


def nan_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine training diverges in its second chunk, after a checkpoint."""
    real = Trainer.train

    def train(self: Trainer[Any], *arguments: Any, what: str, **options: Any) -> Any:
        if what.endswith("fine"):
            raise FloatingPointError(f"{what}: loss is nan at step 2")
        return real(self, *arguments, what=what, **options)

    monkeypatch.setattr(Trainer, "train", train)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for what is the client's own: fine model, checkpoints, pictures, notes."""
    real = ClientStore.draft_state

    def draft_state(
        self: ClientStore, round: int, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        if name == "fine":
            raise StoreError(f"{self.root}: cannot be written: no space left on the device")
        real(self, round, name, tensors)

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("cannot be written: no space left on the device")

    monkeypatch.setattr(ClientStore, "draft_state", draft_state)
    for name in ("save_partial", "save_samples", "save_class_counts", "note_failure"):
        monkeypatch.setattr(ClientStore, name, full)


def broken_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "patient-100-000-Jansson.png")

    monkeypatch.setattr(samples, "coarse_share", fail)


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "raises on every use": raise_on_use,
    "NaN weights": nan_weights,
    "NaN in training": nan_training,
    "full disk": full_disk,
    "broken sampler": broken_sampler,
}


@pytest.mark.slow
@pytest.mark.parametrize("training", MODES)
def test_every_answer_is_a_function_of_the_release(
    tmp_path: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"coarse": {"training": training}}
    (tmp_path / "first").mkdir()
    first = deployment(tmp_path / "first", **sections)
    first.ask(0, "train", {"round": 1, "phase": PHASE[training]})
    first.ask(1, "train", {"round": 1, "phase": PHASE[training]})
    places = {name: tmp_path / name.replace(" ", "-") for name in ("other images", *FAULTS)}
    others = {name: with_releases_of(first, place, **sections) for name, place in places.items()}
    again = with_releases_of(first, tmp_path / "again", **sections)
    expected = answers(again, training)
    assert again.of("train")[0].payload
    assert any("error" in sent.metrics for sent in again.sent)  # of hostile messages
    assert local_of(again).store.load_samples() is not None
    for name, federation in others.items():
        with monkeypatch.context() as planted:
            FAULTS.get(name, lambda _: None)(planted)
            got = answers(federation, training)
        for number, (one, other) in enumerate(zip(expected, got, strict=True)):
            assert one == other, (name, number, federation.sent[number].reply)
    noted = local_of(others["raises on every use"]).store.root / "failures.txt"
    assert "patient-100-000-Jansson.png" in noted.read_text()


@pytest.mark.slow
def test_a_round_whose_fine_training_failed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last fine model is kept, and the next round goes on from it."""
    federation = deployment(tmp_path)
    store = local_of(federation).store
    federation.ask(0, "train", {"round": 1, "phase": "coarse"})
    kept = store.load_state(1, "fine")
    with monkeypatch.context() as planted:
        nan_training(planted)
        federation.ask(0, "train", {"round": 2, "phase": "coarse"})
    assert store.last_round() == 2
    after = store.load_state(2, "fine")
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)
    federation.ask(0, "train", {"round": 3, "phase": "coarse"})
    moved = store.load_state(3, "fine")
    assert any(not torch.equal(moved[name], kept[name]) for name in kept)
    assert "loss is nan" in (store.root / "failures.txt").read_text()


PLANTED = {
    "the mean brightness in seconds": lambda local: float(local.held.images.images.mean()),
    "more digits than a clock has": lambda _: 10**12 + 123456789,
    "a yes or no": lambda _: True,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTED)
def test_a_clock_carries_no_numbers(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = deployment(tmp_path)
    local = local_of(federation)
    monkeypatch.setattr(LocalTraining, "clock", lambda *_: PLANTED[what](local))
    sent = federation.ask(0, "train", {"round": 1, "phase": "coarse"})
    assert sent.payload == []
    assert "must be whole seconds from 0 to 10000000" in sent.metrics["error"]


def test_clocks_of_a_deployed_client_are_whole_seconds(tmp_path: Path) -> None:
    sent = deployment(tmp_path).ask(0, "train", {"round": 1, "phase": "coarse"})
    assert {type(sent.metrics[name]) for name in wire.CLOCKS} == {int}
    assert all(1 <= sent.metrics[name] < 600 for name in wire.CLOCKS)
    compared = wire.FIT_METRICS.keys() - set(wire.CLOCKS)
    assert {"coarse_loss", "fine_images", "coarse_images", "num_released"} <= compared


def test_no_weights_beyond_a_networks(tmp_path: Path) -> None:
    """Weights at which arithmetic overflows are refused as a message, before anything is read."""
    federation = deployment(tmp_path)
    for bias, reason in (
        (1.05221e20, "conv_out.bias has values beyond 1e+06"),
        (float("inf"), "conv_out.bias has values that are not finite"),
        (float("nan"), "conv_out.bias has values that are not finite"),
    ):
        weights = chosen_weights(federation, bias=bias)
        for kind, config in (
            ("train", {"round": 1, "phase": "coarse"}),
            ("evaluate", {"round": 1, "final": True}),
        ):
            sent = federation.ask(0, kind, config, weights=weights)
            assert sent.metrics["error"].startswith("coarse model from the server: ")
            assert sent.metrics["error"].endswith(reason)
            assert np.sum([array.size for array in sent.payload]) == 0
