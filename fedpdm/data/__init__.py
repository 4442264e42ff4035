"""Labelled image sets: loading, resizing, colouring and scaling.

`load_image_set` gives an `ImageSet` of uint8 pixels; `normalize` scales a batch of them for
a model. `DATASETS` says what is known of each data set by name. `partition` splits a set over
simulated clients, `members` records which images trained a model.

It imports `config`, `rng` and `storage`; `privacy` and everything above may import it.
"""

from fedpdm.data.coloring import COLOR_NAMES, COLORINGS, PALETTE, choose_colors, colorize
from fedpdm.data.imageset import ImageSet, denormalize, normalize
from fedpdm.data.labelling import CLASS_LABELS, count_classes
from fedpdm.data.registry import DATASETS, DatasetInfo
from fedpdm.data.resizing import center_square, resize
from fedpdm.data.sources import SPLITS, load_image_set, stratified_positions

__all__ = [
    "CLASS_LABELS",
    "COLORINGS",
    "COLOR_NAMES",
    "DATASETS",
    "PALETTE",
    "SPLITS",
    "DatasetInfo",
    "ImageSet",
    "center_square",
    "choose_colors",
    "colorize",
    "count_classes",
    "denormalize",
    "load_image_set",
    "normalize",
    "resize",
    "stratified_positions",
]
