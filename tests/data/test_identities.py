"""An image is known by what came in: by no neighbour, file format or step of a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpdm.config import config_from_mapping
from fedpdm.data import ArrayReader, DataSet, ImageSet, RawSplit, load_image_set
from fedpdm.data.client_images import own_images
from fedpdm.data.coloring import COLOR_NAMES, choose_colors
from fedpdm.data.loading import preparation_of
from tests.support.own_code import MODULE, write_module
from tests.support.pixels import random_pixels

SIDE = 8


def grey_folder(root: Path, count: int = 40) -> Path:
    """`count` grey pictures for training, in two classes, under names that leave room before."""
    for number in range(count):
        path = root / "train" / "ab"[number % 2] / f"m{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(SIDE, SIDE, seed=number)).save(path)
    return root


def load(root: Path, name: str = "image_folder", **options: Any) -> ImageSet:
    return load_image_set(name, split="train", root=root, **options)


def identities(images: ImageSet) -> list[bytes]:
    return [bytes(row) for row in images.image_identities()]


def by_picture(images: ImageSet) -> dict[bytes, bytes]:
    """Identity -> pixels."""
    return dict(zip(identities(images), map(bytes, images.image_digests()), strict=True))


def add_before(root: Path, *, color: bool = False) -> None:
    """One file more, whose name sorts first."""
    pixels = random_pixels(*(SIDE, SIDE, 3)[: 2 + color], seed=999)
    Image.fromarray(pixels).save(root / "train" / "a" / "aaa.png")


STEPS: dict[str, dict[str, Any]] = {
    "resolution": {"resolution": 4},
    "larger": {"resolution": 11},
    "by label": {"coloring": "by_label"},
    "independent": {"coloring": "independent"},
    "correlated": {"coloring": "correlated", "color_correlation": 0.5},
    "the class is the colour": {"coloring": "independent", "class_label": "color"},
    "the class is both": {"coloring": "by_label", "class_label": "both"},
    "another order of classes": {"classes": ["b", "a"]},
    "few": {"max_images": 7},
}


@pytest.mark.parametrize("step", STEPS)
def test_no_step_changes_what_an_image_is_known_by(tmp_path: Path, step: str) -> None:
    root = grey_folder(tmp_path)
    plain, changed = by_picture(load(root)), by_picture(load(root, **STEPS[step]))
    assert changed.keys() <= plain.keys()
    assert len(changed) == (7 if step == "few" else 40)
    labels_alone = step in ("another order of classes", "few")
    assert all((changed[k] == plain[k]) is labels_alone for k in changed)


@pytest.mark.parametrize("step", STEPS)
def test_no_neighbour_changes_an_image(tmp_path: Path, step: str) -> None:
    """Neither what it is known by nor, where no channel is added, what is made of it."""
    root = grey_folder(tmp_path)
    before = by_picture(load(root, **STEPS[step]))
    add_before(root)
    after = by_picture(load(root, **STEPS[step]))
    assert len(after) - len(before) == (0 if step == "few" else 1)
    assert {k: after[k] for k in before.keys() & after.keys()}.items() <= before.items()


def test_a_neighbour_in_colour_changes_pixels_but_no_identity(tmp_path: Path) -> None:
    root = grey_folder(tmp_path)
    before = load(root)
    add_before(root, color=True)
    after = load(root)
    assert (before.images.shape[1], after.images.shape[1]) == (1, 3)
    assert by_picture(before).keys() <= by_picture(after).keys()
    assert set(by_picture(before).values()).isdisjoint(by_picture(after).values())


def test_no_file_format_changes_an_image(tmp_path: Path) -> None:
    """Grey saved as grey, in colour or with an alpha channel; photographs by two formats."""
    grey, photo = random_pixels(SIDE, SIDE, seed=1), random_pixels(SIDE, SIDE, 3, seed=2)
    for number, (pixels, mode, suffix) in enumerate(
        [(grey, "L", "png"), (grey, "RGB", "bmp"), (grey, "RGBA", "png"), (grey, "L", "tiff"),
         (photo, "RGB", "png"), (photo, "RGB", "bmp"), (photo, "RGBA", "png")]
    ):  # fmt: skip
        path = tmp_path / "train" / "a" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path)
    images = load(tmp_path)
    assert len(set(identities(images)[:4])) == len(set(identities(images)[4:])) == 1
    assert len(set(identities(images))) == 2
    assert images.distinct().tolist() == [0, 4]


def test_arrays_in_a_file_are_known_like_pictures(tmp_path: Path) -> None:
    root = grey_folder(tmp_path / "folder")
    pictures = load(root)
    for name, pixels in (
        ("grey", pictures.images[:, 0]),
        ("channels last", pictures.images.transpose(0, 2, 3, 1)),
        ("colour", pictures.images.repeat(3, axis=1)),
    ):
        path = tmp_path / f"{name}.npz"
        none = {"images_test": pixels[:1], "labels_test": pictures.labels[:1]}
        np.savez(path, images=pixels, labels=pictures.labels, **none)
        assert identities(load(path, "npz")) == identities(pictures), name
        assert identities(load(path, "npz", resolution=4)) == identities(pictures), name


def test_images_made_by_hand_are_known_by_their_own_pixels() -> None:
    pixels = random_pixels(5, 1, 4, 4)
    images = ImageSet(images=pixels, labels=np.arange(5), class_names=tuple("abcde"), background=0)
    assert images.identities is None
    assert np.array_equal(images.image_identities(), images.image_digests())
    part = images.subset(np.array([3, 1]))
    assert np.array_equal(part.image_identities(), images.image_digests()[[3, 1]])
    with pytest.raises(ValueError, match=r"^identities must be uint8 of shape \(5, 32\), one per"):
        ImageSet(
            images=pixels, labels=images.labels, class_names=images.class_names, background=0,
            identities=np.zeros((4, 32), np.uint8),
        )  # fmt: skip


def test_a_subset_keeps_what_came_in(tmp_path: Path) -> None:
    images = load(grey_folder(tmp_path), resolution=4)
    part = images.subset(np.array([5, 2]))
    assert identities(part) == [identities(images)[5], identities(images)[2]]
    assert part.identities is not None
    assert not part.identities.flags.writeable


# --- Equal images ---------------------------------------------------------------------------


def test_equal_images_are_those_that_came_in_alike_or_look_alike_now(tmp_path: Path) -> None:
    """One picture in two classes, coloured by class; two pictures that the resizing makes one."""
    pixels = random_pixels(SIDE, SIDE, seed=5)
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "same.png")
    half = np.kron(random_pixels(4, 4, seed=6), np.ones((2, 2), np.uint8))
    framed = np.pad(half, ((0, 0), (3, 3)), constant_values=9)  # the middle square is `half`
    for name, picture in (("half", half), ("framed", framed)):
        Image.fromarray(picture).save(tmp_path / "train" / "b" / f"{name}.png")
    images = load(tmp_path, resolution=8, coloring="by_label")
    assert len(set(map(bytes, images.image_digests()))) == 3
    assert len(set(identities(images))) == 3
    assert images.distinct().tolist() == [0, 1]  # a/same, b/framed
    config = config_from_mapping({"data": {"name": "image_folder"}})
    assert len(own_images(config, images, client_id=0).images) == 2


# --- Colours --------------------------------------------------------------------------------


@pytest.mark.parametrize("coloring", ["independent", "correlated"])
def test_a_colour_is_drawn_from_the_image(tmp_path: Path, coloring: str) -> None:
    """Uniform over images, nested over rho, and the same wherever the image stands."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (20_000, 32), dtype=np.uint8)
    labels = np.arange(len(known)) % 10

    def draw(rho: float | None, order: Any = slice(None)) -> np.ndarray:
        kind: Any = "independent" if rho is None else "correlated"
        return choose_colors(labels[order], coloring=kind, identities=known[order], correlation=rho)

    if coloring == "independent":
        colors = draw(None)
        cells = np.bincount(labels * 10 + colors, minlength=100)
        chi_square = float(((cells - 200) ** 2 / 200).sum())
        assert abs(chi_square - 99) < 4 * 198**0.5  # 99 degrees of freedom
        order = rng.permutation(len(known))
        assert np.array_equal(draw(None, order), colors[order])
        return
    assert np.array_equal(draw(0.0), draw(None))
    assert np.array_equal(draw(1.0), labels)
    own = [draw(rho) == labels for rho in (0.1, 0.5, 0.9)]
    for rho, found in zip((0.1, 0.5, 0.9), own, strict=True):
        chance = rho + (1 - rho) / 10
        assert abs(found.mean() - chance) < 4 * (chance * (1 - chance) / len(known)) ** 0.5
    assert (own[1] | ~own[0]).all()
    assert (own[2] | ~own[1]).all()


def test_a_drawn_colour_needs_something_to_be_drawn_from() -> None:
    with pytest.raises(ValueError, match=r"^data.coloring: independent draws from a split or"):
        choose_colors(np.zeros(3, np.int64), coloring="independent")


def test_the_class_may_be_the_drawn_colour(tmp_path: Path) -> None:
    root = grey_folder(tmp_path)
    plain = load(root, coloring="independent")
    by_color = load(root, coloring="independent", class_label="color")
    assert by_color.class_names == COLOR_NAMES
    assert by_picture(by_color) == by_picture(plain)
    few = load(root, coloring="independent", class_label="color", max_images=9)
    assert by_picture(few).items() <= by_picture(plain).items()
    labels = dict(zip(identities(by_color), by_color.labels, strict=True))
    assert [labels[k] for k in identities(few)] == few.labels.tolist()


def test_public_sets_keep_the_colours_that_they_were_published_with() -> None:
    """Their files are the same everywhere; the grey digit is what came in."""
    grey = load_image_set("digits", split="train", coloring="none")
    colored = load_image_set("digits", split="train", coloring="independent")
    assert np.array_equal(colored.image_identities(), grey.image_digests())
    drawn = choose_colors(colored.labels, coloring="independent", split="train")
    assert drawn[:12].tolist() == [1, 1, 3, 4, 3, 1, 4, 6, 6, 9, 7, 3]
    few = load_image_set("digits", split="train", coloring="independent", max_images=50)
    assert by_picture(few).items() <= by_picture(colored).items()


@pytest.mark.parametrize(
    ("data", "made"),
    [
        ({"name": "digits"}, {"resolution": None, "coloring": "by_label"}),
        (
            {"name": "npz", "resolution": 16, "classes": ["a"], "max_images": 5},
            {"resolution": 16, "coloring": "none"},
        ),
        (
            {"name": "npz", "coloring": "correlated", "color_correlation": 0.3},
            {"resolution": None, "coloring": "correlated", "color_correlation": 0.3,
             "colors_from": "image"},
        ),
        (
            {"name": "colored_mnist", "class_label": "both"},
            {"resolution": None, "coloring": "independent", "color_correlation": None,
             "colors_from": "place"},
        ),
    ],
)  # fmt: skip
def test_what_a_config_does_to_pixels(data: dict[str, Any], made: dict[str, Any]) -> None:
    assert preparation_of(config_from_mapping({"data": data})) == made


# --- Data sets of one's own -----------------------------------------------------------------


def halves(reader: Callable[..., Any]) -> RawSplit:
    return RawSplit(labels=np.zeros(6, np.int64), class_names=("a",), read=reader)


def test_a_set_of_ones_own_is_known_by_what_it_reads_without_a_resolution() -> None:
    pixels = random_pixels(6, 1, 8, 8)
    plain = halves(ArrayReader(images=pixels))

    def mine(positions: Any, resolution: int | None) -> Any:
        return plain.read(positions, resolution)

    everything = np.arange(6)
    wanted = plain.load(everything, None)[1]
    for raw in (plain, halves(mine)):
        for resolution in (None, 4):
            images, known = raw.load(everything[::-1], resolution)
            assert images.shape[2:] == ((8, 8) if resolution is None else (4, 4))
            assert np.array_equal(known, wanted[::-1])
        assert np.array_equal(raw.identities(), wanted)


def test_its_colours_are_drawn_from_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = f"{MODULE}:stripes"
    colored = load_image_set(name, split="train", coloring="independent")
    grey = load_image_set(name, split="train")
    assert not DataSet.colored_by_place
    assert np.array_equal(colored.image_identities(), grey.image_digests())
    drawn = choose_colors(grey.labels, coloring="independent", identities=grey.image_identities())
    assert len(set(drawn.tolist())) > 1
    again = load_image_set(name, split="train", coloring="independent", max_images=11)
    assert by_picture(again).items() <= by_picture(colored).items()
