"""The reader of a client's own images in one .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.rawsplit import ArrayReader, Inventory, RawSplit, Split, split_of
from fedpdm.data.registry import DataSet, Request

__all__ = ["NPZ", "read_npz"]

#: Names in MedMNIST's files -> names here.
_MEDMNIST: Final = {
    "train_images": "images",
    "train_labels": "labels",
    "test_images": "images_test",
    "test_labels": "labels_test",
}


def read_npz(path: Path, split: Split, *, whole: bool = False) -> RawSplit:
    """Read a .npz file of arrays; nothing in it is unpickled.

    Arrays: `images`, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; `labels`,
    integers (N,) or (N, 1); optional `class_names`, strings (K,), default "0", "1", ...; optional
    `images_test` and `labels_test`. Without these two the split is `split_of` each image's
    pixels, or with `whole` everything is for training. MedMNIST's names (`train_images`,
    `train_labels`, ...) are read as well; its `val_images` are not used.

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
    unused = []
    if "images" not in arrays and "train_images" in arrays:
        unused = [f"val_images ({len(arrays[k])})" for k in ("val_images",) if k in arrays]
        for old, new in _MEDMNIST.items():
            if old in arrays:
                arrays[new] = arrays.pop(old)
    has_test = "images_test" in arrays or "labels_test" in arrays
    parts = {part: _npz_part(path, arrays, part) for part in ("", "_test")[: 1 + has_test]}
    class_names = _npz_class_names(path, arrays, [labels for _, labels in parts.values()])
    images, labels = parts["_test" if has_test and split == "test" else ""]
    count = sum(len(each) for _, each in parts.values())
    if not has_test and whole:
        if split == "test":
            images, labels = images[:0], labels[:0]
    elif not has_test:
        flags = [split_of(np.ascontiguousarray(image).data) == split for image in images]
        keep = np.array(flags, dtype=bool)
        images, labels = images[keep], labels[keep]
    return RawSplit(
        labels=labels,
        class_names=class_names,
        read=ArrayReader(images=images),
        inventory=Inventory(unused=tuple(unused), set_aside=count - len(labels)),
    )


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
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
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


def _read_file(request: Request) -> RawSplit:
    return read_npz(request.path, request.split, whole=request.whole)


NPZ: Final = DataSet(
    read=_read_file,
    description="own images, arrays in one .npz file",
    needs="arrays images and labels (data.root is that .npz file)",
    clients_own=True,
    colorable=True,
)
