"""Which data sets there are, and what is known of each before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["DATASETS", "DatasetInfo"]

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
