"""Secure aggregation with clients that fail or lie, and coordinators that ask for too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.setup.flower_config import run_config_of
from fedpdm.wire.summands import levels
from strategies.roster import ClientFailure
from tests.support.federations import initial_message
from tests.support.secure_federations import (
    MOST,
    SecureFederation,
    coarse_weights,
    farthest,
    record,
    run,
    secure_federation,
)

CONFIGS = "secaggplus_configs"


# --- Clients that fail, or lie --------------------------------------------------------------


def fail_in_training(monkeypatch: pytest.MonkeyPatch, *clients: int) -> None:
    train = LocalTraining.train_coarse

    def maybe(self: LocalTraining, *given: Any) -> Any:
        if self.local.client_id in clients:
            raise OSError("no space left")
        return train(self, *given)

    monkeypatch.setattr(LocalTraining, "train_coarse", maybe)


@pytest.mark.slow
def test_the_others_go_on_without_a_client_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_training(monkeypatch, 2)
    options: dict[str, Any] = {"on_failure": "skip", "max_examples": 100}
    got = run(tmp_path / "secure", 4, secure=True, **options)
    wanted = run(tmp_path / "plain", 4, **options)
    assert farthest(got, wanted) <= 2e-6
    assert record(tmp_path / "secure")["failed"] == ["client 2: no space left"]
    with pytest.raises(ClientFailure, match="round 1 fit: client 2: no space left"):
        run(tmp_path / "strict", 4, secure=True, max_examples=100)
    assert farthest(coarse_weights(tmp_path / "strict"), wanted) > 1e-4  # as it began


@pytest.mark.slow
def test_too_few_clients_give_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_training(monkeypatch, 0, 2)
    with pytest.raises(ClientFailure, match="client 0: no space left; client 2: no space left"):
        run(tmp_path / "run", 4, secure=True, max_examples=100, on_failure="skip")
    assert not (tmp_path / "run" / "metrics.json").exists()


def masked(reply: Message) -> Any:
    record = reply.content.config_records.get(CONFIGS) if reply.has_content() else None
    return record if record is not None and "masked_params" in record else None


def with_arrays(change: Callable[[list[np.ndarray]], Any]) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        record = masked(reply)
        arrays = change([bytes_to_ndarray(part) for part in record["masked_params"]])
        record["masked_params"] = [ndarray_to_bytes(array) for array in arrays]

    return spoil


def noise(arrays: list[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**32, a.shape) for a in arrays]


def claims_more(reply: Message) -> None:
    reply.content.metric_records["fitres.num_examples"]["num_examples"] = 72


def no_record(reply: Message) -> None:
    del reply.content.config_records[CONFIGS]


# What client 1 sends for its masked update -> words of the refusal.
LIES: dict[str, tuple[Callable[[Message], None], str]] = {
    "noise": (with_arrays(noise), "masks of the clients' updates do not cancel"),
    "zeros": (with_arrays(lambda a: [0 * x for x in a]), "do not cancel"),
    "more images": (claims_more, "do not cancel"),
    "too many images": (
        lambda r: r.content.metric_records["fitres.num_examples"].update(num_examples=10**6),
        "client 1: num_examples must be at most aggregation.max_examples = 100",
    ),
    "fewer arrays": (with_arrays(lambda a: a[:-1]), "client 1: sent .* masked arrays, expected"),
    "shape": (with_arrays(lambda a: [x.ravel() for x in a]), "client 1: sent a masked array of i"),
    "dtype": (with_arrays(lambda a: [x.astype(np.float64) for x in a]), "client 1: .* float64"),
    "size": (with_arrays(lambda a: [np.zeros(10**6), *a[1:]]), "client 1: .* of 8000128 bytes"),
    "no record": (no_record, "client 1: sent no answer to stage collect_masked_vectors"),
    "no arrays": (
        lambda r: masked(r).update(masked_params=[b"x"] * len(masked(r)["masked_params"])),
        "client 1: sent a masked array that is none",
    ),
    "numbers": (lambda r: masked(r).update(masked_params=[1, 2]), "client 1: sent no list of byt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_a_sum_is_found(tmp_path: Path, lie: str) -> None:
    spoil, words = LIES[lie]
    federation = secure_federation(tmp_path)

    def tamper(asked: Message, reply: Message) -> Message:
        if reply.metadata.src_node_id == 2 and masked(reply) is not None:
            spoil(reply)
        return reply

    federation.tamper = tamper
    with pytest.raises((ClientFailure, wire.WireError), match=words) as caught:
        federation.run()
    assert "\n" not in str(caught.value)
    start = wire.decode_model(initial_message(run_config_of(federation.run_config)))
    assert farthest(
        coarse_weights(tmp_path / "server"), {f"weights.{n}": t for n, t in start.items()}
    ) == 0.0  # fmt: skip


# --- Coordinators that lie ------------------------------------------------------------------


def ask(federation: SecureFederation, client: int, **record: Any) -> Message:
    """What a client answers to one stage of the protocol."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
    content = RecordDict({CONFIGS: ConfigRecord(record)}) if record else RecordDict()
    message = Message(content, dst_node_id=client + 1, message_type="train")
    (reply,) = federation.send_and_receive([message])
    return reply


SETUP: dict[str, Any] = {
    "stage": "setup", "sample_num": 3, "share_num": 3, "threshold": 2, "clipping_range": 1.0,
    "target_range": levels(3), "mod_range": 2**32, "max_weight": float(MOST),
}  # fmt: skip


def line_of(reply: Message) -> str:
    assert reply.has_error()
    reason = str(reply.error.reason)
    assert "\n" not in reason
    assert len(reason) < 500
    return reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sample_num": 1, "share_num": 1, "threshold": 1},
        {"sample_num": 2, "share_num": 2},
        {"sample_num": 3.0},
        {"threshold": 1},
        {"threshold": 0},
        {"share_num": 1},
        {"clipping_range": 1e9},
        {"mod_range": 2**20},
        {"target_range": 2},
        {"max_weight": 1.0},
        {"stage": "unmask"},
        {"stage": "collect_masked_vectors"},
        {"stage": "peek"},
    ],
    ids=str,
)
def test_a_round_that_would_show_an_update_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    federation = secure_federation(tmp_path)
    assert not ask(federation, 1, **SETUP).has_error()
    federation = secure_federation(tmp_path)
    line_of(ask(federation, 0, **{**SETUP, **changes}))
    assert not Path(federation.nodes[0]["store-dir"]).exists()


def test_a_plain_request_in_a_secure_run_is_refused(tmp_path: Path) -> None:
    federation = secure_federation(tmp_path)
    sent = federation.ask(0, "train", {"round": 1, "phase": "coarse"})
    assert "the server asks for a plain update (client 0 refuses)" in line_of(sent.reply)
    assert not Path(federation.nodes[0]["store-dir"]).exists()


def test_keys_of_a_made_up_pair_are_refused(tmp_path: Path) -> None:
    federation = secure_federation(tmp_path)
    own = ask(federation, 0, **SETUP).content.config_records[CONFIGS]
    pair = {"1": [own["pk1"], own["pk2"]], "2": [b"x", b"y"]}
    line = line_of(ask(federation, 0, stage="share_keys", **pair))
    assert "keys of 2 clients, must be in [3, 3]" in line


@pytest.mark.slow
@pytest.mark.parametrize("both", [{"dead": [2]}, {"active": [2, 3], "dead": [1]}], ids=str)
def test_both_keys_of_a_client_are_not_given_away(
    tmp_path: Path, both: dict[str, list[int]]
) -> None:
    federation = secure_federation(tmp_path)
    answers: list[Message] = []

    def tamper(asked: Message, reply: Message) -> Message:
        record = asked.content.config_records.get(CONFIGS)
        if (
            record is not None
            and record.get("stage") == "unmask"
            and reply.metadata.src_node_id == 1
            and not answers
        ):
            federation.tamper = None
            state = federation.states[1].config_records["secaggplus_state"]
            state["current_stage"] = "collect_masked_vectors"
            answers.append(
                ask(
                    federation, 0, stage="unmask", active_nids=both.get("active", [1, 2, 3]),
                    dead_nids=both["dead"],
                )
            )  # fmt: skip
        return reply

    federation.tamper = tamper
    federation.run()
    (answer,) = answers
    assert "asks for both keys of a client" in line_of(answer)
