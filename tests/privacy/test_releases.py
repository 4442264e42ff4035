"""Every image is noised once: what is released again, what is refused, and what it would cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.data import ImageSet, normalize
from fedpdm.privacy.mechanism import SeededNoise, SystemNoise, clip_l2
from fedpdm.privacy.planning import build_noise
from fedpdm.privacy.releases import ReleasePreview, ReleaseStore
from fedpdm.privacy.types import ReleasedDataset
from tests.support.federations import small_config
from tests.support.refusals import tree
from tests.support.release_toys import (
    DELTA,
    epsilon_of,
    image_set,
    multiplier,
    request,
    settings,
)


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def rows(released: ReleasedDataset) -> list[bytes]:
    return [row.numpy().tobytes() for row in released.x_tilde]


def released_numbers(store: ReleaseStore) -> list[int]:
    """How many images each release noised."""
    return [record.images for record in store.ledger().releases()]


def noise_of(released: ReleasedDataset, images: ImageSet) -> np.ndarray:
    """z of each image (N, D), worked out from x_tilde and the image."""
    parameters = released.parameters
    x_0 = normalize(images.images, shift=parameters.shift)
    signal = parameters.alpha_bar**0.5 * clip_l2(x_0, clip_norm=parameters.clip_norm)
    z = (released.x_tilde - signal) / (1 - parameters.alpha_bar) ** 0.5
    return z.flatten(1).numpy()


# --- An image is known by its pixels --------------------------------------------------------


def test_a_release_is_made_once_and_kept_to_the_bit(store: ReleaseStore) -> None:
    images = image_set(20)
    first = store.obtain(images, request())
    assert first.x_tilde.shape == (20, 1, 4, 4)
    assert first.x_tilde.dtype == torch.float32
    assert first.labels.tolist() == images.labels.tolist()
    assert first.parameters == settings()
    assert (first.seeded, first.noise_source) == (True, SeededNoise.description)
    assert np.abs(noise_of(first, images)).max() < 6.0
    before = tree(store.root)
    for seed in (0, 1, 77):
        again = ReleaseStore(store.root).obtain(images, request(seed=seed))
        assert torch.equal(again.x_tilde, first.x_tilde)
        assert (again.parameters, again.event) == (first.parameters, first.event)
    assert tree(store.root) == before


def test_another_seed_would_have_been_another_release(tmp_path: Path) -> None:
    """So the test above could fail."""
    images = image_set(4)
    a, b = (ReleaseStore(tmp_path / str(k)).obtain(images, request(seed=k)) for k in (0, 1))
    assert not set(rows(a)) & set(rows(b))


def test_order_labels_and_memory_layout_do_not_matter(store: ReleaseStore) -> None:
    images = image_set(30)
    first = rows(store.obtain(images, request()))
    before = tree(store.root)
    order = np.random.default_rng(5).permutation(30)
    shuffled = images.subset(order)
    relabelled = ImageSet(
        images=np.asfortranarray(shuffled.images),
        labels=(shuffled.labels + 1) % 3,
        class_names=("x", "y", "z"),
        background=-1.0,
    )
    got = store.obtain(relabelled, request())
    assert rows(got) == [first[k] for k in order]
    assert got.labels.tolist() == relabelled.labels.tolist()
    assert tree(store.root) == before


def test_only_added_images_are_noised(store: ReleaseStore) -> None:
    images = image_set(50)
    first = rows(store.obtain(images.subset(np.arange(20, 50)), request()))
    first_file = (store.root / "releases" / "000001.safetensors").read_bytes()
    assert store.preview(images, request()) == ReleasePreview(
        known=30,
        fresh=20,
        again=0,
        epsilon_before=0.0,
        epsilon_after=pytest.approx(epsilon_of([multiplier()]), rel=1e-7),
    )
    got = store.obtain(images, request())
    assert rows(got)[20:] == first
    assert released_numbers(store) == [30, 20]
    assert (store.root / "releases" / "000001.safetensors").read_bytes() == first_file
    before = tree(store.root)
    order = np.random.default_rng(1).permutation(50)
    assert rows(store.obtain(images.subset(order), request())) == [rows(got)[k] for k in order]
    assert tree(store.root) == before
    spent = store.spent(delta=DELTA)
    assert spent.distribution == ((pytest.approx(epsilon_of([multiplier()]), rel=1e-7), 50),)


@pytest.mark.parametrize("source", ["toy", "build", "system"])
def test_a_second_release_has_noise_of_its_own(store: ReleaseStore, source: str) -> None:
    images = image_set(40, side=8)
    config = small_config()
    noise: dict[str, Callable[[int], Any] | None] = {
        "toy": None,
        "build": lambda release: build_noise(config, client=3, release=release),
        "system": lambda _: SystemNoise(),
    }
    asked = request(noise=noise[source], simulation=source != "system")
    store.obtain(images.subset(np.arange(20)), asked)
    z = noise_of(store.obtain(images, asked), images)
    first, second = z[:20].ravel(), z[20:].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / len(first) ** 0.5
    assert not (np.abs(first - second) < 1e-3).mean() > 0.01


def test_a_draw_of_the_noise_is_another_stream_and_the_first_is_that_of_before() -> None:
    def drawn(source: Any) -> np.ndarray:
        noise = np.empty(1000, dtype=np.float32)
        source.fill(noise)
        return noise

    def of(draw: int, client: int = 3, release: int = 2) -> np.ndarray:
        config = small_config(privacy={"noise_draw": draw})
        return drawn(build_noise(config, client=client, release=release))

    seed = small_config().run.seed
    before = np.random.SeedSequence(seed, spawn_key=(2, 3, 0, 2))  # purpose, client, round, release
    assert np.array_equal(of(0), drawn(SeededNoise(before)))
    assert np.array_equal(of(1), of(1))
    streams = [of(0), of(1), of(2), of(1, client=4), of(1, release=3)]
    for first, second in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 1000**0.5


def test_the_same_noise_twice_would_be_seen(store: ReleaseStore) -> None:
    """The planted fault of the test above."""
    images = image_set(40, side=8)
    asked = request(noise=lambda _: SeededNoise(np.random.SeedSequence(9)))
    store.obtain(images.subset(np.arange(20)), asked)
    z = noise_of(store.obtain(images, asked), images)
    assert np.corrcoef(z[:20].ravel(), z[20:].ravel())[0, 1] > 0.99


def test_removed_images_come_back_as_they_were(store: ReleaseStore) -> None:
    images = image_set(20)
    first = rows(store.obtain(images, request()))
    before = tree(store.root)
    for kept in ([3], [19, 0, 7], range(0, 20, 2)):
        index = np.array(list(kept))
        assert rows(store.obtain(images.subset(index), request())) == [first[k] for k in index]
    assert rows(store.obtain(images, request())) == first
    assert tree(store.root) == before


def test_equal_images_are_released_once(store: ReleaseStore) -> None:
    images = image_set(6)
    index = np.array([0, 1, 0, 2, 2, 2, 5, 0])
    got = rows(store.obtain(images.subset(index), request()))
    assert released_numbers(store) == [4]
    assert len(set(got)) == 4
    at = dict(zip(index, got, strict=True))
    assert got == [at[k] for k in index]
    again = rows(store.obtain(images, request()))
    assert released_numbers(store) == [4, 2]
    assert [again[k] for k in index] == got
    assert store.spent(delta=DELTA).images == 6


def test_overlapping_sets_share_what_they_have_in_common(store: ReleaseStore) -> None:
    images = image_set(30)
    parts = [np.arange(0, 15), np.arange(10, 25), np.arange(5, 30)]
    got = [dict(zip(part, rows(store.obtain(images.subset(part), request())), strict=True))
           for part in parts]  # fmt: skip
    assert released_numbers(store) == [15, 10, 5]
    for a in got:
        for b in got:
            assert all(a[k] == b[k] for k in a.keys() & b.keys())
    assert rows(store.obtain(images, request())) == [
        (got[0] | got[1] | got[2])[k] for k in range(30)
    ]


def test_an_empty_store_has_spent_nothing(store: ReleaseStore) -> None:
    spent = store.spent(delta=DELTA)
    assert (spent.largest, spent.images, spent.distribution) == (0.0, 0, ())
    preview = store.preview(image_set(5), request())
    assert (preview.known, preview.fresh, preview.again) == (0, 5, 0)
    assert not store.root.exists()
