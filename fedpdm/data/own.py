"""Readers of a client's own images: a folder of image files, or one .npz file."""

from __future__ import annotations

import contextlib
import functools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.rawsplit import ArrayReader, FileReader, RawSplit, Split, split_of
from fedpdm.data.registry import DataSet, Request

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_FOLDER", "IMAGE_SUFFIXES", "NPZ", "read_image_folder", "read_npz"]

#: File name endings, in any case, that count as images; other files are passed over.
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_GREY_MODES: Final = ("1", "L")
_COLOR_MODES: Final = ("RGB", "RGBA", "RGBX", "P", "LA", "PA", "CMYK", "YCbCr")


def read_image_folder(root: Path, split: Split, *, same_size: bool) -> RawSplit:
    """Read `root/train/<class>/*` and `root/test/<class>/*`, or `root/<class>/*`.

    Without a train or test folder the split is `split_of` each file's bytes. Classes are the
    folder names of both splits in alphabetical order; an empty folder still is a class, so
    that clients can agree on the classes while some hold no image of one. Names that begin
    with a dot and files of other types are passed over. Images are RGB unless every file of
    both splits is grey; transparency and orientation tags are ignored.

    Args:
        root: the folder.
        split: which part.
        same_size: whether differing sizes are an error (no resolution was given).

    Raises:
        FileNotFoundError: if `root`, the split's folder or a class folder is missing.
        ValueError: if an image is unreadable or not 8-bit, or sizes differ; names the files.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: image_folder has no folder {root}")
    parts = {part: root / part for part in ("train", "test") if (root / part).is_dir()}
    if parts and split not in parts:
        raise FileNotFoundError(f"data.root: image_folder has no folder {root / split}")
    class_names = tuple(
        sorted({folder for part in parts.values() or (root,) for folder in _class_folders(part)})
    )
    if not class_names:
        raise FileNotFoundError(
            f"data.root: image_folder expects {root}/train/<class>/*.png or "
            f"{root}/<class>/*.png, found no class folder"
        )
    labelled = [
        (part, label, file)
        for part, folder in (parts or {"": root}).items()
        for label, name in enumerate(class_names)
        for file in _image_files(folder / name)
    ]
    is_grey = _all_grey([file for _, _, file in labelled], same_size=same_size)
    chosen = [
        (label, file)
        for part, label, file in labelled
        if (part or split_of(file.read_bytes())) == split
    ]
    return RawSplit(
        labels=np.array([label for label, _ in chosen], dtype=np.int64),
        class_names=class_names,
        read=FileReader(
            decode=functools.partial(_decode_one_of, tuple(file for _, file in chosen)),
            channels=1 if is_grey else 3,
        ),
    )


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]


def _image_files(folder: Path) -> list[Path]:
    """Image files in order of their names; none where the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and entry.name[0] != "." and entry.is_file()
    )


def _all_grey(files: list[Path], *, same_size: bool) -> bool:
    """Whether every file is grey, from the headers alone; checks modes and sizes on the way."""
    is_grey = True
    first: tuple[Path, tuple[int, int]] | None = None
    for file in files:
        with _opened(file) as picture:
            mode, size = picture.mode, picture.size
        if mode not in _GREY_MODES + _COLOR_MODES:
            raise ValueError(f"data.root: {file} must have 8 bits per channel, got mode {mode}")
        is_grey = is_grey and mode in _GREY_MODES
        first = first or (file, size)
        if same_size and size != first[1]:
            raise ValueError(
                f"data.root: images differ in size, {first[0]} is {_describe(first[1])} and "
                f"{file} is {_describe(size)}; set data.resolution to resize them"
            )
    return is_grey


def _describe(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image file, for reading; `ValueError` if it is none, damaged, or too large."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit
            with Image.open(file) as picture:
                yield picture
    except Image.DecompressionBombError as error:
        raise ValueError(f"data.root: {file} is too large to be read: {error}") from None
    except MemoryError:
        raise ValueError(f"data.root: {file} is larger than the free memory") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data.root: {file} is not a readable image: {error}") from error


def _decode_one_of(files: tuple[Path, ...], position: int) -> NDArray[np.uint8]:
    """(C, H, W) uint8 of one image file: grey where that file is, whatever the others are."""
    with _opened(files[position]) as picture:
        if picture.mode in _GREY_MODES:
            return np.asarray(picture.convert("L"))[None]
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def read_npz(path: Path, split: Split) -> RawSplit:
    """Read a .npz file of arrays; nothing in it is unpickled.

    Arrays: `images`, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; `labels`,
    integers (N,); optional `class_names`, strings (K,), default "0", "1", ...; optional
    `images_test` and `labels_test`. Without these two the split is `split_of` each image's
    pixels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a .npz file, an array is missing, has another type or shape,
            or a label is out of range.
    """
    if not path.exists():
        raise FileNotFoundError(f"data.root: npz has no file {path}")
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"data.root: npz must be a .npz file, got {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.root: {path} is not a readable .npz file: {error}") from error
    has_test = "images_test" in arrays or "labels_test" in arrays
    parts = {part: _npz_part(path, arrays, part) for part in ("", "_test")[: 1 + has_test]}
    class_names = _npz_class_names(path, arrays, [labels for _, labels in parts.values()])
    images, labels = parts["_test" if has_test and split == "test" else ""]
    if not has_test:
        flags = [split_of(np.ascontiguousarray(image).data) == split for image in images]
        keep = np.array(flags, dtype=bool)
        images, labels = images[keep], labels[keep]
    return RawSplit(labels=labels, class_names=class_names, read=ArrayReader(images=images))


def _npz_part(
    path: Path, arrays: dict[str, NDArray[np.generic]], suffix: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, C, H, W) and labels (N,) of one part of the file."""
    for key in (f"images{suffix}", f"labels{suffix}"):
        if key not in arrays:
            raise ValueError(f"data.root: {path} must hold {key}, holds {', '.join(arrays)}")
    images, labels = arrays[f"images{suffix}"], arrays[f"labels{suffix}"]
    where = f"data.root: {path}: images{suffix}"
    if images.dtype != np.uint8:
        raise ValueError(f"{where} must be uint8, got {images.dtype}")
    pixels = images.astype(np.uint8, copy=False)
    first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    last = pixels.ndim == 4 and pixels.shape[3] in (1, 3)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif last and not first:
        pixels = pixels.transpose(0, 3, 1, 2)
    elif not first or last:
        raise ValueError(
            f"{where} must have shape (N, H, W), or (N, H, W, C) or (N, C, H, W) with one axis "
            f"C of 1 or 3, got shape {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"data.root: {path}: labels{suffix} must be integers of shape ({len(images)},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    return pixels, labels.astype(np.int64)


def _npz_class_names(
    path: Path, arrays: dict[str, NDArray[np.generic]], labels: list[NDArray[np.int64]]
) -> tuple[str, ...]:
    """Names from the file, or the numbers up to the largest label of both parts."""
    named = arrays.get("class_names")
    if named is not None and (named.dtype.kind != "U" or named.ndim != 1):
        raise ValueError(
            f"data.root: {path}: class_names must be strings of shape (K,), "
            f"got {named.dtype} of shape {named.shape}"
        )
    highest = max(int(part.max(initial=0)) for part in labels)
    count = highest + 1 if named is None else len(named)
    for suffix, part in zip(("", "_test"), labels, strict=False):
        outside = np.flatnonzero((part < 0) | (part >= count))
        if outside.size:
            at = int(outside[0])
            raise ValueError(
                f"data.root: {path}: labels{suffix}[{at}] must be in [0, {count}), got {part[at]}"
            )
    return tuple(str(k) for k in range(count)) if named is None else tuple(map(str, named))


def _read_folder(request: Request) -> RawSplit:
    return read_image_folder(request.path, request.split, same_size=request.resolution is None)


def _read_file(request: Request) -> RawSplit:
    return read_npz(request.path, request.split)


IMAGE_FOLDER: Final = DataSet(
    read=_read_folder,
    description="own images, one folder per class",
    needs="train/<class>/*.png or <class>/*.png (data.root is that folder)",
    clients_own=True,
    colorable=True,
)
NPZ: Final = DataSet(
    read=_read_file,
    description="own images, arrays in one .npz file",
    needs="arrays images and labels (data.root is that .npz file)",
    clients_own=True,
    colorable=True,
)
