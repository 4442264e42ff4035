"""Partitions: every image once, the skew that was asked for, and what each error line says."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

from fedpdm.config.names import PARTITIONS
from fedpdm.data.partition import (
    ClientPartition,
    partition,
    partition_record,
    partition_table,
)
from tests.support.cases import every

LABELS = np.random.default_rng(7).permutation(np.repeat(np.arange(6), [90, 80, 70, 60, 50, 7]))

ARGUMENTS: dict[str, dict[str, Any]] = {
    "iid": {"num_clients": 7},
    "dirichlet": {"num_clients": 7, "alpha": 0.3},
    "majority_minority": {"num_clients": 7, "majority_classes": 2, "majority_ratio": 8.0},
    "own": {"num_clients": 1},
    "given": {"num_clients": 3, "owners": [("b", "10", "9")[k % 3] for k in range(len(LABELS))]},
}


def share(kind: str, *, seed: int = 0, **changes: Any) -> tuple[ClientPartition, ...]:
    arguments: dict[str, Any] = {"num_classes": 6, **ARGUMENTS[kind], **changes}
    labels = arguments.pop("labels", LABELS)
    return partition(labels, kind=kind, rng=np.random.default_rng(seed), **arguments)  # type: ignore[arg-type]


def table(parts: tuple[ClientPartition, ...], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(M, K) counts, one by one."""
    counts = np.zeros((len(parts), int(labels.max()) + 1), dtype=np.int64)
    for part in parts:
        for index in part.indices:
            counts[part.client_id, labels[index]] += 1
    return counts


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_image_goes_to_exactly_one_client(kind: str) -> None:
    parts = share(kind)
    assert [part.client_id for part in parts] == list(range(len(parts)))
    everything = np.concatenate([part.indices for part in parts])
    assert np.array_equal(np.sort(everything), np.arange(len(LABELS)))
    for part in parts:
        assert len(part) >= 1
        assert part.indices.dtype == np.int64
        assert (np.diff(part.indices) > 0).all()
        assert sorted(part.majority + part.minority) == list(range(6))
        assert list(part.majority) == sorted(part.majority)
        with pytest.raises(ValueError, match="read-only"):
            part.indices[0] = 0


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "majority_minority"])
def test_the_generator_decides_and_nothing_else(kind: str) -> None:
    first, same, other = share(kind), share(kind), share(kind, seed=1)
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(first, same, strict=True))
    assert any(not np.array_equal(a.indices, b.indices) for a, b in zip(first, other, strict=True))
    rng = np.random.default_rng(0)
    arguments = ARGUMENTS[kind]
    once = partition(LABELS, kind=kind, num_classes=6, rng=rng, **arguments)  # type: ignore[arg-type]
    twice = partition(LABELS, kind=kind, num_classes=6, rng=rng, **arguments)  # type: ignore[arg-type]
    assert np.array_equal(once[0].indices, first[0].indices)
    assert not np.array_equal(twice[0].indices, first[0].indices)


def test_own_and_iid_have_no_minority() -> None:
    assert share("own")[0].indices.tolist() == list(range(len(LABELS)))
    for part in share("own") + share("iid"):
        assert (part.majority, part.minority) == (tuple(range(6)), ())


def test_given_clients_come_in_the_order_of_their_names() -> None:
    """Numbers by value, then words."""
    parts = share("given")
    assert [part.indices[0] for part in parts] == [2, 1, 0]
    assert sum(len(part.majority) for part in parts) > 0
    for changes, message in (
        ({"owners": None}, "^partition.kind: given needs data that say who holds what: "),
        ({"num_clients": 4}, r"^partition.num_clients: must be 3, .* \(9, 10, b\), got 4$"),
    ):
        with pytest.raises(ValueError, match=message):
            share("given", **changes)


def test_iid_sizes_differ_by_at_most_one_and_classes_do_not_matter() -> None:
    labels = np.repeat(np.arange(10), 300)

    def chi_square(counts: NDArray[np.int64]) -> float:
        expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
        return float(((counts - expected) ** 2 / expected).sum())

    parts = share("iid", labels=labels, num_classes=10, num_clients=11)
    assert {len(part) for part in parts} == {272, 273}
    # 90 degrees of freedom, deviation sqrt(180); two-sided bound of 4 deviations.
    assert abs(chi_square(table(parts, labels)) - 90) < 4 * 180**0.5
    in_order = np.zeros((11, 10), dtype=np.int64)  # planted fault: cut without shuffling
    np.add.at(in_order, (np.arange(3000) * 11 // 3000, labels), 1)
    assert chi_square(in_order) > 90 + 4 * 180**0.5


# --- majority and minority ------------------------------------------------------------------


def at_least_one(weights: NDArray[np.float64], total: int) -> NDArray[np.float64]:
    """max(1, c w) with the c at which it sums to `total`, found by a root finder."""
    if total == len(weights):
        return np.ones(len(weights))
    c = brentq(lambda c: np.maximum(1.0, c * weights).sum() - total, 0.0, total / weights.min())
    return np.maximum(1.0, c * weights)


@every("ratio", [1.0, 2.5, 10.0, 50.0, 400.0])
@every("num_clients, majority_classes", [(2, 3), (4, 3), (7, 2), (5, 6)])
def test_majority_ratio_holds_within_rounding(
    ratio: float, num_clients: int, majority_classes: int
) -> None:
    parts = share(
        "majority_minority",
        num_clients=num_clients,
        majority_classes=majority_classes,
        majority_ratio=ratio,
    )
    counts = table(parts, LABELS)
    assert np.array_equal(counts.sum(axis=0), np.bincount(LABELS))
    assert counts.min() >= 1
    for k in range(6):
        weights = np.array([ratio if k in part.majority else 1.0 for part in parts])
        exact = at_least_one(weights, int(counts[:, k].sum()))
        assert np.abs(counts[:, k] - exact).max() < 1
    times = np.bincount([k for part in parts for k in part.majority], minlength=6)
    assert times.max() - times.min() <= 1
    assert all(len(part.majority) == majority_classes for part in parts)


def test_exact_ratio_where_it_divides() -> None:
    labels = np.repeat(np.arange(4), 110)
    parts = share(
        "majority_minority",
        labels=labels,
        num_classes=4,
        num_clients=2,
        majority_classes=2,
        majority_ratio=10.0,
    )
    assert [part.majority for part in parts] == [(0, 1), (2, 3)]
    assert [part.minority for part in parts] == [(2, 3), (0, 1)]
    assert table(parts, labels).tolist() == [[100, 100, 10, 10], [10, 10, 100, 100]]


def test_majority_classes_wrap_around() -> None:
    parts = share("majority_minority", num_clients=4, majority_classes=4)
    assert [part.majority for part in parts] == [
        (0, 1, 2, 3),
        (0, 1, 4, 5),
        (2, 3, 4, 5),
        (0, 1, 2, 3),
    ]


def test_leftovers_do_not_pile_up_at_one_client() -> None:
    labels = np.repeat(np.arange(50), 5)  # 5 images of each class for 4 clients
    parts = share(
        "majority_minority",
        labels=labels,
        num_classes=50,
        num_clients=4,
        majority_classes=50,
        majority_ratio=1.0,
    )
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# --- Dirichlet ------------------------------------------------------------------------------


def test_dirichlet_majority_is_at_least_the_mean_count() -> None:
    for part in share("dirichlet"):
        counts = np.bincount(LABELS[part.indices], minlength=6)
        expected = tuple(k for k in range(6) if counts[k] >= len(part) / 6)
        assert part.majority == expected
        assert expected


@pytest.mark.slow
def test_dirichlet_shares_have_mean_and_variance_of_the_distribution() -> None:
    num_clients, num_classes, per_class = 5, 1500, 100
    labels = np.repeat(np.arange(num_classes), per_class)

    def variance_error(alpha: float, drawn_with: float) -> float:
        """Deviation of the shares' variance from Dir(alpha), in standard errors."""
        parts = share(
            "dirichlet",
            labels=labels,
            num_classes=num_classes,
            num_clients=num_clients,
            alpha=drawn_with,
        )
        shares = table(parts, labels) / per_class
        assert np.abs(shares.mean(axis=1) - 1 / num_clients).max() < 0.05
        # Var of one share of a symmetric Dirichlet: p (1 - p) / (M alpha + 1) with p = 1 / M.
        p = 1 / num_clients
        squares = ((shares - p) ** 2).mean(axis=0)
        error = squares.std() / num_classes**0.5
        return float((squares.mean() - p * (1 - p) / (num_clients * alpha + 1)) / error)

    for alpha in (0.1, 1.0, 10.0):
        assert abs(variance_error(alpha, alpha)) < 4
        assert abs(variance_error(alpha, 2 * alpha)) > 4  # planted fault


def test_dirichlet_limits() -> None:
    even = table(share("dirichlet", alpha=1e9), LABELS)
    assert np.abs(even - np.bincount(LABELS) / 7).max() <= 1
    single = table(share("dirichlet", alpha=1e-9), LABELS)
    # Each class goes to one client; clients left without get one image of the richest.
    assert np.sort(single, axis=0)[-1].sum() >= len(LABELS) - 6
    assert (single.sum(axis=1) >= 1).all()


# --- few images -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_as_many_clients_as_images(kind: str) -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 5])
    for seed in range(20):
        parts = share(kind, labels=labels, num_clients=7, seed=seed)
        assert [len(part) for part in parts] == [1] * 7


def test_a_class_with_an_image_for_each_client_and_no_more() -> None:
    labels = np.repeat(np.arange(2), [4, 40])
    parts = share(
        "majority_minority",
        labels=labels,
        num_classes=2,
        num_clients=4,
        majority_classes=1,
        majority_ratio=1e6,
    )
    assert table(parts, labels).tolist() == [[1, 1], [1, 19], [1, 1], [1, 19]]


@pytest.mark.parametrize(
    ("counts", "names", "words"),
    [
        ([9, 2], (), "client 2 would have none of its majority class 0, of which there are 2"),
        ([9, 1], (), "client 1 would have none of its minority class 0, of which there is 1"),
        ([9, 0], (), "client 0 would have none of its majority class 0, of which there are 0"),
        ([9, 2], ("few", "many"), "its majority class 0 (few), of which there are 2"),
    ],
)
def test_a_group_without_images_is_refused(
    counts: list[int], names: tuple[str, ...], words: str
) -> None:
    labels = np.repeat([1, 0], counts)
    with pytest.raises(ValueError, match=f"{re.escape(words)} for 4 clients$"):
        share(
            "majority_minority",
            labels=labels,
            num_classes=2,
            num_clients=4,
            majority_classes=1,
            class_names=names,
        )


# --- balanced totals ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTITIONS)
def test_balanced_totals_are_those_of_the_rarest_class(kind: str) -> None:
    parts = share(kind, balanced=True)
    assert table(parts, LABELS).sum(axis=0).tolist() == [7] * 6
    held = np.concatenate([part.indices for part in parts])
    assert len(np.unique(held)) == len(held)
    assert set(np.flatnonzero(LABELS == 5)) <= set(held.tolist())
    other = np.concatenate([part.indices for part in share(kind, balanced=True, seed=1)])
    assert set(held.tolist()) != set(other.tolist())  # what is left out is drawn at random


def test_balanced_needs_every_class() -> None:
    words = r"^balanced needs at least 1 image of each class, class 5 \(f\) has none$"
    with pytest.raises(ValueError, match=words):
        share("iid", labels=LABELS[LABELS < 5], balanced=True, class_names=tuple("abcdef"))


def test_table_says_what_was_left_out() -> None:
    labels = np.repeat(np.arange(2), [10, 4])
    parts = share("iid", labels=labels, num_classes=2, num_clients=2, balanced=True)
    *_, total, left = partition_table(parts, labels, ["many", "few"]).splitlines()
    assert total.split() == ["total", "4", "4", "8"]
    assert left == "Left out, so that classes are equal: 6 (6 many, 0 few)"


# --- record ---------------------------------------------------------------------------------


def test_record_is_by_hand() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    parts = (
        ClientPartition(client_id=0, indices=np.array([3, 1]), majority=(0,), minority=(1,)),
        ClientPartition(client_id=1, indices=np.array([2]), majority=(1,), minority=(0,)),
    )
    digests = [
        hashlib.sha256(struct.pack(f"<{len(held)}q", *held)).digest() for held in ([1, 3], [2])
    ]
    record = partition_record(parts, labels, ("a", "b"), settings={"kind": "mine", "seed": 3})
    assert record == {
        "kind": "mine",
        "seed": 3,
        "sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "class_names": ["a", "b"],
        "num_images": 5,
        "left_out": [1, 1],
        "clients": [
            {
                "client_id": 0,
                "num_images": 2,
                "per_class": [1, 1],
                "majority": [0],
                "minority": [1],
                "sha256": digests[0].hex(),
            },
            {
                "client_id": 1,
                "num_images": 1,
                "per_class": [0, 1],
                "majority": [1],
                "minority": [0],
                "sha256": digests[1].hex(),
            },
        ],
    }
    assert json.loads(json.dumps(record)) == record


# --- table ----------------------------------------------------------------------------------


def test_table_is_exact() -> None:
    labels = np.array([0] * 11 + [1] * 11 + [2] * 2)
    parts = share(
        "majority_minority",
        labels=labels,
        num_classes=3,
        num_clients=2,
        majority_classes=1,
        majority_ratio=10.0,
    )
    assert partition_table(parts, labels, ["zero", "one", "elephants"]).splitlines() == [
        "client  zero  one  elephants  total",
        "------  ----  ---  ---------  -----",
        "     0   10*   1          1      12",
        "     1    1   10*         1      12",
        "------  ----  ---  ---------  -----",
        " total   11   11          2      24",
    ]


# --- errors ---------------------------------------------------------------------------------


@every(
    "kind, changes, message",
    [
        ("iid", {"num_clients": 0}, "num_clients must be at least 1, got 0"),
        (
            "iid",
            {"num_clients": 358},
            "num_clients must be at most the number of images, 357, got 358",
        ),
        ("own", {"num_clients": 2}, "num_clients must be 1 for kind own, got 2"),
        ("dirichlet", {"alpha": None}, "alpha must be given for kind dirichlet"),
        ("dirichlet", {"alpha": 0.0}, "alpha must be greater than 0 and finite, got 0.0"),
        ("dirichlet", {"alpha": np.inf}, "alpha must be greater than 0 and finite, got inf"),
        ("dirichlet", {"alpha": np.nan}, "alpha must be greater than 0 and finite, got nan"),
        (
            "majority_minority",
            {"majority_classes": 7},
            "majority_classes must be in [1, 6], got 7",
        ),
        (
            "majority_minority",
            {"majority_classes": 0},
            "majority_classes must be in [1, 6], got 0",
        ),
        (
            "majority_minority",
            {"majority_ratio": 0.5},
            "majority_ratio must be at least 1 and finite, got 0.5",
        ),
        (
            "majority_minority",
            {"majority_ratio": None},
            "majority_ratio must be given for kind majority_minority",
        ),
        ("iid", {"alpha": 0.5}, "alpha must be left out for kind iid, got 0.5"),
        (
            "dirichlet",
            {"majority_ratio": 3.0},
            "majority_ratio must be left out for kind dirichlet, got 3.0",
        ),
        ("iid", {"num_classes": 5}, "labels[AT] must be in [0, 5), got 5"),
        ("iid", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (
            "iid",
            {"labels": np.zeros((2, 2))},
            "labels must be integers of shape (N,), got float64 of shape (2, 2)",
        ),
    ],
)
def test_bad_parameters(kind: str, changes: dict[str, Any], message: str) -> None:
    message = message.replace("AT", str(int(np.flatnonzero(LABELS == 5)[0])))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        share(kind, **changes)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"^kind must be one of iid, .*, given, got 'random'$"):
        partition(
            LABELS,
            kind="random",  # type: ignore[arg-type]
            num_clients=2,
            num_classes=6,
            rng=np.random.default_rng(0),
        )
