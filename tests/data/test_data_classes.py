"""What counts as a class: colours, both, and some classes only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpdm.config import config_from_mapping
from fedpdm.data import COLOR_NAMES, PALETTE, ImageSet, load_image_set
from fedpdm.data.labelling import attribute_classes
from fedpdm.data.spec import build_image_spec


def load(**options: Any) -> ImageSet:
    return load_image_set("digits", **{"split": "train", "coloring": "independent", **options})


def painted(images: ImageSet) -> list[str]:
    """Names of the colours that are seen: of the palette, the nearest to the brightest pixel."""
    brightest = images.images.reshape(len(images), 3, -1).max(axis=2).astype(float)
    palette = np.array(PALETTE, float)
    scaled = brightest[:, None] - palette * (brightest.max(axis=1) / 255)[:, None, None]
    return [COLOR_NAMES[k] for k in np.abs(scaled).sum(axis=2).argmin(axis=1)]


def names_of(images: ImageSet) -> list[str]:
    return [images.class_names[label] for label in images.labels]


def test_the_class_is_the_digit_the_colour_or_both() -> None:
    digit, color, both = (load(class_label=kind) for kind in ("digit", "color", "both"))
    assert (digit.num_classes, color.num_classes, both.num_classes) == (10, 10, 100)
    assert both.class_names[31] == "3 green"
    assert np.array_equal(digit.images, color.images)
    assert np.array_equal(digit.images, both.images)
    seen = painted(digit)
    assert names_of(color) == seen
    pairs = [f"{name} {tint}" for name, tint in zip(names_of(digit), seen, strict=True)]
    assert names_of(both) == pairs


@pytest.mark.slow
@pytest.mark.parametrize("coloring", ["independent", "correlated", "by_label"])
def test_an_image_has_the_same_colour_in_every_subset(coloring: str) -> None:
    options = {"coloring": coloring}
    if coloring == "correlated":
        options["color_correlation"] = 0.4  # type: ignore[assignment]
    grey = load(coloring="none")
    whole = load(**options)
    colors = {
        image.tobytes(): painted.tobytes()
        for image, painted in zip(grey.images, whole.images, strict=True)
        if (grey.images == image).all(axis=(1, 2, 3)).sum() == 1
    }
    for subset in (
        {"max_images": 37},
        {"classes": [7, 2]},
        {"class_label": "color", "max_images": 50},
        {"select": lambda labels, num_classes: np.flatnonzero(labels == 4)},
    ):
        shapes = {} if "class_label" in subset else load(**subset, coloring="none").images
        part = load(**options, **subset).images
        everything = set(colors.values())
        for row, image in enumerate(part):
            if len(shapes):
                assert colors.get(shapes[row].tobytes(), image.tobytes()) == image.tobytes()
            else:
                assert image.tobytes() in everything


def test_some_classes_only() -> None:
    everything, some = load(), load(classes=["7", 2])
    assert some.class_names == ("7", "2")
    places = np.flatnonzero(np.isin(everything.labels, [7, 2]))
    assert np.array_equal(some.images, everything.images[places])
    assert names_of(some) == [str(label) for label in everything.labels[places]]
    few = load(classes=["7", 2], max_images=10)
    assert np.bincount(few.labels).tolist() == [5, 5]
    both = load(class_label="both", classes=["3 green", "4 rose"])
    assert set(painted(both)) == {"green", "rose"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": []}, "data.classes: must name at least 1 class, got none"),
        ({"classes": [10]}, "data.classes: must be in [0, 9], got 10"),
        ({"classes": [-1]}, "data.classes: must be in [0, 9], got -1"),
        ({"classes": ["3", 3]}, "data.classes: class '3' is there twice"),
        (
            {"classes": ["3 gren"], "class_label": "both"},
            "data.classes: unknown class '3 gren'; did you mean '3 green'? (known: 0 vermilion, ",
        ),
        (
            {"class_label": "colour"},
            "data.class_label: unknown class label 'colour'; did you mean 'color'?",
        ),
        (
            {"class_label": "both", "coloring": "none"},
            "data.class_label: both needs coloured images, got data.coloring: none (digits)",
        ),
        (
            {"attributes": ["Male"]},
            "data.attributes: only celeba has attributes, got data.name: digits",
        ),
        (
            {"color_correlation": 0.5},
            "data.color_correlation: needs data.coloring: correlated, got 0.5 and independent",
        ),
        (
            {"coloring": "correlated"},
            "data.color_correlation: must be given with data.coloring: correlated, got none",
        ),
    ],
)
def test_bad_choices(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}") as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_classes_that_a_split_does_not_have(tmp_path: Path) -> None:
    labels, names = np.array([0, 0, 1]), np.array(["here", "there", "nowhere"])
    images = np.zeros((3, 4, 4), np.uint8)
    both = {"images_test": images, "labels_test": labels}
    np.savez(tmp_path / "own.npz", images=images, labels=labels, class_names=names, **both)
    words = r"^data.classes: npz has no train image of nowhere$"
    with pytest.raises(ValueError, match=words):
        load_image_set("npz", split="train", root=tmp_path / "own.npz", classes=["nowhere"])


@pytest.mark.parametrize(
    ("data", "num_classes"),
    [
        ({}, 10),
        ({"class_label": "color"}, 10),
        ({"class_label": "both"}, 100),
        ({"class_label": "both", "classes": ["3 yellow", "4 magenta", 55]}, 3),
        ({"coloring": "correlated", "color_correlation": 0.5}, 10),
    ],
)
def test_a_server_without_images_knows_as_much(data: dict[str, Any], num_classes: int) -> None:
    config = config_from_mapping({"data": {"name": "digits", **data}})
    spec = build_image_spec(config)
    images = load_image_set("digits", split="test", **data)
    assert build_image_spec(config, images) == spec
    assert spec.num_classes == num_classes


def test_a_server_knows_the_groups_of_attributes() -> None:
    data: dict[str, Any] = {"name": "celeba", "attributes": ["Male", "Young", "Smiling"]}
    assert build_image_spec(config_from_mapping({"data": data})).num_classes == 8
    data["classes"] = [0, 7]
    assert build_image_spec(config_from_mapping({"data": data})).num_classes == 2


def test_attribute_classes_are_binary_numbers() -> None:
    known = ("A_b", "Male", "C")
    values = np.array([[a, b, c] for a in (1, 0) for b in (1, 0) for c in (1, 0)])
    labels, names = attribute_classes(values, known, known)
    assert labels.tolist() == list(range(8))
    assert names[0] == "a b, male, c"
    assert names[5] == "not a b, male, not c"
    labels, names = attribute_classes(values, known, ("C", "Male"))
    assert labels.tolist() == [0, 2, 1, 3] * 2
    assert names == ("c, male", "c, female", "not c, male", "not c, female")
