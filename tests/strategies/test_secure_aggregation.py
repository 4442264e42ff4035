"""Secure aggregation: the sum is the plain mean, and no single update leaves a client."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from scipy import stats

from fedpdm import wire
from fedpdm.config import AggregationConfig, ConfigError
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.client_store import ClientStore
from fedpdm.wire.summands import SumError, largest_error, levels, mean_update, summands
from fedpdm.wire.types import CoarseUpdate
from tests.support.federations import initial_message, small_config
from tests.support.leaks import Search, weights, windows
from tests.support.secure_federations import (
    MOST,
    SecureFederation,
    coarse_weights,
    farthest,
    record,
    run,
    secure_federation,
)

# --- The sum --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """Plain runs, each made once."""
    made: dict[tuple[int, str], Any] = {}

    def of(num_clients: int, encoding: str) -> Any:
        if (num_clients, encoding) not in made:
            out = tmp_path_factory.mktemp("plain") / "run"
            run(out, num_clients, encoding=encoding)
            made[num_clients, encoding] = (coarse_weights(out), record(out))
        return made[num_clients, encoding]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_clients", "most", "encoding"),
    [(3, 100, "float32"), (4, 100, "float32"), (3, 1_000_000, "float32"), (3, 100, "bfloat16")],
)
def test_the_sum_is_the_plain_mean(
    tmp_path: Path, plain: Any, num_clients: int, most: int, encoding: str
) -> None:
    options: dict[str, Any] = {"secure": True, "max_examples": most, "encoding": encoding}
    got = run(tmp_path / "run", num_clients, **options)
    wanted, told = plain(num_clients, encoding)
    counts = [c["num_released"] for c in told["clients"]]  # a tenth of them are held out
    bound = largest_error(AggregationConfig(**options), [n * 8 // 10 for n in counts])
    single = 1e-6  # rounding of a weight of about 1 to float32, in both runs
    assert farthest(got, wanted) <= bound + single
    start = {
        f"weights.{n}": t for n, t in wire.decode_model(initial_message(small_config())).items()
    }
    if num_clients == 3:
        assert farthest(wanted, start) > 20 * (bound + single)  # the bound is far from trivial
    mine = record(tmp_path / "run")
    assert mine["coarse_loss"] == pytest.approx(told["coarse_loss"], rel=1e-12)
    up = mine["bytes_up"] / told["bytes_up"]
    assert up == pytest.approx(2.0 if encoding == "float32" else 4.0, rel=0.07)
    assert mine["bytes_down"] == pytest.approx(told["bytes_down"], rel=0.02)


@pytest.mark.parametrize("num_clients", [3, 7, 100, 1000])
def test_the_error_bound_holds_for_flowers_rounding(num_clients: int) -> None:
    """Weights and summands rounded by Flower's own function, added without masks."""
    section = AggregationConfig(secure=True, max_examples=500, secure_range=0.5)
    rng = np.random.default_rng(num_clients)
    counts = rng.integers(1, 501, num_clients)
    changes = rng.uniform(-0.5, 0.5, (num_clients, 40))
    changes[:, 0], changes[:, 1] = 0.5, -0.5
    size = levels(num_clients)
    total, weight = np.zeros(40, dtype=np.int64), 0
    for n, change in zip(counts, changes, strict=True):
        share = round(n / 500 * size)
        weight += share
        (rounded,) = quantize([change * (share / size)], 0.5, size)
        total += rounded
    assert 0 <= total.min() <= total.max() < 2**32  # else the modulus would cut it
    assert 0 < weight < 2**32
    mean = (total * (1.0 / size) - 0.5 * num_clients) * size / weight
    wanted = (counts[:, None] * changes).sum(axis=0) / counts.sum()
    bound = largest_error(section, counts.tolist())
    assert np.abs(mean - wanted).max() <= bound
    assert bound <= 20 * num_clients / size * 500 / counts.sum() + 1e-12


def an_update(**changes: Any) -> CoarseUpdate:
    given: dict[str, Any] = {
        "weights": {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(0.5)},
        "num_examples": 10, "client_id": 4, "round": 2, "seeded": False,
    }  # fmt: skip
    return CoarseUpdate(**{**given, **changes})


RECEIVED = {"b": torch.tensor([0.5, 2.5]), "a": torch.tensor(0.25)}
SECTION = AggregationConfig(secure=True, max_examples=40, secure_range=1.0)


def test_summands_are_changes_in_the_order_of_names() -> None:
    a, b, known = summands(an_update(), RECEIVED, SECTION)
    assert (a.tolist(), b.tolist(), a.shape) == (0.25, [0.5, -0.5], ())
    assert known.tolist() == [0.5 * 40 / 10] * 8
    same = mean_update([a, b, known * 0.25 * 3 / (3 * 0.25)], RECEIVED, SECTION, [10, 10, 10])
    assert {n: t.tolist() for n, t in same.items()} == {"a": 0.25, "b": [0.5, -0.5]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_examples": 41},
            "41 images must be in [1, aggregation.max_examples = 40] (client 4)",
        ),
        ({"num_examples": 0}, "0 images must be in [1, aggregation.max_examples = 40] (client 4)"),
        (
            {"weights": {**an_update().weights, "b": torch.tensor([1.6, 2.0])}},
            "b changed by 1.1 in round 2, aggregation.secure_range is 1 (client 4)",
        ),
        ({"weights": {**an_update().weights, "a": torch.tensor(torch.nan)}}, "a changed by nan"),
    ],
)
def test_what_flower_would_cut_off_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SumError, match=re.escape(words)):
        summands(an_update(**changes), RECEIVED, SECTION)


# --- What is sent ---------------------------------------------------------------------------


def updates_of(federation: SecureFederation) -> dict[int, CoarseUpdate]:
    """The updates that clients have computed, from their stores."""
    config = run_config_of(federation.run_config)
    like = wire.decode_model(initial_message(config))
    found = {}
    for client, node in federation.nodes.items():
        (folder,) = Path(node["store-dir"]).glob("runs/*")
        reply = ClientStore(folder).load_reply(1)
        assert reply is not None
        message = [np.frombuffer(reply.payload or b"", dtype=np.uint8)]
        found[client] = wire.decode_update(message, like=like, round=1, who=f"client {client}")
    return found


def forms_of(update: CoarseUpdate, like: Mapping[str, torch.Tensor]) -> set[bytes]:
    """Pieces of an update in every form on its way to the masks."""
    change = {n: update.weights[n].double() - like[n].double() for n in like}
    pieces = set(weights(update.weights)) | set(weights({n: t.float() for n, t in change.items()}))
    share = round(update.num_examples / MOST * levels(3)) / levels(3)
    for tensor in change.values():
        if tensor.numel() >= 64:
            scaled = tensor.numpy() * share
            exact = np.floor((scaled + 1.0) * levels(3) / 2.0).astype(np.int64)
            for array in (tensor.numpy(), scaled, exact, exact.astype(np.int32)):
                pieces |= set(windows(array.tobytes(), stride=1024))
    return pieces


@pytest.mark.slow
def test_no_message_holds_a_single_update(tmp_path: Path) -> None:
    federation = secure_federation(tmp_path / "secure")
    federation.run()
    like = wire.decode_model(initial_message(run_config_of(federation.run_config)))
    updates = updates_of(federation)
    search = Search({str(k): forms_of(update, like) for k, update in updates.items()})
    assert len(federation.replies()) == 4 * 3
    for sent in federation.sent:
        assert search.found(sent.data + bytes(8) + sent.objects) == set(), sent.kind
    open_one = secure_federation(tmp_path / "plain", aggregation={"secure": False})
    open_one.run()
    for sent in open_one.replies():  # the same search finds the update of a plain round
        own = Search({"it": forms_of(updates_of(open_one)[sent.client], like)})
        assert own.found(sent.data + sent.objects) == {"it"}
    keys = {name for sent in federation.replies() for name in sent.metrics}
    assert keys <= wire.FIT_METRICS.keys() | {
        "pk1", "pk2", "dsts", "ctxts", "masked_params", "nids", "shares", "num_examples"
    }  # fmt: skip
    masked_numbers_say_nothing(federation, updates, like)


def masked_numbers_say_nothing(
    federation: SecureFederation,
    updates: Mapping[int, CoarseUpdate],
    like: Mapping[str, torch.Tensor],
) -> None:
    """They are uniform in [0, 2^32) and uncorrelated with what they hide."""
    for sent in federation.replies():
        parts = sent.metrics.get("masked_params")
        if parts is None:
            continue
        arrays = [bytes_to_ndarray(part) for part in parts]
        assert all(a.dtype == np.int64 for a in arrays)
        values = np.concatenate([a.ravel() for a in arrays[1:-1]]) / 2**32
        update = updates[sent.client]
        change = np.concatenate(
            [(update.weights[n] - like[n]).numpy().ravel() for n in sorted(like)]
        )
        assert values.shape == change.shape
        assert len(values) > 40_000
        assert stats.kstest(values, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(values, change)[0, 1]) < 5 / np.sqrt(len(values))


def test_the_masks_of_flower_have_32_bits_of_seed() -> None:
    """What docs/aggregation.md warns of: 32 bytes of secret are folded into four."""
    secret = np.random.default_rng(0).bytes(32)
    folded = np.bitwise_xor.reduce(np.frombuffer(secret, "<u4"))
    (mask,) = pseudo_rand_gen(secret, 2**32, [(50,)])
    (same,) = pseudo_rand_gen(int(folded).to_bytes(4, "little"), 2**32, [(50,)])
    assert np.array_equal(mask, same)


# --- Configs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"max_examples": None}, "max_examples: secure aggregation needs one of at most .* null"),
        ({"max_examples": 10**7}, "max_examples: secure aggregation needs one of at most 1000000"),
        ({"method": "median"}, "aggregation.method: a server that sees only the sum"),
        ({"max_update_norm": 1.0}, "aggregation.max_update_norm: a server that sees only the sum"),
        ({"fraction_fit": 0.5}, "secure: needs 3 to 1000 clients in a round .* got 2"),
        ({"secure_threshold": 0.5}, "secure_threshold: must be greater than 0.5"),
        ({"secure_threshold": 0.51}, "0.51 of 4 clients must be more than half"),
    ],
)
def test_configs_that_go_not_together(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(
            partition={"num_clients": 4},
            aggregation={"secure": True, "max_examples": 100, **section},
        )
    with pytest.raises(ConfigError, match="got server, which aggregates no updates"):
        small_config(
            coarse={"training": "server"}, aggregation={"secure": True, "max_examples": 100}
        )
