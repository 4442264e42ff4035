"""Labelled image sets: loading, resizing, colouring and scaling.

`load_image_set` gives an `ImageSet` of uint8 pixels; `normalize` scales a batch of them for
a model. `DATASETS` says what is known of each data set by name.
"""

from fedpdm.data.coloring import COLORINGS, PALETTE, colorize
from fedpdm.data.imageset import ImageSet, denormalize, normalize
from fedpdm.data.resizing import center_square, resize
from fedpdm.data.sources import DATASETS, SPLITS, DatasetInfo, load_image_set, stratified_positions

__all__ = [
    "COLORINGS",
    "DATASETS",
    "PALETTE",
    "SPLITS",
    "DatasetInfo",
    "ImageSet",
    "center_square",
    "colorize",
    "denormalize",
    "load_image_set",
    "normalize",
    "resize",
    "stratified_positions",
]
