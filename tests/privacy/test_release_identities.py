"""An image pays under what came in: a changed step is a changed setting, whatever the neighbours.

The set: 40 grey pictures in a folder, released by one config and asked for by another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedpdm.data import ImageSet
from fedpdm.data.client_images import own_images
from fedpdm.data.loading import load_split
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.privacy.releases import ReleasePreview, ReleaseRequest, ReleaseStore
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import StoreError, read_tensors, write_tensors
from tests.data.test_identities import add_before, grey_folder
from tests.privacy.test_releases import released_numbers, rows
from tests.support.federations import small_config
from tests.support.refusals import tree

ONCE, TWICE = 9.956432, 15.390353  # epsilon of one release, and of two, at t0 642 and clip norm 8
DELTA = 1e-5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return grey_folder(tmp_path / "pictures")


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def asks(root: Path, *, allow: bool = False, **data: Any) -> tuple[ImageSet, ReleaseRequest]:
    """What a client with these pictures holds and asks for, by a config with these keys."""
    config = small_config(
        data={"name": "image_folder", "max_images": None, **data},
        partition={"kind": "own", "num_clients": 1},
        privacy={"epsilon": 10, "clip_norm": 8.0, "shift": 0.0},
    )
    held = own_images(config, load_split(config, "train", root=root), client_id=0)
    return held.images, set_up(config, held.images).release_request(
        client=0, allow_new_release=allow
    )


def refusal(store: ReleaseStore, asked: tuple[ImageSet, ReleaseRequest]) -> str:
    """The line with which `obtain` and `preview` refuse; the store stays as it was."""
    before, lines = tree(store.root), set()
    for attempt in (store.obtain, store.preview):
        with pytest.raises(StoreError) as caught:
            attempt(*asked)
        lines.add(str(caught.value))
    assert tree(store.root) == before
    (line,) = lines
    assert "\n" not in line
    return line.removeprefix(f"{store.root}: ")


# --- What an attacker found -----------------------------------------------------------------


@pytest.mark.parametrize(
    "coloring",
    [
        {"coloring": "independent"},
        {"coloring": "correlated", "color_correlation": 0.3},
        {"coloring": "by_label"},
    ],
    ids=["independent", "correlated", "by_label"],
)
def test_a_file_that_sorts_first_noises_itself_alone(
    root: Path, store: ReleaseStore, coloring: dict[str, Any]
) -> None:
    images, asked = asks(root, **coloring)
    first = store.obtain(images, asked)
    add_before(root)
    more, again = asks(root, **coloring)
    assert store.preview(more, again) == ReleasePreview(
        known=40, fresh=1, again=0, epsilon_before=0.0,
        epsilon_after=pytest.approx(ONCE, rel=1e-6),
    )  # fmt: skip
    got = store.obtain(more, again)
    assert released_numbers(store) == [40, 1]
    assert set(rows(first)) < set(rows(got))
    spent = store.spent(delta=DELTA)
    assert spent.distribution == ((pytest.approx(ONCE, rel=1e-6), 41),)


def test_another_correlation_is_another_setting(root: Path, store: ReleaseStore) -> None:
    keys = {"coloring": "correlated"}
    store.obtain(*asks(root, **keys, color_correlation=0.3))
    line = refusal(store, asks(root, **keys, color_correlation=0.9))
    found = re.fullmatch(
        r"(\d+) of 40 images were released before with data.color_correlation = 0.3 \(now 0.9\); "
        r"releasing them again is a new release and takes their epsilon from 9.956 to 15.39 at "
        r"delta 1e-05: restore the old setting, or allow it \(--allow-new-release\)",
        line,
    )
    assert found
    changed = int(found[1])
    assert 0 < changed < 40
    images, asked = asks(root, **keys, color_correlation=0.9, allow=True)
    store.obtain(images, asked)
    assert store.spent(delta=DELTA).distribution == (
        (pytest.approx(TWICE, rel=1e-6), changed),
        (pytest.approx(ONCE, rel=1e-6), 40 - changed),
    )
    before = tree(store.root)  # both are there now
    for rho in (0.3, 0.9):
        assert store.preview(*asks(root, **keys, color_correlation=rho)).known == 40
        store.obtain(*asks(root, **keys, color_correlation=rho))
    assert tree(store.root) == before


# --- Every step -----------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "resolution": ({}, {"resolution": 4}, "data.resolution = None (now 4), shape = 1x8x8"),
    "colour": ({}, {"coloring": "by_label"}, "data.coloring = none (now by_label), shape = 1x8x8"),
    "other colours": (
        {"coloring": "by_label"},
        {"coloring": "independent"},
        "data.coloring = by_label (now independent)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_step_is_refused_and_adds_up_where_it_is_allowed(
    root: Path, store: ReleaseStore, change: str
) -> None:
    before, after, words = CHANGES[change]
    first = store.obtain(*asks(root, **before))
    line = refusal(store, asks(root, **after))
    assert f"images were released before with {words}" in line
    assert "from 9.956 to 15.39 at delta 1e-05" in line
    images, asked = asks(root, **after, allow=True)
    preview = store.preview(images, asked)
    assert preview.fresh == 0
    second = store.obtain(images, asked)
    assert second.x_tilde.shape[1:] == images.images.shape[1:]
    twice, *rest = store.spent(delta=DELTA).distribution
    assert twice == (pytest.approx(TWICE, rel=1e-6), preview.again)
    assert sum(count for _, count in rest) == 40 - preview.again
    assert rows(store.obtain(*asks(root, **before))) == rows(first)
    assert rows(store.obtain(*asks(root, **after))) == rows(second)
    recorded = [record.preparation for record in store.ledger().releases()]
    assert all(record is not None for record in recorded)
    assert [record["resolution"] for record in recorded if record] == [
        before.get("resolution"), after.get("resolution")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["b", "a"]},
        {"classes": ["b"]},
        {"max_images": 11},
        {"resolution": 8},
        {"holdout_fraction": 0.5},
    ],
    ids=str,
)
def test_what_changes_no_pixel_changes_no_release(
    root: Path, store: ReleaseStore, change: dict[str, Any]
) -> None:
    images, asked = asks(root)
    store.obtain(images, asked)
    before = tree(store.root)
    assert store.preview(*asks(root, **change)).fresh == 0
    store.obtain(*asks(root, **change))
    assert tree(store.root) == before


def test_a_neighbour_in_colour_is_a_changed_step(root: Path, store: ReleaseStore) -> None:
    store.obtain(*asks(root))
    add_before(root, color=True)
    line = refusal(store, asks(root))
    assert line.startswith("40 of 41 images were released before with shape = 1x8x8 (now 3x8x8); ")
    store.obtain(*asks(root, allow=True))
    assert store.spent(delta=DELTA).distribution == (
        (pytest.approx(TWICE, rel=1e-6), 40),
        (pytest.approx(ONCE, rel=1e-6), 1),
    )


def test_a_picture_that_is_coloured_by_another_label_was_released(
    root: Path, store: ReleaseStore
) -> None:
    store.obtain(*asks(root, coloring="by_label"))
    one = root / "train" / "a" / "m000.png"
    one.rename(root / "train" / "b" / one.name)
    line = refusal(store, asks(root, coloring="by_label"))
    assert line.startswith("1 of 40 images were released before with other pixels or settings in ")


def test_a_picture_saved_in_another_format_is_known(root: Path, store: ReleaseStore) -> None:
    first = store.obtain(*asks(root, coloring="independent"))
    before = tree(store.root)
    for path in sorted(root.glob("train/*/*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    got = store.obtain(*asks(root, coloring="independent"))
    assert rows(got) == rows(first)
    assert tree(store.root) == before


def test_one_picture_under_two_labels_is_released_once(store: ReleaseStore, tmp_path: Path) -> None:
    """Also where nobody has sorted out what is equal."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    images = ImageSet(
        images=pixels,
        labels=np.arange(3),
        class_names=("a", "b", "c"),
        background=0.0,
        identities=np.array([[1] * 32, [2] * 32, [1] * 32], dtype=np.uint8),
    )
    asked = asks(grey_folder(tmp_path / "any", 2))[1]
    got = rows(store.obtain(images, asked))
    assert released_numbers(store) == [2]
    assert got[0] == got[2] != got[1]


def test_equal_pixels_of_other_origin_are_handed_out(store: ReleaseStore, tmp_path: Path) -> None:
    """What is noised is the same to the bit, so nothing is noised again."""
    images, asked = asks(grey_folder(tmp_path / "any"))
    first = store.obtain(images, asked)
    other = dataclasses.replace(images, identities=255 - images.image_identities())
    before = tree(store.root)
    assert rows(store.obtain(other, asked)) == rows(first)
    assert tree(store.root) == before


# --- Stores of earlier versions -------------------------------------------------------------


def as_before(store: ReleaseStore, place: Path) -> ReleaseStore:
    """The same releases as a version recorded them that knew neither identities nor steps."""
    old = ReleaseStore(place)
    append(read_ledger(place / "ledger.jsonl"), "opened", {"client_id": 0})
    for record in store.ledger().releases():
        tensors, metadata = read_tensors(store.root / "releases" / record.file)
        del tensors["identities"], metadata["preparation"]
        write_tensors((place / "releases" / record.file).with_suffix(".ready"), tensors, metadata)
        old.note("crashed", {}, client_id=0)  # which recovers
    return old


def test_an_old_store_hands_out_what_it_has(
    root: Path, store: ReleaseStore, tmp_path: Path
) -> None:
    first = store.obtain(*asks(root, resolution=4))
    old = as_before(store, tmp_path / "old")
    assert old.ledger().releases()[0].preparation is None
    before = tree(old.root)
    assert torch.equal(old.obtain(*asks(root, resolution=4)).x_tilde, first.x_tilde)
    assert tree(old.root) == before
    add_before(root)  # nothing speaks against it
    old.obtain(*asks(root, resolution=4))
    assert released_numbers(old) == [40, 1]
    assert old.spent(delta=DELTA).distribution == ((pytest.approx(ONCE, rel=1e-6), 41),)


def test_an_old_store_knows_no_images_of_another_shape(
    root: Path, store: ReleaseStore, tmp_path: Path
) -> None:
    """They may be the same ones: refused, and counted as the same where it is allowed."""
    store.obtain(*asks(root, resolution=4))
    old = as_before(store, tmp_path / "old")
    line = refusal(old, asks(root))
    assert line.startswith(
        "40 of 40 images may have been released before with shape = 1x4x4 (now 1x8x8); "
    )
    assert "from 9.956 to 15.39 at" in line
    assert old.preview(*asks(root, allow=True)).again == 40
    old.obtain(*asks(root, allow=True))
    assert old.spent(delta=DELTA).largest == pytest.approx(TWICE, rel=1e-6)


def test_an_old_store_drew_colours_by_place(
    root: Path, store: ReleaseStore, tmp_path: Path
) -> None:
    """Those that look as they did are known; the others may be old ones in another colour."""
    by_place: Callable[..., Any] = asks
    images, asked = by_place(root, coloring="independent")
    shuffled = np.random.default_rng(0).permutation(40)  # colours of other images
    grey = load_split(small_config(data={"name": "image_folder", "max_images": None}), "train",
                      root=root)  # fmt: skip
    colors = images.images.max(axis=(2, 3))[shuffled]
    recolored = dataclasses.replace(
        images,
        images=(grey.images * (colors[:, :, None, None] / 255.0)).astype(np.uint8),
        identities=None,
    )
    store.obtain(recolored, asked)
    old = as_before(store, tmp_path / "old")
    line = refusal(old, (images, asked))
    assert "images may have been released before with colours by place, as earlier versions" in line
    old.obtain(*asks(root, coloring="independent", allow=True))
    assert old.spent(delta=DELTA).largest == pytest.approx(TWICE, rel=1e-6)
