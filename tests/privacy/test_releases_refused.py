"""Other settings, other clients, other images: what is refused, and what it would cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpdm.data import ImageSet
from fedpdm.privacy.ledger import START
from fedpdm.privacy.mechanism import SeededNoise, SystemNoise
from fedpdm.privacy.releases import ReleasePreview, ReleaseStore
from fedpdm.storage.files import StoreError
from tests.privacy.test_releases import released_numbers, rows
from tests.support.refusals import tree
from tests.support.release_toys import (
    DELTA,
    T0,
    epsilon_of,
    image_set,
    multiplier,
    request,
    settings,
)

OTHER: dict[str, dict[str, Any]] = {
    "t0": {"t0": 700},
    "clip_norm": {"clip_norm": 2.5},
    "shift": {"shift": 0.25},
    "schedule": {"schedule": "cosine"},
    "num_steps": {"num_steps": 900},
}


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


@pytest.mark.parametrize("key", OTHER)
def test_other_settings_are_refused_with_what_they_would_cost(
    store: ReleaseStore, key: str
) -> None:
    images = image_set(12)
    store.obtain(images, request())
    before = tree(store.root)
    once = epsilon_of([multiplier()])
    twice = epsilon_of([multiplier(), multiplier(**OTHER[key])])
    assert twice > once * 1.2
    for attempt in (store.obtain, store.preview):
        with pytest.raises(StoreError) as caught:
            attempt(images, request(**OTHER[key]))
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{store.root}: 12 of 12 images were released before with ")
        old, new = vars(settings())[key], OTHER[key][key]
        assert f"{key} = {old} (now {new})" in line
        cost = re.search(r"takes their epsilon from (\S+) to (\S+) at delta 1e-05: ", line)
        assert cost
        assert cost.groups() == (f"{once:.4g}", f"{twice:.4g}")
        assert line.endswith("restore the old setting, or allow it (--allow-new-release)")
    assert tree(store.root) == before


@pytest.mark.parametrize("key", OTHER)
def test_where_they_are_allowed_the_ledger_adds_up(store: ReleaseStore, key: str) -> None:
    images, change = image_set(12), OTHER[key]
    first = store.obtain(images, request())
    once, twice = epsilon_of([multiplier()]), epsilon_of([multiplier(), multiplier(**change)])
    allowed = request(allow=True, **change)
    assert store.preview(images, allowed) == ReleasePreview(
        known=0,
        fresh=0,
        again=12,
        epsilon_before=pytest.approx(once, rel=1e-7),
        epsilon_after=pytest.approx(twice, rel=1e-7),
    )
    second = store.obtain(images, allowed)
    assert second.parameters == settings(**change)
    assert not set(rows(first)) & set(rows(second))
    spent = store.spent(delta=DELTA)
    assert spent.largest == pytest.approx(twice, rel=1e-7)
    assert spent.distribution == ((spent.largest, 12),)
    assert [record.parameters for record in store.ledger().releases()] == [
        settings(),
        settings(**change),
    ]
    # Both settings are there now: neither needs leave, nor another release.
    before = tree(store.root)
    assert rows(store.obtain(images, request())) == rows(first)
    assert rows(store.obtain(images, request(**change))) == rows(second)
    assert store.preview(images, request()).known == 12
    assert tree(store.root) == before


def test_a_mixed_store_says_what_each_image_has_spent(store: ReleaseStore) -> None:
    images = image_set(30)
    store.obtain(images.subset(np.arange(20)), request())
    store.obtain(images.subset(np.arange(12, 30)), request(allow=True, t0=700))
    store.obtain(images.subset(np.arange(15, 25)), request(allow=True, t0=720))
    assert released_numbers(store) == [20, 18, 10]
    a, b, c = multiplier(), multiplier(t0=700), multiplier(t0=720)
    wanted = [([a, b, c], 5), ([a, b], 3), ([b, c], 5), ([a], 12), ([b], 5)]
    for delta in (DELTA, 1e-3):
        spent = store.spent(delta=delta)
        expected = [(epsilon_of(paid, delta=delta), count) for paid, count in wanted]
        assert [count for _, count in spent.distribution] == [count for _, count in expected]
        assert [cost for cost, _ in spent.distribution] == pytest.approx(
            [cost for cost, _ in expected], rel=1e-7
        )
        assert spent.largest == pytest.approx(expected[0][0], rel=1e-7)
        assert (spent.delta, spent.images) == (delta, 30)
    # The message is about the image that has paid most, of those that would pay again.
    with pytest.raises(StoreError, match="15 of 15 images were released before") as caught:
        store.obtain(images.subset(np.arange(15)), request(t0=740))
    old, new = epsilon_of([a, b]), epsilon_of([a, b, multiplier(t0=740)])
    assert f"from {old:.4g} to {new:.4g} at" in str(caught.value)


def test_some_of_the_images_under_other_settings(store: ReleaseStore) -> None:
    """What is known as wanted is not noised again; what is new is noised along with the rest."""
    images = image_set(30)
    store.obtain(images.subset(np.arange(0, 20)), request())
    known = rows(store.obtain(images.subset(np.arange(0, 10)), request(allow=True, t0=700)))
    asked = request(allow=True, t0=700)
    preview = store.preview(images, asked)
    assert (preview.known, preview.again, preview.fresh) == (10, 10, 10)
    with pytest.raises(StoreError, match="10 of 30 images were released before"):
        store.obtain(images, request(t0=700))
    got = rows(store.obtain(images, asked))
    assert got[:10] == known
    assert released_numbers(store) == [20, 10, 20]


# --- Other stores ---------------------------------------------------------------------------


def refusal(store: ReleaseStore, images: ImageSet, **options: Any) -> str:
    """The line with which a request is refused by `obtain` and by `preview`; no byte changes."""
    before, lines = tree(store.root), set()
    for attempt in (store.obtain, store.preview):
        with pytest.raises(StoreError) as caught:
            attempt(images, request(**options))
        lines.add(str(caught.value))
    assert tree(store.root) == before
    (line,) = lines
    assert "\n" not in line
    return line.removeprefix(f"{store.root}: ")


def test_the_store_of_another_client_is_refused(store: ReleaseStore) -> None:
    store.obtain(image_set(5), request(client=3))
    for allow in (False, True):
        line = refusal(store, image_set(5), client=4, allow=allow)
        assert line == "is the store of client 3, not of client 4; use a directory of its own"


def test_images_of_another_shape_are_another_data_set(store: ReleaseStore) -> None:
    """They are not those that the store knows, whatever was done to them: it knows what came in."""
    store.obtain(image_set(5), request())
    line = refusal(store, image_set(7, side=5))
    assert line.startswith("holds releases of 5 images and none of these 7: a store of another ")
    store.obtain(image_set(7, side=5), request(allow=True))
    assert released_numbers(store) == [5, 7]
    assert store.spent(delta=DELTA).releases_per_image == 1
    assert rows(store.obtain(image_set(5), request())) != []


def test_images_of_another_data_set_are_refused(store: ReleaseStore) -> None:
    store.obtain(image_set(5), request())
    line = refusal(store, image_set(7, seed=1))
    assert line.startswith("holds releases of 5 images and none of these 7: a store of another ")
    assert line.endswith("or add them to it (--allow-new-release)")
    store.obtain(image_set(7, seed=1), request(allow=True))
    assert released_numbers(store) == [5, 7]


def test_a_deployment_refuses_seeded_noise(store: ReleaseStore) -> None:
    store.obtain(image_set(5), request(simulation=True))
    for allow in (False, True):
        line = refusal(store, image_set(5), simulation=False, allow=allow)
        assert line.startswith("release 1 was made with seeded noise in a simulation and protects")


def test_a_simulation_does_not_add_to_a_deployed_store(store: ReleaseStore) -> None:
    images = image_set(8)
    made = store.obtain(images.subset(np.arange(5)), request(simulation=False))
    assert (made.seeded, made.noise_source) == (False, SystemNoise.description)
    for options in ({"allow": True, "t0": 700}, {"allow": True}):
        line = refusal(store, images, simulation=True, **options)
        assert line.startswith("is a deployed client's store; a simulation's seeded noise may not")
    # It may look at what is released.
    again = store.obtain(images.subset(np.arange(5)), request(simulation=True))
    assert rows(again) == rows(made)
    assert not again.seeded


# --- The ledger of a client's rounds --------------------------------------------------------


def test_rounds_know_their_ledger(store: ReleaseStore, tmp_path: Path) -> None:
    heads = [START, store.ledger().head]
    store.obtain(image_set(5), request())
    heads.append(store.ledger().head)
    store.obtain(image_set(9), request())
    heads.append(store.ledger().head)
    store.check_history(heads)
    store.check_history([])
    other = ReleaseStore(tmp_path / "other")
    with pytest.raises(StoreError, match="is not the ledger that earlier rounds were answered"):
        other.check_history(heads)  # as if all had been deleted
    other.obtain(image_set(5), request(seed=4))
    with pytest.raises(StoreError, match="noising the same images again would be a second rel"):
        other.check_history(heads[2:])
    with pytest.raises(StoreError, match="restore it"):
        store.check_history([*heads, "0" * 64])


def test_the_ledger_tells_the_release(store: ReleaseStore) -> None:
    store.obtain(image_set(5), request(clip_norm=2.5))
    lines = (store.root / "ledger.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    assert record["images"] == 5
    assert record["image_shape"] == [1, 4, 4]
    assert record["parameters"]["t0"] == T0
    assert record["parameters"]["clip_norm"] == 2.5
    assert record["noise_multiplier"] == pytest.approx(multiplier(clip_norm=2.5), rel=1e-9)
    assert record["epsilon"] == pytest.approx(epsilon_of([multiplier(clip_norm=2.5)]), rel=1e-7)
    assert record["delta"] == DELTA
    assert record["noise_source"] == SeededNoise.description
    assert record["seeded"] is True
