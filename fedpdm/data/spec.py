"""The shape of a run's images: all that the server needs to know of the data."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.imageset import ImageSet
from fedpdm.data.labelling import count_classes
from fedpdm.data.loading import load_split
from fedpdm.data.registry import data_set

__all__ = ["ImageSpec", "build_image_spec"]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Shape of the images, and the public shift: all that the server needs to know of the data."""

    channels: int
    resolution: int
    num_classes: int
    shift: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.resolution, self.resolution)


def build_image_spec(config: RunConfig, images: ImageSet | None = None) -> ImageSpec:
    """Shape and shift, from the registry where it knows the set, else from the images."""
    info = data_set(config.data.name)
    if images is None and not info.is_known:
        images = load_split(config, "train")
    if images is not None:
        channels, height, width = images.images.shape[1:]
        if height != width:
            raise ConfigError(
                f"data.resolution: images are {height}x{width}, not square; set data.resolution"
            )
        num_classes, background = images.num_classes, images.background
    else:
        assert info.channels is not None
        assert info.num_classes is not None
        coloring = config.data.coloring
        channels = info.channels
        if coloring is not None and info.colorable:
            channels = 1 if coloring == "none" else 3
        num_classes = count_classes(
            info.num_classes,
            class_label=typing.cast(Any, config.data.class_label),
            attributes=config.data.attributes,
            classes=config.data.classes,
        )
        background = info.background
        height = config.data.resolution or info.resolution or 0
    shift = config.privacy.shift
    return ImageSpec(
        channels=channels,
        resolution=height,
        num_classes=num_classes,
        shift=background if shift is None else shift,
    )
