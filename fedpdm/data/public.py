"""Readers of the public data sets: scikit-learn's digits, and those of torchvision.

Folders have torchvision's layout below the root. torchvision and scikit-learn are imported
only when a data set of theirs is read: both are slow to import.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.labelling import DEFAULT_ATTRIBUTES, attribute_classes
from fedpdm.data.rawsplit import ArrayReader, RawSplit, Split
from fedpdm.data.resizing import resize

__all__ = ["REQUIRED_FILES", "read_digits", "read_torchvision"]

_CELEBA_RESOLUTION: Final = 64
_DIGITS_TEST_EVERY: Final = 5
_DIGIT_NAMES: Final = tuple(str(digit) for digit in range(10))
_IDX_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

#: Files that each data set needs, relative to the root.
REQUIRED_FILES: Final[dict[str, tuple[str, ...]]] = {
    "mnist": tuple(f"MNIST/raw/{name}" for name in _IDX_FILES),
    "fashion_mnist": tuple(f"FashionMNIST/raw/{name}" for name in _IDX_FILES),
    "cifar10": (
        *(f"cifar-10-batches-py/data_batch_{batch}" for batch in range(1, 6)),
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
    ),
    "celeba": (
        "celeba/list_attr_celeba.txt",
        "celeba/identity_CelebA.txt",
        "celeba/list_bbox_celeba.txt",
        "celeba/list_landmarks_align_celeba.txt",
        "celeba/list_eval_partition.txt",
        "celeba/img_align_celeba",
    ),
}
REQUIRED_FILES["colored_mnist"] = REQUIRED_FILES["mnist"]


def read_digits(split: Split) -> RawSplit:
    """1,797 scanned digits of 8x8 pixels that come with scikit-learn (from UCI, Alpaydin 1998).

    Grey levels 0..16 are scaled to 0..255. In each class every fifth image, in scikit-learn's
    order, is a test image: 1,442 train and 355 test. Writers occur in both splits.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(len(_DIGIT_NAMES)):
        members = np.flatnonzero(labels == digit)
        is_test[members[_DIGITS_TEST_EVERY - 1 :: _DIGITS_TEST_EVERY]] = True
    keep = is_test if split == "test" else ~is_test
    pixels = np.rint(bunch.images[keep, None] * (255.0 / 16.0)).astype(np.uint8)
    return RawSplit(labels=labels[keep], class_names=_DIGIT_NAMES, read=ArrayReader(images=pixels))


def read_torchvision(
    name: str,
    root: Path,
    split: Split,
    *,
    attributes: Sequence[str] | None = None,
    download: bool,
) -> RawSplit:
    """Read `mnist`, `colored_mnist` (still grey), `fashion_mnist`, `cifar10` or `celeba`.

    `attributes` are those of `celeba` that make its classes (`attribute_classes`); default:
    Black_Hair and Male.

    Raises:
        FileNotFoundError: if a file is missing; the line names it and says how to get it.
        ValueError: if the files are there but are not what torchvision expects, or an attribute
            is not known.
        OSError: if a download fails.
    """
    from torchvision import datasets

    is_train = split == "train"
    arguments = {"root": str(root), "download": download}
    makers: dict[str, Callable[[], Any]] = {
        "mnist": lambda: datasets.MNIST(train=is_train, **arguments),
        "colored_mnist": lambda: datasets.MNIST(train=is_train, **arguments),
        "fashion_mnist": lambda: datasets.FashionMNIST(train=is_train, **arguments),
        "cifar10": lambda: datasets.CIFAR10(train=is_train, **arguments),
        "celeba": lambda: datasets.CelebA(split=split, **arguments),
    }
    try:
        dataset = makers[name]()
    except (
        RuntimeError,
        OSError,
        ValueError,
        AssertionError,
        EOFError,
        pickle.PickleError,
    ) as error:
        raise _explain(error, name=name, root=root, download=download) from error
    if name == "celeba":
        return _celeba_split(
            dataset, DEFAULT_ATTRIBUTES if attributes is None else attributes, root=root
        )
    if name == "cifar10":
        images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
        names = tuple(dataset.classes)
    else:
        images = dataset.data.numpy()[:, None]
        names = tuple(dataset.classes) if name == "fashion_mnist" else _DIGIT_NAMES
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return RawSplit(labels=labels, class_names=names, read=ArrayReader(images=images))


def _explain(error: Exception, *, name: str, root: Path, download: bool) -> Exception:
    """One line for a failure inside torchvision."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if download:
        return OSError(f"data.download: {name} could not be fetched into {root}: {first_line}")
    missing = [file for file in REQUIRED_FILES[name] if not (root / file).exists()]
    if missing:
        return FileNotFoundError(
            f"data.root: {name} misses {', '.join(missing)} in {root}; set data.root or "
            "FEDPDM_DATA to the folder that holds them, or data.download: true to fetch them"
        )
    return ValueError(
        f"data.root: {name} has files in {root} that are not the original ones "
        f"(damaged or changed): {first_line}"
    )


def _celeba_split(dataset: Any, attributes: Sequence[str], *, root: Path) -> RawSplit:
    """CelebA with the combinations of some attributes as classes (docs/method.md, section 5).

    Of each image of 178 x 218 pixels `resize` keeps the middle 178 x 178.
    """
    known = [name for name in dataset.attr_names if name]  # the header ends in a blank
    labels, names = attribute_classes(dataset.attr.numpy(), known, attributes)
    folder = root / "celeba" / "img_align_celeba"

    def read(positions: NDArray[np.int64], resolution: int | None) -> NDArray[np.uint8]:
        side = _CELEBA_RESOLUTION if resolution is None else resolution
        images = np.empty((len(positions), 3, side, side), dtype=np.uint8)
        for row, position in enumerate(positions):
            file = dataset.filename[int(position)]
            try:
                picture, _ = dataset[int(position)]
                pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"data.root: celeba misses image {file} in {folder}"
                ) from error
            except (OSError, SyntaxError) as error:
                raise ValueError(
                    f"data.root: celeba image {file} in {folder} is unreadable: {error}"
                ) from error
            images[row] = resize(pixels[None], resolution=side)[0]
        return images

    return RawSplit(labels=labels, class_names=names, read=read)
