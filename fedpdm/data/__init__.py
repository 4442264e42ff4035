"""Labelled image sets: loading, resizing, colouring and scaling.

`load_image_set` gives an `ImageSet` of uint8 pixels; `normalize` scales a batch of them for
a model. `data_set` gives what is known of a data set, custom ones too. `partition` splits a
set over simulated clients, `members` records which images trained a model.

It imports `config`, `rng` and `storage`; `privacy` and everything above may import it.
"""

from fedpdm.data.coloring import COLOR_NAMES, PALETTE, choose_colors, colorize
from fedpdm.data.imageset import ImageSet, denormalize, normalize
from fedpdm.data.labelling import count_classes
from fedpdm.data.rawsplit import ArrayReader, RawSplit
from fedpdm.data.registry import DataSet, Request, data_set
from fedpdm.data.resizing import center_square, resize
from fedpdm.data.sources import SPLITS, load_image_set, stratified_positions

__all__ = [
    "COLOR_NAMES",
    "PALETTE",
    "SPLITS",
    "ArrayReader",
    "DataSet",
    "ImageSet",
    "RawSplit",
    "Request",
    "center_square",
    "choose_colors",
    "colorize",
    "count_classes",
    "data_set",
    "denormalize",
    "load_image_set",
    "normalize",
    "resize",
    "stratified_positions",
]
