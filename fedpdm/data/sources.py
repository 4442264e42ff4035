"""Load a data set by name: which there are, and the one function that reads them all.

What a client's own images are (`image_folder`, `npz`, ...) and the public sets come out alike, as
an `ImageSet` of uint8. Every choice that is made here (split, subset, colours) is fixed and
public, so two machines with the same files hold the same images in the same order.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.config.names import CLASS_LABELS, COLORINGS, FRAMES, ClassLabel, Coloring, Frames
from fedpdm.data.coloring import choose_colors, colorize
from fedpdm.data.imageset import ImageSet
from fedpdm.data.labelling import find_classes, keep_classes, label_by_color
from fedpdm.data.rawsplit import FileReader, RawSplit, Split
from fedpdm.data.registry import DataSet, Request, data_set

__all__ = [
    "SPLITS",
    "draws_from_images",
    "load_image_set",
    "resolve_coloring",
    "stratified_positions",
]

SPLITS: Final[tuple[str, ...]] = ("train", "test")


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
    background: float | None = None,
    value_range: Sequence[float] | None = None,
    frames: Frames = "refuse",
    whole: bool = False,
) -> ImageSet:
    """Read one split of a data set.

    Args:
        name: a name of `fedpdm.config.names.DATA_SETS`, or `package.module:NAME`.
        split: "train" or "test". `digits`, and own images without a split of their own, have
            a fixed public one (`public.DIGITS`, `split_of`).
        root: folder in torchvision's layout; the folder of `image_folder`; the file of `npz`.
            Default: the environment variable FEDPDM_DATA. Not used by `digits`.
        resolution: height and width in pixels, >= 1: centre crop to a square, then antialiased
            bilinear resize. Default: as stored (CelebA: 64).
        coloring: "by_label", "correlated" or "independent" colour a one-channel set
            (`choose_colors`), "none" leaves it grey. Default: "by_label" for digits,
            "independent" for colored_mnist, "none" for the others. An image has the same colour
            whatever else is loaded; in a client's own set whatever else is there.
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
        background: of own files, level in [-1, 1] behind what is transparent, and the `background`
            of the images. Default: that of `data_set(name)`.
        value_range: of own files of more than 8 bits, the stored values that become black and
            white, `data.black` and `data.white`.
        frames: of own files, whether one with several is refused ("refuse"), or gives its "first"
            frame, or "all".
        whole: own images without a split of their own are all training images.

    Returns:
        The images in the order of the files, with the `background` of `data_set(name)`, each known
        by what it was before anything was done to it.

    Raises:
        ValueError: for a bad argument, an unreadable or unsuitable file, or no image at all.
        FileNotFoundError: for a missing folder or file; the line says how to get it.
        OSError: if a download fails.
    """
    known = data_set(name)
    _check_choice("data.split", split, SPLITS, what="split")
    for key, number in (("resolution", resolution), ("max_images", max_images)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"data.{key}: must be a whole number of at least 1, got {number!r}")
    _check_choice("data.class_label", class_label, CLASS_LABELS, what="class label")
    if attributes is not None and not known.has_attributes:
        raise ValueError(f"data.attributes: only celeba has attributes, got data.name: {name}")
    chosen = resolve_coloring(name, known, coloring)
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
    if not known.shows_files:
        _check_plain(name, background=background, black=value_range, frames=frames)
    _check_choice("data.frames", frames, FRAMES, what="way")
    level = known.background if background is None else background
    limits = None if value_range is None else (float(value_range[0]), float(value_range[1]))
    raw = known.read(
        Request(
            split=split,
            root=_resolve_root(name, known, root),
            resolution=resolution,
            attributes=attributes,
            download=download,
            background=level,
            value_range=limits,
            frames=frames,
            whole=whole,
        )
    )
    _check_raw(name, known, raw, attributes=attributes is not None)
    if len(raw.labels) == 0:
        rest = raw.inventory.words(split=split)
        raise ValueError(f"data.root: {name} has no {split} image{rest and f'; {rest}'}")
    labels, class_names = raw.labels, raw.class_names
    colors: NDArray[np.int64] | None = None
    of_image = draws_from_images(known, chosen)
    if chosen != "none" and not (of_image and class_label == "digit"):
        colors = choose_colors(
            labels,
            coloring=chosen,
            split=split,
            identities=raw.identities() if of_image else None,
            correlation=color_correlation,
        )
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
    images, identities = raw.load(positions, resolution)
    if chosen != "none":
        wanted_colors = (
            colors[positions]
            if colors is not None
            else choose_colors(
                raw.labels[positions],
                coloring=chosen,
                identities=identities,
                correlation=color_correlation,
            )
        )
        images = colorize(images, wanted_colors)
    return ImageSet(
        images=np.ascontiguousarray(images),
        labels=labels[wanted],
        class_names=class_names,
        background=level,
        identities=identities,
        altered=_altered(raw, positions),
        clients=_chosen(raw.clients, positions),
        subjects=_chosen(raw.subjects, positions),
        inventory=replace(raw.inventory, left_out=len(raw.labels) - len(positions)),
    )


def _altered(raw: RawSplit, positions: NDArray[np.int64]) -> tuple[bool, ...] | None:
    found = raw.read.altered if isinstance(raw.read, FileReader) else set[int]()
    return tuple(position in found for position in positions.tolist()) if found else None


def _chosen(names: tuple[str, ...] | None, positions: NDArray[np.int64]) -> tuple[str, ...] | None:
    return None if names is None else tuple(names[position] for position in positions.tolist())


def _check_plain(name: str, **settings: Any) -> None:
    """`ValueError` for a key that is for own image files alone."""
    for key, value in settings.items():
        if value not in (None, "refuse"):
            raise ValueError(f"data.{key}: is for own image files, got data.name: {name}")


def draws_from_images(known: DataSet, coloring: Coloring) -> bool:
    """Whether colours are drawn, and each from its image itself."""
    return coloring in ("correlated", "independent") and not known.colored_by_place


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


def _resolve_root(name: str, known: DataSet, root: str | os.PathLike[str] | None) -> Path | None:
    if not known.needs:
        return None
    given = root if root is not None else os.environ.get("FEDPDM_DATA") or None
    if given is None:
        fetch = ", and data.download: true to fetch them" if known.fetches else ""
        raise ValueError(
            f"data.root: {name} needs a folder with {known.needs}; "
            f"set data.root or the environment variable FEDPDM_DATA{fetch}"
        )
    return Path(given).expanduser()


def resolve_coloring(name: str, known: DataSet, coloring: Coloring | None) -> Coloring:
    """The colouring of a set, its default where none is given; `ValueError` if it has none such."""
    if coloring is None:
        return known.coloring
    _check_choice("data.coloring", coloring, COLORINGS, what="colouring")
    if known.grey is not None and coloring == "none":
        raise ValueError(f"data.coloring: {name} cannot be none; use data.name: {known.grey}")
    if not known.colorable and coloring != "none":
        raise ValueError(f"data.coloring: {name} has colours already, got {coloring}")
    return coloring


def _check_raw(name: str, known: DataSet, raw: RawSplit, *, attributes: bool) -> None:
    """`ValueError` for a reader that reads something other than what its set says."""
    count = len(raw.class_names)
    if known.num_classes is not None and not attributes and count != known.num_classes:
        raise ValueError(f"data.name: {name} has {known.num_classes} classes, {count} were read")


def _check_choice(key: str, value: str, choices: Iterable[str], *, what: str) -> None:
    known = list(choices)
    if value in known:
        return
    close = difflib.get_close_matches(str(value), known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{key}: unknown {what} {value!r}{guess} (known: {', '.join(known)})")
