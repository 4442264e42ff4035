"""Readers of the public data sets: scikit-learn's digits, and those of torchvision.

Folders have torchvision's layout below the root. torchvision and scikit-learn are imported
only when a data set of theirs is read: both are slow to import.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.labelling import DEFAULT_ATTRIBUTES, attribute_classes
from fedpdm.data.rawsplit import ArrayReader, FileReader, RawSplit
from fedpdm.data.registry import BLACK, DataSet, Request

__all__ = ["CELEBA", "CIFAR10", "COLORED_MNIST", "DIGITS", "FASHION_MNIST", "MNIST"]

_CELEBA_RESOLUTION: Final = 64
_DIGITS_TEST_EVERY: Final = 5
_DIGIT_NAMES: Final = tuple(str(digit) for digit in range(10))
_IDX_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_MNIST_FILES: Final = tuple(f"MNIST/raw/{name}" for name in _IDX_FILES)
_FASHION_FILES: Final = tuple(f"FashionMNIST/raw/{name}" for name in _IDX_FILES)
_CIFAR10_FILES: Final = (
    *(f"cifar-10-batches-py/data_batch_{batch}" for batch in range(1, 6)),
    "cifar-10-batches-py/test_batch",
    "cifar-10-batches-py/batches.meta",
)
_CELEBA_FILES: Final = (
    "celeba/list_attr_celeba.txt",
    "celeba/identity_CelebA.txt",
    "celeba/list_bbox_celeba.txt",
    "celeba/list_landmarks_align_celeba.txt",
    "celeba/list_eval_partition.txt",
    "celeba/img_align_celeba",
)


def _read_digits(request: Request) -> RawSplit:
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
    keep = is_test if request.split == "test" else ~is_test
    pixels = np.rint(bunch.images[keep, None] * (255.0 / 16.0)).astype(np.uint8)
    return RawSplit(labels=labels[keep], class_names=_DIGIT_NAMES, read=ArrayReader(images=pixels))


def _read_mnist(request: Request, *, name: str) -> RawSplit:
    """MNIST, grey, for the set of this name."""
    from torchvision import datasets

    found = _open(datasets.MNIST, request, name=name, files=_MNIST_FILES)
    return _in_memory(found, found.data.numpy()[:, None], _DIGIT_NAMES)


def _read_fashion_mnist(request: Request) -> RawSplit:
    from torchvision import datasets

    found = _open(datasets.FashionMNIST, request, name="fashion_mnist", files=_FASHION_FILES)
    return _in_memory(found, found.data.numpy()[:, None], tuple(found.classes))


def _read_cifar10(request: Request) -> RawSplit:
    from torchvision import datasets

    found = _open(datasets.CIFAR10, request, name="cifar10", files=_CIFAR10_FILES)
    images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
    return _in_memory(found, images, tuple(found.classes))


def _in_memory(found: Any, images: NDArray[np.uint8], class_names: tuple[str, ...]) -> RawSplit:
    labels = np.asarray(found.targets, dtype=np.int64)
    return RawSplit(labels=labels, class_names=class_names, read=ArrayReader(images=images))


def _open(
    kind: Callable[..., Any], request: Request, *, name: str, files: tuple[str, ...], **split: Any
) -> Any:
    """A data set of torchvision; `split` are its keywords for the split, default: `train`.

    Raises:
        FileNotFoundError: if a file is missing; the line names it and says how to get it.
        ValueError: if the files are there but are not what torchvision expects.
        OSError: if a download fails.
    """
    root, download = request.path, request.download
    try:
        return kind(
            root=str(root), download=download, **(split or {"train": request.split == "train"})
        )
    except (
        RuntimeError,
        OSError,
        ValueError,
        AssertionError,
        EOFError,
        pickle.PickleError,
    ) as error:
        raise _explain(error, name=name, files=files, root=root, download=download) from error


def _explain(
    error: Exception, *, name: str, files: tuple[str, ...], root: Path, download: bool
) -> Exception:
    """One line for a failure inside torchvision."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if download:
        return OSError(f"data.download: {name} could not be fetched into {root}: {first_line}")
    missing = [file for file in files if not (root / file).exists()]
    if missing:
        return FileNotFoundError(
            f"data.root: {name} misses {', '.join(missing)} in {root}; set data.root or "
            "FEDPDM_DATA to the folder that holds them, or data.download: true to fetch them"
        )
    return ValueError(
        f"data.root: {name} has files in {root} that are not the original ones "
        f"(damaged or changed): {first_line}"
    )


def _read_celeba(request: Request) -> RawSplit:
    """CelebA with the combinations of some attributes as classes (docs/method.md, section 5).

    The attributes are Black_Hair and Male by default (`attribute_classes`). Of each image of
    178 x 218 pixels `resize` keeps the middle 178 x 178.
    """
    from torchvision import datasets

    dataset = _open(
        datasets.CelebA, request, name="celeba", files=_CELEBA_FILES, split=request.split
    )
    attributes = DEFAULT_ATTRIBUTES if request.attributes is None else request.attributes
    known = [name for name in dataset.attr_names if name]  # the header ends in a blank
    labels, names = attribute_classes(dataset.attr.numpy(), known, attributes)
    folder = request.path / "celeba" / "img_align_celeba"

    def decode(position: int) -> NDArray[np.uint8]:
        file = dataset.filename[position]
        try:
            picture, _ = dataset[position]
            return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.root: celeba misses image {file} in {folder}") from error
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"data.root: celeba image {file} in {folder} is unreadable: {error}"
            ) from error

    reader = FileReader(decode=decode, channels=3, resolution=_CELEBA_RESOLUTION)
    return RawSplit(labels=labels, class_names=names, read=reader)


DIGITS: Final = DataSet(
    read=_read_digits,
    description="scikit-learn's 1,797 scanned digits, coloured by label",
    num_classes=10,
    channels=3,
    resolution=8,
    background=BLACK,
    coloring="by_label",
    colorable=True,
    colored_by_place=True,
)
MNIST: Final = DataSet(
    read=functools.partial(_read_mnist, name="mnist"),
    description="MNIST digits, grey",
    num_classes=10,
    channels=1,
    resolution=28,
    background=BLACK,
    needs=", ".join(_MNIST_FILES),
    fetches=True,
    colorable=True,
    colored_by_place=True,
)
COLORED_MNIST: Final = dataclasses.replace(
    MNIST,
    read=functools.partial(_read_mnist, name="colored_mnist"),
    description="MNIST digits, each of an independent colour",
    channels=3,
    coloring="independent",
    grey="mnist",
)
FASHION_MNIST: Final = dataclasses.replace(
    MNIST,
    read=_read_fashion_mnist,
    description="Fashion-MNIST clothes, grey",
    needs=", ".join(_FASHION_FILES),
)
CIFAR10: Final = DataSet(
    read=_read_cifar10,
    description="CIFAR-10 photographs",
    num_classes=10,
    channels=3,
    resolution=32,
    needs=", ".join(_CIFAR10_FILES),
    fetches=True,
)
CELEBA: Final = DataSet(
    read=_read_celeba,
    description="CelebA faces, grouped by Black_Hair and Male",
    num_classes=4,
    channels=3,
    resolution=_CELEBA_RESOLUTION,
    needs=", ".join(_CELEBA_FILES),
    fetches=True,
    has_attributes=True,
)
