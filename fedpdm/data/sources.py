"""Load a data set by name: which there are, and the one function that reads them all.

What a client's own images are (`image_folder`, `npz`) and the public sets come out alike, as
an `ImageSet` of uint8. Every choice that is made here (split, subset, colours) is fixed and
public, so two machines with the same files hold the same images in the same order.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.coloring import COLORINGS, Coloring, colorize
from fedpdm.data.imageset import ImageSet
from fedpdm.data.own import read_image_folder, read_npz
from fedpdm.data.public import REQUIRED_FILES, read_digits, read_torchvision
from fedpdm.data.rawsplit import RawSplit, Split

__all__ = ["DATASETS", "SPLITS", "DatasetInfo", "load_image_set", "stratified_positions"]

SPLITS: Final[tuple[str, ...]] = ("train", "test")

_BLACK: Final = -1.0
_MID_GREY: Final = 0.0


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is read; None where only the files tell.

    Attributes:
        num_classes: number of classes.
        channels: channels of the loaded images (with the default colouring), 1 or 3.
        resolution: height and width in pixels, without `resolution`.
        background: public background level in [-1, 1], the default `shift`.
        description: one line for people.
    """

    num_classes: int | None
    channels: int | None
    resolution: int | None
    background: float
    description: str


def _info(
    num_classes: int | None,
    channels: int | None,
    resolution: int | None,
    background: float,
    description: str,
) -> DatasetInfo:
    return DatasetInfo(
        num_classes=num_classes,
        channels=channels,
        resolution=resolution,
        background=background,
        description=description,
    )


#: Data set name -> what is known of it.
DATASETS: Final[Mapping[str, DatasetInfo]] = MappingProxyType(
    {
        "digits": _info(10, 3, 8, _BLACK, "scikit-learn's 1,797 scanned digits, coloured by label"),
        "mnist": _info(10, 1, 28, _BLACK, "MNIST digits, grey"),
        "colored_mnist": _info(10, 3, 28, _BLACK, "MNIST digits, each of an independent colour"),
        "fashion_mnist": _info(10, 1, 28, _BLACK, "Fashion-MNIST clothes, grey"),
        "cifar10": _info(10, 3, 32, _MID_GREY, "CIFAR-10 photographs"),
        "celeba": _info(4, 3, 64, _MID_GREY, "CelebA faces, grouped by Black_Hair and Male"),
        "image_folder": _info(None, None, None, _MID_GREY, "own images, one folder per class"),
        "npz": _info(None, None, None, _MID_GREY, "own images, arrays in one .npz file"),
    }
)

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
    max_images: int | None = None,
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
        coloring: "by_label" or "independent" colour a one-channel set (`colorize`), "none"
            leaves it grey. Default: "by_label" for digits, "independent" for colored_mnist,
            "none" for the others.
        max_images: at most this many images, >= 1, chosen by `stratified_positions`; only
            these are decoded.
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
    chosen = _resolve_coloring(name, coloring)
    raw = _read_raw(name, split, root=root, resolution=resolution, download=download)
    if len(raw.labels) == 0:
        raise ValueError(f"data.root: {name} has no {split} image")
    if max_images is None:
        positions = np.arange(len(raw.labels))
    else:
        positions = stratified_positions(raw.labels, max_images=max_images)
    labels = raw.labels[positions]
    images = raw.read(positions, resolution)
    if chosen != "none":
        images = colorize(images, labels, coloring=chosen, split=split, positions=positions)
    return ImageSet(
        images=np.ascontiguousarray(images),
        labels=labels,
        class_names=raw.class_names,
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
    download: bool,
) -> RawSplit:
    if name == "digits":
        return read_digits(split)
    folder = _resolve_root(name, root)
    if name == "image_folder":
        return read_image_folder(folder, split, same_size=resolution is None)
    if name == "npz":
        return read_npz(folder, split)
    return read_torchvision(name, folder, split, download=download)


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
