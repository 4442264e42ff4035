"""The shape of a run's images: all that the server needs to know of the data."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.imageset import ImageSet
from fedpdm.data.labelling import count_classes
from fedpdm.data.loading import load_split
from fedpdm.data.registry import data_set

__all__ = ["ImageSpec", "build_image_spec", "known_class_names"]


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
    """Shape and shift, from the registry where it knows the set, from the config where it states
    all of them (`data.channels`, `data.resolution`, `data.classes`), else from the images."""
    info = data_set(config.data.name)
    data = config.data
    known = info.channels
    if data.coloring is not None and info.colorable:
        known = 3 if data.coloring != "none" else (1 if info.is_known else None)
    stated = known or data.channels
    if images is None and not info.is_known and None in (stated, data.resolution, data.classes):
        images = _look_alikes(config)
    if images is not None:
        channels, height, width = images.images.shape[1:]
        if height != width:
            raise ConfigError(
                f"data.resolution: images are {height}x{width}, not square; set data.resolution"
            )
        num_classes, background = images.num_classes, images.background
    else:
        assert stated is not None
        channels = stated
        num_classes = count_classes(
            info.num_classes or 0,
            class_label=typing.cast(Any, data.class_label),
            attributes=data.attributes,
            classes=data.classes,
        )
        background = info.background
        height = data.resolution or info.resolution or 0
    if data.channels not in (None, channels):
        raise ConfigError(f"data.channels: must be {channels}, as images have, got {data.channels}")
    shift = config.privacy.shift
    return ImageSpec(
        channels=channels,
        resolution=height,
        num_classes=num_classes,
        shift=background if shift is None else shift,
    )


def _look_alikes(config: RunConfig) -> ImageSet:
    """Images whose shape the federation's have; `ConfigError` where a coordinator has none."""
    try:
        return load_split(config, "train")
    except (ValueError, OSError) as error:
        if config.run.simulation:
            raise
        raise ConfigError(
            f"{error}; or set data.classes, data.channels and data.resolution: then a coordinator "
            "needs no images"
        ) from None


def known_class_names(config: RunConfig) -> tuple[str, ...] | None:
    """Names of a run's classes by label: those that the config names, else those of the configured
    data set; None if that cannot be read here."""
    wanted = config.data.classes or ()
    named = tuple(each for each in wanted if isinstance(each, str))
    if named and len(named) == len(wanted):
        return named
    data = dataclasses.replace(config.data, max_images=1, download=False)
    try:
        return load_split(dataclasses.replace(config, data=data), "train").class_names
    except (ValueError, OSError):
        return None
