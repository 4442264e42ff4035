"""Participants that mean harm: nothing of theirs is aggregated, and one short line names them.

What is merely malformed is in `test_strategies_refusal`, `test_strategies_server` and `test_wire`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters

from fedpdm import wire
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import LONGEST
from fedpdm.wire.types import CoarseUpdate
from strategies import exchange
from strategies.roster import ClientFailure
from tests.strategies.test_strategies_server import make_server, nothing, upload
from tests.support.strategy_fakes import (
    EMPTY,
    START,
    Arrays,
    arrays,
    drift,
    evaluation,
    fedavg_server,
    fit_result,
    tensors,
    update,
)

LIE = 10**10  # bytes


def spoiled(value: float) -> Arrays:
    weights = {name: array.copy() for name, array in drift(1).items()}
    weights["conv.weight"][1, 2] = value
    return weights


def of_other_images() -> FitRes:
    """An update that says that it was computed from raw images."""
    sent = CoarseUpdate(
        weights=tensors(drift(1)), num_examples=10, client_id=1, round=1, seeded=False, basis="raw"
    )
    return fit_result(wire.encode_update(sent, simulation=True), 10, {"client_id": 1})


def of_bytes(*data: bytes) -> FitRes:
    parameters = Parameters(tensors=list(data), tensor_type="numpy.ndarray")
    return FitRes(Status(Code.OK, ""), parameters, 10, {"client_id": 1})


def framed(payload: bytes) -> FitRes:
    """Bytes in an honest frame."""
    array = np.frombuffer(payload, dtype=np.uint8)
    return of_bytes(*ndarrays_to_parameters([array]).tensors)


def frame_that_claims(size: int) -> FitRes:
    """A `.npy` header for `size` bytes, and 64 of them."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": (size,)}).encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return of_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))


def header_that_claims(size: int) -> FitRes:
    """A message whose first eight bytes say how long its header is, falsely."""
    payload = wire.encode_model(tensors(drift(1)))[0].tobytes()
    return framed(size.to_bytes(8, "little") + payload[8:])


def tensor_that_claims(size: int, shape: list[int]) -> FitRes:
    """A tensor table with `size` bytes of values, which are not there."""
    entry = {"version": "1", "kind": "coarse-update", "encoding": "float32"}
    table = {
        "__metadata__": {"fedpdm": json.dumps(entry)},
        "conv.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
    }
    text = json.dumps(table).encode()
    return framed(len(text).to_bytes(8, "little") + text + bytes(32))


FORGED: dict[str, Callable[[], FitRes]] = {
    "frame": lambda: frame_that_claims(LIE),
    "frame beyond all numbers": lambda: frame_that_claims(10**40),
    "negative frame": lambda: frame_that_claims(-1),
    "header": lambda: header_that_claims(LIE),
    "header beyond all files": lambda: header_that_claims(2**64 - 1),
    "tensor": lambda: tensor_that_claims(LIE, [LIE // 4]),
    "tensor of many dimensions": lambda: tensor_that_claims(LIE, [LIE // 4] + [1] * 500),
    "tensor with a hole": lambda: tensor_that_claims(32, [-8, -1]),
}

# What client 1 sends -> words of the refusal.
HOSTILE: dict[str, tuple[Callable[[], FitRes], str]] = {
    "huge": (lambda: update(1, spoiled(1e7)), "conv.weight has values beyond 1e"),
    "largest": (lambda: update(1, spoiled(-3.4e38)), "conv.weight has values beyond 1e"),
    "raw images": (of_other_images, "made from raw images, expected released"),
    "too many images": (lambda: update(1, drift(1), num_examples=10**9), "at most aggregation.max"),
    "large": (lambda: framed(bytes(1 << 20)), "1048704 bytes, where at most"),
    "many arrays": (lambda: of_bytes(*[b"" for _ in range(5)]), "not an array"),
    "endless error": (
        lambda: fit_result([], 10, {"client_id": 1, "error": "no\n" * 10**6}),
        "client 1: no no",
    ),
    "terminal": (
        lambda: fit_result([], 10, {"error": "\x1b[2J\x1b]0;owned\x07"}),
        r"\\x1b\[2J\\x1b\]0;owned\\x07",
    ),
    "other direction": (
        lambda: fit_result([], 10, {"error": "a\u202eb\u2028round 1/1"}),
        r"a\\u202eb\\u2028round 1/1",
    ),
    "endless name": (lambda: update(1, drift(1), metrics={"m" * 10**6: 1.0}), "metric mmm"),
    "endless kind": (
        lambda: framed(_with_kind("k" * 40_000)),
        "expected a coarse-update message",
    ),
    **{f"claims 10 GB: {name}": (make, "client 1: ") for name, make in FORGED.items()},
}


def _with_kind(kind: str) -> bytes:
    text = json.dumps(
        {"__metadata__": {"fedpdm": json.dumps({"version": "1", "kind": kind})}}
    ).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_nothing_of_a_hostile_answer_is_aggregated(
    tmp_path: Path, kind: str, on_failure: str
) -> None:
    make, words = HOSTILE[kind]
    server = fedavg_server(tmp_path, on_failure=on_failure, max_examples=1000)
    server.ask(1)
    good = {k: update(k, drift(k), num_examples=n) for k, n in ((0, 30), (2, 10))}
    bad = make()
    answers = {0: good[0], 1: bad, 2: good[2]}
    if on_failure == "raise":
        with pytest.raises(ClientFailure, match=words):
            server.take(1, answers)
        wanted = dict(START)
    else:
        server.take(1, answers)
        wanted = {n: 0.75 * drift(0)[n].astype(np.float64) + 0.25 * drift(2)[n] for n in START}
    for name, got in arrays(server.strategy.weights).items():
        np.testing.assert_allclose(got, wanted[name], rtol=1e-6, atol=1e-6)
    (line,) = server.said
    assert line.startswith("round 1 fit failed: client 1: ")
    assert line.isprintable()
    assert len(line) < LONGEST + 50
    assert bad.parameters.tensors == []  # let go of


def test_a_loss_beyond_all_is_left_out_by_name(tmp_path: Path) -> None:
    """Its mean with others would be infinite, which JSON does not have; its update counts."""
    server = fedavg_server(tmp_path, rounds=1)
    server.ask(1)
    hostile = {"client_id": 1, "coarse_loss": 1.7e308, "fine_loss": -1.7e308, "seconds": 1e300}
    server.take(
        1,
        {
            0: update(0, drift(0), num_examples=30),
            1: update(1, drift(1), num_examples=90, metrics=hostile),
            2: update(2, drift(2), num_examples=10),
        },
    )
    for name in ("coarse_loss 1.7e+308", "fine_loss -1.7e+308", "seconds 1e+300"):
        assert f"client 1: {name} is beyond 1e+12, left out" in server.said
    (record,) = RunDirectory(tmp_path).read_json("metrics.json")["rounds"]
    assert record["coarse_loss"] == pytest.approx(0.5)  # of the other two
    assert record["clients"][1] == {"client_id": 1}
    wanted = sum(n * drift(k)["conv.weight"] for k, n in ((0, 30), (1, 90), (2, 10))) / 130
    got = server.strategy.weights["conv.weight"].numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [1.7e308, -1e13, float("inf"), float("nan")])
def test_a_held_out_loss_beyond_all_is_refused(tmp_path: Path, loss: float) -> None:
    server = fedavg_server(tmp_path, rounds=1, on_failure="skip")
    server.ask(1)
    server.take(1, {k: update(k, drift(k)) for k in range(3)})
    server.strategy.configure_evaluate(1, EMPTY, server.manager)
    results = [(server.proxy(k), evaluation(k, loss if k == 1 else 2.0, 10)) for k in range(3)]
    server.strategy.aggregate_evaluate(1, results, [])
    assert any("held-out loss of client 1 must be at most 1e+12" in line for line in server.said)
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rounds"][0]["heldout_coarse_loss"] == 2.0


def test_what_a_strategy_measures_is_written_as_json(tmp_path: Path) -> None:
    """Whatever a strategy of one's own says of its round; a resumed run reads the same."""
    server = fedavg_server(tmp_path)
    real = server.strategy.merge
    server.strategy.merge = lambda round: {**real(round), "odd": float("inf")}  # type: ignore
    server.ask(1)
    server.take(1, {k: update(k, drift(k)) for k in range(3)})
    text = (tmp_path / "metrics.json").read_text()
    (record,) = json.loads(text, parse_constant=pytest.fail)["rounds"]
    assert record["odd"] is None
    checkpoint = RunDirectory(tmp_path).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[2]["rounds"] == [record]


def test_what_is_too_large_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For updates what was asked for says how large; for releases the number of images."""

    def decode(_: Any) -> Any:
        raise AssertionError("was decoded")

    monkeypatch.setattr(exchange, "decode_arrays", decode)
    server = fedavg_server(tmp_path / "updates")
    server.ask(1)
    with pytest.raises(ClientFailure, match="client 1: its message has 70528 bytes, where at most"):
        server.take(1, {1: framed(bytes(70_400))})
    trainer = make_server(tmp_path / "releases")
    trainer.ask(1)
    boasting = dataclasses.replace(upload(0), num_examples=3)
    boasting.parameters = framed(bytes(90_000)).parameters
    with pytest.raises(ClientFailure, match="client 0: its message has 90128 bytes"):
        trainer.take(1, {0: boasting})


def test_a_release_of_the_right_size_is_decoded(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    server.round(1, {k: upload(k) for k in (0, 1, 2)})
    server.ask(2)
    late = {k: nothing(k) for k in (0, 1, 2)} | {1: framed(bytes(1 << 20))}
    late[1].num_examples = 7
    with pytest.raises(ClientFailure, match="client 1: its message has 1048704 bytes"):
        server.take(2, late)  # in a round in which nothing is sent


CHILD = """
import resource, sys
from pathlib import Path
from tests.support.strategy_fakes import drift, fedavg_server, update
from tests.strategies.test_hostile_participants import FORGED

server = fedavg_server(Path(sys.argv[1]), on_failure="skip", rounds=99)
server.round(1, {k: update(k, drift(k)) for k in (0, 1, 2)})
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
for round, make in enumerate(FORGED.values(), 2):
    server.ask(round)
    server.take(round, {1: make(), 0: update(0, drift(0, round), round=round)})
    print(server.strategy.history["rounds"][-1]["failed"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_lie(tmp_path: Path) -> None:
    """Every forged message claims 10 GB or more; the process may take 64 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(FORGED)
    assert all(line.startswith(("['client 1: ", '["client 1: ')) for line in lines)
    assert not any("MemoryError" in line or "allocate" in line for line in lines)


def test_a_message_of_an_earlier_round_is_refused(tmp_path: Path) -> None:
    """The very bytes that were good in round 1, and once more with another client's name."""
    server = fedavg_server(tmp_path)
    first = {k: update(k, drift(k)) for k in (0, 1, 2)}
    kept = {k: list(result.parameters.tensors) for k, result in first.items()}
    before = server.round(1, first)
    for sender, words in ((1, "made for round 1, expected 2"), (2, "header says client 2")):
        server.ask(2)
        answers = {k: update(k, drift(k, 2), round=2) for k in (0, 2)}
        data = kept[1] if sender == 1 else update(2, drift(2, 2), round=2).parameters.tensors
        with pytest.raises(ClientFailure, match=f"client 1: update of client 1: {words}"):
            server.take(2, {**answers, 1: of_bytes(*data)})
    for name, value in arrays(server.strategy.weights).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("said", [True, -1, 10**30, "1", 1.0, None])
def test_a_node_must_say_which_client_it_is(tmp_path: Path, said: Any) -> None:
    server = fedavg_server(tmp_path)
    server.proxy(1).properties = {"client_id": said} if said is not None else {}
    with pytest.raises(ClientFailure, match="node7 does not say which client it is: "):
        server.ask(1)


def test_two_nodes_may_not_be_one_client(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path)
    server.proxy(1).properties = {"client_id": 2}
    with pytest.raises(ClientFailure, match="two nodes have the same client id"):
        server.ask(1)


def test_claimed_images_do_not_weigh_in_evaluations_either(tmp_path: Path) -> None:
    server = fedavg_server(tmp_path, on_failure="skip", max_examples=100)
    server.round(1, {k: update(k, drift(k)) for k in (0, 1, 2)})
    pairs: Any = [
        (server.proxy(k), evaluation(k, loss, count))
        for k, loss, count in ((0, 1.0, 10), (1, 1e9, 10**9))
    ]
    assert server.strategy.aggregate_evaluate(1, pairs, [])[0] == 1.0
    assert "client 1: num_examples must be at most aggregation.max_examples = 100" in "".join(
        server.said
    )
