"""From a run configuration to images, and to who holds which of them."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet, load_image_set, stratified_positions
from fedpdm.data.partition import ClientPartition, partition, partition_record
from fedpdm.data.registry import data_set
from fedpdm.data.sources import draws_from_images, resolve_coloring
from fedpdm.rng import Purpose, numpy_rng

__all__ = ["build_partitions", "load_public", "load_split", "preparation_of", "record_partitions"]


def load_split(
    config: RunConfig, split: str, *, root: Path | None = None, whole: bool = False
) -> ImageSet:
    """The configured data set's `train` or `test` split, from `root` or the configured place.

    With `whole`, own images without a split of their own are all training images.
    """
    limit = config.data.max_images if split == "train" else config.evaluation.num_reference
    return _load(config, split, root=root, max_images=limit, whole=whole)


def preparation_of(config: RunConfig) -> dict[str, Any]:
    """What a config does to the pixels of an image: the keys of `data` that change them.

    A release records it. `colors_from` says where drawn colours come from: `image` or `place`;
    `files: as shown` that orientation and transparency count, which earlier versions left aside.
    """
    data = config.data
    known = data_set(data.name)
    coloring = resolve_coloring(data.name, known, typing.cast(Any, data.coloring))
    made: dict[str, Any] = {"resolution": data.resolution, "coloring": coloring}
    if coloring in ("correlated", "independent"):
        made["color_correlation"] = data.color_correlation
        made["colors_from"] = "image" if draws_from_images(known, coloring) else "place"
    if known.shows_files:
        made["files"] = "as shown"
        for key in ("background", "black", "white"):
            if (value := getattr(data, key)) is not None:
                made[key] = value
    return made


def load_public(config: RunConfig, *, count: int) -> ImageSet:
    """At most `count` training images that no client of the simulation holds, in class proportion.

    They are what `data.max_images` and `partition.balanced` leave over, so the choice depends on
    the config alone. `ConfigError` if nothing is left over or `count` is below 1.
    """
    if count < 1:
        raise ConfigError(f"public images: count must be at least 1, got {count}")

    def spare(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
        held = np.arange(len(labels))
        if config.data.max_images is not None:
            held = stratified_positions(labels, max_images=config.data.max_images)
        if config.partition.balanced:
            parts = _share_out(config, labels[held], num_classes)
            held = held[np.concatenate([part.indices for part in parts])]
        free = np.setdiff1d(np.arange(len(labels)), held)
        if not len(free):
            raise ConfigError(
                "data.max_images: every training image is held by a client; set it below "
                f"{len(labels)} to leave public ones, got {config.data.max_images or 'none'}"
            )
        return free[stratified_positions(labels[free], max_images=count)]

    return _load(config, "train", select=spare)


def _load(
    config: RunConfig,
    split: str,
    *,
    root: Path | None = None,
    max_images: int | None = None,
    select: Callable[[NDArray[np.int64], int], NDArray[np.int64]] | None = None,
    whole: bool = False,
) -> ImageSet:
    data = config.data
    configured = data.root or os.environ.get("FEDPDM_DATA")
    if root is None and configured:
        root = Path(configured)
    return load_image_set(
        data.name,
        split=typing.cast(Any, split),
        root=root,
        resolution=data.resolution,
        coloring=typing.cast(Any, data.coloring),
        color_correlation=data.color_correlation,
        class_label=typing.cast(Any, data.class_label),
        attributes=data.attributes,
        classes=data.classes,
        max_images=max_images,
        select=select,
        download=data.download,
        background=data.background,
        value_range=None if data.black is None else (data.black, typing.cast(float, data.white)),
        frames=typing.cast(Any, data.frames),
        whole=whole,
    )


def build_partitions(config: RunConfig, images: ImageSet) -> tuple[ClientPartition, ...]:
    """The split over clients; keys that another kind of split needs are left aside."""
    return _share_out(
        config, images.labels, images.num_classes, images.class_names, clients=images.clients
    )


def _share_out(
    config: RunConfig,
    labels: NDArray[np.int64],
    num_classes: int,
    class_names: Sequence[str] = (),
    *,
    clients: Sequence[str] | None = None,
) -> tuple[ClientPartition, ...]:
    section = config.partition
    return partition(
        labels,
        kind=typing.cast(Any, section.kind),
        num_clients=section.num_clients,
        num_classes=num_classes,
        balanced=section.balanced,
        class_names=class_names,
        rng=numpy_rng(config.run.seed, Purpose.PARTITION),
        owners=clients,
        **_own_parameters(config),
    )


def _own_parameters(config: RunConfig) -> dict[str, Any]:
    """The keys that the configured kind of split needs."""
    section = config.partition
    if section.kind == "dirichlet":
        return {"alpha": section.alpha}
    if section.kind == "majority_minority":
        return {
            "majority_classes": section.majority_classes,
            "majority_ratio": section.majority_ratio,
        }
    return {}


def record_partitions(
    config: RunConfig, images: ImageSet, partitions: Sequence[ClientPartition]
) -> dict[str, Any]:
    """`partition_record` with the settings of the split and the digest of the images that it is of.

    Written in simulation alone: counts and digests are computed from raw data.
    """
    return partition_record(
        partitions,
        images.labels,
        images.class_names,
        settings={
            "kind": config.partition.kind,
            "seed": config.run.seed,
            "num_clients": len(partitions),
            **_own_parameters(config),
            "balanced": config.partition.balanced,
            "images_sha256": images.digest(),
        },
    )
