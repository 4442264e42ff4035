"""Class statistics in store, ledger, statement, policy and on the wire."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.config import ConfigError, config_from_json, config_to_json
from fedpdm.deployment.acceptance import config_digest
from fedpdm.deployment.policy import NodePolicy, PolicyError, check_config
from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters
from fedpdm.privacy.noise import LARGEST
from fedpdm.privacy.planning import build_release_request, plan_release
from fedpdm.privacy.releases import ReleaseStore, archive
from fedpdm.privacy.releases import store as store_module
from fedpdm.privacy.statement import client_statement, plain_text, run_statement
from fedpdm.setup.run_setup import build_schedule
from fedpdm.storage.files import StoreError, read_tensors
from tests.support.federations import small_config
from tests.support.release_toys import DELTA, epsilon_of, image_set, request
from tests.support.statistics_toys import (
    CLASSES,
    MECHANISM,
    NoNoise,
    asked,
    made,
    public,
    rounds,
    source_of,
    statistics_config,
)

STAGES = pytest.mark.parametrize("stage", range(3))


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def obtained(store: ReleaseStore, count: int, stage: int, **changes: Any) -> ReleasedStatistics:
    released = store.obtain(image_set(count), asked(stage, **changes))
    assert isinstance(released, ReleasedStatistics)
    return released


def in_sums(store: ReleaseStore) -> dict[str, list[bytes]]:
    """Which images are in the sums of each round, by the files themselves."""
    found: dict[str, list[bytes]] = {}
    for record in store.ledger().releases():
        assert isinstance(record.parameters, StatisticsParameters)
        tensors, _ = read_tensors(store.root / "releases" / record.file)
        digests = found.setdefault(record.parameters.stage, [])
        digests += [bytes(row) for row in tensors["digests"].numpy()]
    return found


# --- Once, for ever ----------------------------------------------------------------------------


def test_an_image_is_in_the_sum_of_each_round_exactly_once(store: ReleaseStore) -> None:
    planned = rounds()
    total = epsilon_of([1.0 / each.mu for each in planned])
    first = [obtained(store, 10, stage) for stage in range(3)]
    head = store.ledger().head
    for stage in range(3):
        again = obtained(store, 10, stage)
        assert all(torch.equal(again.tensors()[k], v) for k, v in first[stage].tensors().items())
    assert store.ledger().head == head
    assert store.spent(delta=DELTA).largest == pytest.approx(total, rel=1e-9)
    # New images make sums of their own; the old ones are sent as they are.
    for stage in range(3):
        more = obtained(store, 14, stage)
        np.testing.assert_array_equal(more.counts, [[4, 3, 3], [1, 2, 1]])
        assert torch.equal(more.sums[0], first[stage].sums[0])
        new = image_set(14).subset(np.arange(10, 14))
        error = more.sums[1].numpy() - made(MECHANISM, source_of(new), planned[stage], NoNoise())
        assert 1500 < error.std() < 6500  # its own noise, once
    expected = sorted(bytes(row) for row in image_set(14).image_digests())
    assert {k: sorted(v) for k, v in in_sums(store).items()} == dict.fromkeys(
        ("means", "pooled", "classes"), expected
    )
    spent = store.spent(delta=DELTA)
    assert [count for _, count in spent.distribution] == [14]
    assert spent.largest == pytest.approx(total, rel=1e-9)


def test_equal_images_count_once(store: ReleaseStore) -> None:
    images = image_set(5)
    twice = dataclasses.replace(
        images,
        images=np.concatenate([images.images, images.images]),
        labels=np.concatenate([images.labels, images.labels]),
    )
    released = store.obtain(twice, asked(0))
    assert isinstance(released, ReleasedStatistics)
    assert int(released.counts.sum()) == 5


def test_an_image_in_two_sums_is_caught(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a store that forgets. The ledger's account of what images paid shows it."""
    obtained(store, 10, 0)
    honest = store.spent(delta=DELTA).largest
    remembers, answers = store_module.matching_releases, iter([False, True])
    monkeypatch.setattr(
        store_module, "matching_releases", lambda *a: remembers(*a) if next(answers) else []
    )
    assert len(obtained(store, 10, 0).sums) == 2
    (digests,) = in_sums(store).values()
    assert len(digests) > len(set(digests))
    paid = store.spent(delta=DELTA)
    assert paid.largest > 1.3 * honest
    assert paid.releases_per_image == 2


@STAGES
@pytest.mark.parametrize("step", ["written", "complete", "recorded"])
def test_a_crash_anywhere_sends_the_same_sums(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, stage: int, step: str
) -> None:
    """What was complete is sent as it is; what was not was never sent, and is made anew."""
    kept: list[bytes] = []

    def crash(*_: Any, **__: Any) -> Any:
        kept.extend(path.read_bytes() for path in store.root.glob("releases/*.ready"))
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        if step == "written":
            broken.setattr(archive.os, "fsync", crash)
        elif step == "complete":
            broken.setattr(archive, "append", crash)
        else:
            broken.setattr(archive.ReleaseArchive, "_name", crash)
        with pytest.raises(KeyboardInterrupt):
            obtained(store, 9, stage)
    released = obtained(store, 9, stage)
    assert (len(kept) == 1) == (step != "written")
    (record,) = store.ledger().releases()
    path = store.root / "releases" / record.file
    assert kept in ([], [path.read_bytes()])
    assert torch.equal(released.sums[0], read_tensors(path)[0]["sums"])
    assert {k: len(v) for k, v in in_sums(store).items()} == {rounds()[stage].stage: 9}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 3.0}, "mu = "),
        ({"clip_norm": 2.5}, r"clip_norm = 2\.0 \(now 2\.5\)"),
        ({"dimensions": 9}, r"dimensions = 768 \(now 9\)"),
        ({"means_share": 0.2}, "mu = "),
    ],
)
def test_changed_settings_are_refused(
    store: ReleaseStore, changes: dict[str, Any], words: str
) -> None:
    obtained(store, 6, 0)
    head = store.ledger().head
    with pytest.raises(StoreError, match=f"6 of 6 images were released before with {words}"):
        obtained(store, 6, 0, made=rounds(**changes))
    assert store.ledger().head == head


def test_another_machines_rounding_of_mu_changes_nothing(store: ReleaseStore) -> None:
    first = obtained(store, 6, 0)
    near = tuple(dataclasses.replace(each, mu=each.mu * (1.0 + 1e-13)) for each in rounds())
    assert torch.equal(obtained(store, 6, 0, made=near).sums, first.sums)


def test_images_after_statistics_are_a_new_release(store: ReleaseStore) -> None:
    obtained(store, 6, 0)
    with pytest.raises(StoreError, match=r"mechanism = statistics \(now images\)"):
        store.obtain(image_set(6), request())


def test_rounds_need_what_the_server_made_of_earlier_ones(store: ReleaseStore) -> None:
    means = public()["means"]
    bad: list[tuple[int, dict[str, torch.Tensor], str]] = [
        (1, {"other": means}, "the server's means are missing"),
        (1, {"means": means * float("nan")}, "means must be finite, 3 x 16"),
        (1, {"means": means[:2]}, r"means must be finite, 3 x 16, got \(2, 16\)"),
        (2, {"means": means}, "the server's directions are missing"),
        (2, {"means": means, "directions": torch.eye(16)}, "directions must be at most 5, got 16"),
        (2, {"means": means, "directions": torch.eye(5)}, "directions must be finite, any x 16"),
    ]
    for stage, given, words in bad:
        with pytest.raises(ValueError, match=words):
            obtained(store, 6, stage, public=given)
    assert store.ledger().releases() == ()


@pytest.mark.parametrize("kind", ["means", "directions"])
def test_whatever_the_server_says_an_image_counts_no_more(kind: str) -> None:
    """A hostile server's means and directions: contributions are clipped after them."""
    given = source_of(image_set(8))
    loud = {name: value * (1e6 if name == kind else 1.0) for name, value in public().items()}
    hostile = dataclasses.replace(given, public=loud)
    for parameters in rounds()[1:]:
        directions = loud["directions"].numpy()
        whole = MECHANISM.contributions(hostile, parameters, directions)
        assert (np.vecdot(whole, whole) <= parameters.limit).all()
        assert np.isfinite(whole).all()


# --- What is said ------------------------------------------------------------------------------


def test_the_statement_says_what_a_sum_is(store: ReleaseStore) -> None:
    config = statistics_config()
    plan = plan_release(config, build_schedule(config), num_classes=CLASSES)
    text = " ".join(plain_text(run_statement(config, plan, noise_source="")).split())
    assert "No image is sent by itself." in text
    assert "for each class the sum of its images, each shortened to a length of at most 2" in text
    assert "Then one table is sent for all images together: it says which features" in text
    assert "Then such a table is sent for each class, of 5 features: it says which" in text
    for stage in range(3):
        obtained(store, 6, stage)
    statement = client_statement(store, delta=DELTA)
    assert statement["epsilon"] == pytest.approx(10.0, rel=1e-6)
    assert statement["images"] == 6
    assert plan.epsilon_exact == pytest.approx(10.0)
    request = build_release_request(config, plan, client=0, allow_new_release=False, stage=2)
    assert (request.parameters, request.rounds) == (plan.rounds[2], plan.rounds)
    with pytest.raises(ConfigError, match="mechanism statistics releases no images"):
        plan.t0  # noqa: B018


def test_a_node_allows_statistics_only_where_its_policy_says_so() -> None:
    config = small_config(
        run={"simulation": False, "rounds": 3},
        coarse={"training": "server"},
        privacy={"release": "statistics", "epsilon": 10.0},
        evaluation={"image_metrics": False},
    )
    with pytest.raises(PolicyError, match="'statistics' is not one of the mechanisms of this node"):
        check_config(NodePolicy(), config)
    allowed = ("images", "statistics")
    check_config(NodePolicy(mechanisms=allowed, max_epsilon=10.0, min_t0=600), config)
    with pytest.raises(PolicyError, match="an image would spend 10 in all"):
        check_config(NodePolicy(mechanisms=allowed, max_epsilon=9.99), config)
    with pytest.raises(PolicyError, match="'images' is not one of"):
        check_config(
            NodePolicy(mechanisms=("statistics",)),
            small_config(run={"simulation": False}, evaluation={"image_metrics": False}),
        )


def test_a_config_without_statistics_is_the_same_to_digests() -> None:
    plain = small_config()
    assert '"statistics"' not in config_to_json(plain)
    assert config_from_json(config_to_json(plain)) == plain
    for keys in ({"directions": 7}, {"pooled_share": 0.2}, {"residual_norm": 3.0}):
        other = small_config(statistics=keys)
        assert json.loads(config_to_json(other))["statistics"].keys() == keys.keys()
        assert config_from_json(config_to_json(other)) == other
        assert config_digest(other) != config_digest(plain)


# --- What travels ------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_sums_travel_as_they_are_in_every_encoding(
    store: ReleaseStore, stage: int, encoding: str
) -> None:
    released = obtained(store, 10, stage)
    message = wire.encode_release(released, client_id=3, encoding=encoding)
    back = wire.decode_release(message, who="client 3", client_id=3, mechanism="statistics")
    assert isinstance(back, ReleasedStatistics)
    assert torch.equal(back.sums, released.sums)
    assert torch.equal(back.counts, released.counts)
    assert (back.parameters, back.event) == (released.parameters, released.event)
    torch.testing.assert_close(back.directions, released.directions, atol=0.01, rtol=0.0)
    with pytest.raises(wire.WireError, match="made by mechanism 'statistics', expected images"):
        wire.decode_release(message, who="client 3")


def hostile(released: ReleasedStatistics) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Tensors that no honest client sends, and the words that refuse them."""
    fine = released.tensors()
    most = int(released.counts[0, 0]) * int(released.parameters.limit**0.5) + LARGEST
    absurd, negative = released.sums.clone(), released.counts.clone()
    absurd[0, 0, 3] = most + 1
    negative[0, 0] = -1
    extreme = torch.full_like(released.sums, -(2**63))
    nan = released.sums.double() * float("nan")
    empty = {name: value[:0] for name, value in fine.items()}
    return {
        "absurd": ({**fine, "sums": absurd}, "a sum of 4 images must be within"),
        "extreme": ({**fine, "sums": extreme}, "a sum of 4 images must be within"),
        "nan": ({**fine, "sums": nan.float()}, "must be int64, int64 and float32"),
        "shape": ({**fine, "sums": released.sums[:, :, 1:]}, "of matching shapes"),
        "classes": ({**fine, "counts": released.counts[:, 1:]}, "of matching shapes"),
        "parts": (empty, "of matching shapes"),
        "scalar": ({**fine, "counts": torch.tensor(3)}, "of matching shapes"),
        "negative": ({**fine, "counts": negative}, "counts must be in"),
        "many": ({**fine, "counts": released.counts + (1 << 40)}, "counts must be in"),
        "missing": ({"sums": released.sums}, "expected counts and sums and directions"),
        "more": ({**fine, "images": released.sums}, "expected counts and sums and directions"),
    }


@pytest.mark.parametrize("fault", [
    "absurd", "extreme", "nan", "shape", "classes", "parts", "scalar", "negative", "many",
    "missing", "more",
])  # fmt: skip
def test_hostile_sums_are_refused(store: ReleaseStore, fault: str) -> None:
    released = obtained(store, 10, 0)
    bad, words = hostile(released)[fault]
    spoilt = dataclasses.replace(released)
    object.__setattr__(spoilt, "tensors", lambda: bad)
    message = wire.encode_release(spoilt, client_id=3)
    with pytest.raises(wire.WireError, match=words) as error:
        wire.decode_release(message, who="client 3", mechanism="statistics")
    assert "\n" not in str(error.value)


def test_hostile_directions_and_claims_are_refused(store: ReleaseStore) -> None:
    released = obtained(store, 10, 2)
    for value in (float("nan"), float("inf"), 1e30):
        spoilt = dataclasses.replace(released, directions=released.directions * value)
        message = wire.encode_release(spoilt, client_id=3)
        with pytest.raises(wire.WireError, match=r"directions must be in \[-1, 1\]"):
            wire.decode_release(message, who="client 3", mechanism="statistics")
    # Parameters that claim less loss than the event, and sums beyond all privacy.
    for changes, words in (({"mu": 0.1}, "does not follow"), ({"mu": 1e9}, "mu must be in")):
        parameters = dataclasses.replace(released.parameters, **changes)
        message = wire.encode_release(
            dataclasses.replace(released, parameters=parameters), client_id=3
        )
        with pytest.raises(wire.WireError, match=words):
            wire.decode_release(message, who="client 3", mechanism="statistics")


def test_nothing_but_the_noised_sums_is_in_a_message(store: ReleaseStore) -> None:
    """Not the images, their digests, nor the sums without noise."""
    images = image_set(10)
    for stage in range(3):
        message = wire.encode_release(obtained(store, 10, stage), client_id=3)[0].tobytes()
        for row in images.image_digests():
            assert bytes(row) not in message
        for image in images.images:
            assert image.tobytes() not in message
        exact = made(MECHANISM, source_of(images), rounds()[stage], NoNoise())
        assert exact[0, :8].tobytes() not in message
