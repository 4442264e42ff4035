"""Names that a configuration may say and that mean something in rooms above this one.

Each set of names has one owner: this module, or `fedpdm.diffusion.names`, `presets` and
`weightings` for that room, which lies below. The schema offers them, the rooms read them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

__all__ = [
    "CLASS_LABELS",
    "COLORINGS",
    "DATA_SETS",
    "ENCODINGS",
    "FRAMES",
    "PARTITIONS",
    "ClassLabel",
    "Coloring",
    "Frames",
    "PartitionKind",
]

#: Short name of a data set -> where it is registered, a `fedpdm.data.registry.DataSet`.
DATA_SETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "digits": "fedpdm.data.public:DIGITS",
        "mnist": "fedpdm.data.public:MNIST",
        "colored_mnist": "fedpdm.data.public:COLORED_MNIST",
        "fashion_mnist": "fedpdm.data.public:FASHION_MNIST",
        "cifar10": "fedpdm.data.public:CIFAR10",
        "celeba": "fedpdm.data.public:CELEBA",
        "image_folder": "fedpdm.data.own:IMAGE_FOLDER",
        "client_folders": "fedpdm.data.own:CLIENT_FOLDERS",
        "parquet": "fedpdm.data.parquet:PARQUET",
        "npz": "fedpdm.data.arrays:NPZ",
    }
)

Coloring = Literal["by_label", "correlated", "independent", "none"]
COLORINGS: Final[tuple[str, ...]] = get_args(Coloring)

#: `digit` is the set's own class, whatever the set; `both` is one class per class and colour.
ClassLabel = Literal["digit", "color", "both"]
CLASS_LABELS: Final[tuple[str, ...]] = get_args(ClassLabel)

#: A file of several frames is refused, or its first frame is an image, or all are.
Frames = Literal["refuse", "first", "all"]
FRAMES: Final[tuple[str, ...]] = get_args(Frames)

PartitionKind = Literal["iid", "dirichlet", "majority_minority", "own", "given"]
PARTITIONS: Final[tuple[str, ...]] = get_args(PartitionKind)

#: Numbers in messages.
ENCODINGS: Final = ("float32", "bfloat16", "int8")
