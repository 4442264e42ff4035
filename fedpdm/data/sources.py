"""Load a data set by name: which there are, and the one function that reads them all.

What a client's own images are (`image_folder`, `npz`) and the public sets come out alike, as
an `ImageSet` of uint8. Every choice that is made here (split, subset, colours) is fixed and
public, so two machines with the same files hold the same images in the same order.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.coloring import COLORINGS, Coloring, choose_colors, colorize
from fedpdm.data.imageset import ImageSet
from fedpdm.data.labelling import (
    CLASS_LABELS,
    ClassLabel,
    find_classes,
    keep_classes,
    label_by_color,
)
from fedpdm.data.own import read_image_folder, read_npz
from fedpdm.data.public import REQUIRED_FILES, read_digits, read_torchvision
from fedpdm.data.rawsplit import RawSplit, Split
from fedpdm.data.registry import DATASETS

__all__ = ["SPLITS", "load_image_set", "stratified_positions"]

SPLITS: Final[tuple[str, ...]] = ("train", "test")

_DEFAULT_COLORING: Final[Mapping[str, Coloring]] = {
    "digits": "by_label",
    "colored_mnist": "independent",
}
_EXPECTED_OWN: Final = {
    "image_folder": "train/<class>/*.png or <class>/*.png (data.root is that folder)",
    "npz": "arrays images and labels (data.root is that .npz file)",
}


def load_image_set(
    name: str,
    *,
    split: Split,
    root: str | os.PathLike[str] | None = None,
    resolution: int | None = None,
    coloring: Coloring | None = None,
    color_correlation: float | None = None,
    class_label: ClassLabel = "digit",
    attributes: Sequence[str] | None = None,
    classes: Sequence[int | str] | None = None,
    max_images: int | None = None,
    select: Callable[[NDArray[np.int64], int], NDArray[np.int64]] | None = None,
    download: bool = False,
) -> ImageSet:
    """Read one split of a data set.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test". `digits`, and own images without a split of their own, have
            a fixed public one (`read_digits`, `split_of`).
        root: folder in torchvision's layout; the folder of `image_folder`; the file of `npz`.
            Default: the environment variable FEDPDM_DATA. Not used by `digits`.
        resolution: height and width in pixels, >= 1: centre crop to a square, then antialiased
            bilinear resize. Default: as stored (CelebA: 64).
        coloring: "by_label", "correlated" or "independent" colour a one-channel set
            (`choose_colors`), "none" leaves it grey. Default: "by_label" for digits,
            "independent" for colored_mnist, "none" for the others. An image has the same colour
            whatever else is loaded.
        color_correlation: for "correlated" alone, in [0, 1].
        class_label: "digit", the set's own class; of coloured images also "color" or "both".
        attributes: for celeba alone: 1 to 4 attributes whose combinations are the classes.
            Default: Black_Hair and Male.
        classes: keep these classes only, by name or by number, and number them in this order.
        max_images: at most this many images, >= 1, chosen by `stratified_positions`; only
            these are decoded.
        select: instead of `max_images`, takes the labels (n,) of all images and the number of
            classes, and returns the positions of those that are wanted.
        download: let torchvision fetch missing files into `root`.

    Returns:
        The images in the order of the files, with `DATASETS[name].background`.

    Raises:
        ValueError: for a bad argument, an unreadable or unsuitable file, or no image at all.
        FileNotFoundError: for a missing folder or file; the line says how to get it.
        OSError: if a download fails.
    """
    _check_choice("data.name", name, DATASETS, what="data set")
    _check_choice("data.split", split, SPLITS, what="split")
    for key, number in (("resolution", resolution), ("max_images", max_images)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"data.{key}: must be a whole number of at least 1, got {number!r}")
    _check_choice("data.class_label", class_label, CLASS_LABELS, what="class label")
    if attributes is not None and name != "celeba":
        raise ValueError(f"data.attributes: only celeba has attributes, got data.name: {name}")
    chosen = _resolve_coloring(name, coloring)
    if class_label != "digit" and chosen == "none":
        raise ValueError(
            f"data.class_label: {class_label} needs coloured images, got data.coloring: none "
            f"({name})"
        )
    if color_correlation is not None and chosen != "correlated":
        raise ValueError(
            "data.color_correlation: needs data.coloring: correlated, "
            f"got {color_correlation:g} and {chosen}"
        )
    raw = _read_raw(
        name, split, root=root, resolution=resolution, attributes=attributes, download=download
    )
    if len(raw.labels) == 0:
        raise ValueError(f"data.root: {name} has no {split} image")
    labels, class_names = raw.labels, raw.class_names
    colors: NDArray[np.int64] | None = None
    if chosen != "none":
        colors = choose_colors(labels, coloring=chosen, split=split, correlation=color_correlation)
        labels, class_names = label_by_color(labels, colors, class_names, class_label=class_label)
    positions = np.arange(len(labels))
    if classes is not None:
        kept = find_classes(classes, class_names)
        positions, labels, class_names = keep_classes(labels, class_names, kept)
        if len(labels) == 0:
            raise ValueError(
                f"data.classes: {name} has no {split} image of {', '.join(class_names)}"
            )
    if select is not None:
        wanted = select(labels, len(class_names))
    elif max_images is not None:
        wanted = stratified_positions(labels, max_images=max_images)
    else:
        wanted = np.arange(len(labels))
    positions = positions[wanted]
    images = raw.read(positions, resolution)
    if colors is not None:
        images = colorize(images, colors[positions])
    return ImageSet(
        images=np.ascontiguousarray(images),
        labels=labels[wanted],
        class_names=class_names,
        background=DATASETS[name].background,
    )


def stratified_positions(labels: NDArray[np.int64], *, max_images: int) -> NDArray[np.int64]:
    """A fixed subset in which classes keep their shares, as far as whole numbers allow.

    The i-th image (i = 0, 1, ...) taken of a class of n has priority i / n; those of lowest
    priority are taken (Adams' method of apportionment), so that each class has one before any
    has two, and a smaller subset is part of a larger one. Within a class images are taken
    spread over the file: in order of the fractional parts of multiples of the golden ratio.

    Args:
        labels: (N,) int64.
        max_images: number of images wanted, >= 1.

    Returns:
        (min(N, max_images),) int64, ascending positions.

    Raises:
        ValueError: if `max_images` is below 1.
    """
    if max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}")
    golden = (5.0**0.5 - 1.0) / 2.0
    priority = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = len(members)
        order = np.argsort((np.arange(count) * golden) % 1.0, kind="stable")
        priority[members[order]] = np.arange(count) / count
    by_priority = np.lexsort((labels, priority))
    return np.sort(by_priority[:max_images]).astype(np.int64)


def _read_raw(
    name: str,
    split: Split,
    *,
    root: str | os.PathLike[str] | None,
    resolution: int | None,
    attributes: Sequence[str] | None,
    download: bool,
) -> RawSplit:
    if name == "digits":
        return read_digits(split)
    folder = _resolve_root(name, root)
    if name == "image_folder":
        return read_image_folder(folder, split, same_size=resolution is None)
    if name == "npz":
        return read_npz(folder, split)
    return read_torchvision(name, folder, split, attributes=attributes, download=download)


def _resolve_root(name: str, root: str | os.PathLike[str] | None) -> Path:
    given = root if root is not None else os.environ.get("FEDPDM_DATA") or None
    if given is None:
        fetch = "" if name in _EXPECTED_OWN else ", and data.download: true to fetch them"
        expected = _EXPECTED_OWN.get(name) or ", ".join(REQUIRED_FILES.get(name, ()))
        raise ValueError(
            f"data.root: {name} needs a folder with {expected}; "
            f"set data.root or the environment variable FEDPDM_DATA{fetch}"
        )
    return Path(given).expanduser()


def _resolve_coloring(name: str, coloring: Coloring | None) -> Coloring:
    if coloring is None:
        return _DEFAULT_COLORING.get(name, "none")
    _check_choice("data.coloring", coloring, COLORINGS, what="colouring")
    if name == "colored_mnist" and coloring == "none":
        raise ValueError("data.coloring: colored_mnist cannot be none; use data.name: mnist")
    if name in ("cifar10", "celeba") and coloring != "none":
        raise ValueError(f"data.coloring: {name} has colours already, got {coloring}")
    return coloring


def _check_choice(key: str, value: str, choices: Iterable[str], *, what: str) -> None:
    known = list(choices)
    if value in known:
        return
    close = difflib.get_close_matches(str(value), known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{key}: unknown {what} {value!r}{guess} (known: {', '.join(known)})")
