"""Checks before a run starts: everything that can be refused is refused here, in one line.

Nothing is written, so a refused run leaves the disk as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.data.partition import ClientPartition
from fedpdm.data.registry import data_set
from fedpdm.data.spec import build_image_spec
from fedpdm.diffusion.training import select_device
from fedpdm.engines.run_checks import (
    check_models,
    check_place,
    check_writable,
    nearest_folder,
)
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.chosen import find_preset
from fedpdm.setup.continuing import schedule_lines
from fedpdm.setup.run_setup import RunSetup, set_up_for
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["check_run"]

_NAMES_SHOWN = 12


def check_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    releases: Path | None = None,
    allow_new_release: bool = False,
) -> list[str]:
    """Load the data, split it, calibrate, build the models; returns lines that say what will run.

    Clients' release stores are opened and asked whether they would do what the run needs.

    Raises `ConfigError` or `ValueError` (one line) for whatever would stop the run later.
    """
    if not config.run.simulation:
        raise ConfigError("run.simulation: false needs a deployed federation, not fedpdm run")
    check_place(config, out, resume=resume)
    device = select_device(config.run.device)
    images = load_split(config, "train")
    test = load_split(config, "test")
    partitions = build_partitions(config, images)
    _check_reference(config, test, partitions)
    spec = build_image_spec(config, images)
    _check_groups(config, images, partitions)
    models = check_models(set_up_for(config, spec))
    _check_space(config, out, models.sizes, num_bytes=4 * images.images.size)
    if releases is not None:
        check_writable(releases)
    again = []
    if config.kind.releases:
        again = _check_releases(
            images,
            partitions,
            {part.client_id: _release_root(out, releases, part.client_id) for part in partitions},
            setup=models.setup,
            allow_new_release=allow_new_release,
        )
    counts = [len(part.indices) for part in partitions]
    left_out = len(images) - sum(counts)
    return [
        f"{config.name}: {len(images)} images of {config.data.name} "
        f"({spec.channels}x{spec.resolution}x{spec.resolution}, {spec.num_classes} classes), "
        f"{len(counts)} clients with {min(counts)} to {max(counts)} images"
        + (f", {left_out} left out to balance the classes" if left_out else ""),
        *_beside(config, images),
        *models.lines(where=f", on {device}", images=max(counts)),
        *(schedule_lines(config) if resume else ()),
        f"run directory: {out}",
        *_notes(config, spec.resolution),
        *again,
    ]


def _beside(config: RunConfig, images: ImageSet) -> list[str]:
    """What else lies where own images are read: nothing is skipped silently."""
    words = images.inventory.words()
    return (
        [f"{config.data.name}: {words}"] if words and data_set(config.data.name).clients_own else []
    )


def _release_root(out: Path, releases: Path | None, client: int) -> Path:
    return (releases / str(client)) if releases else RunDirectory(out).client_path(client)


def _check_releases(
    images: ImageSet,
    partitions: Sequence[ClientPartition],
    roots: Mapping[int, Path],
    *,
    setup: RunSetup,
    allow_new_release: bool,
) -> list[str]:
    """Ask existing stores what the run would do to them; `StoreError` if one refuses.

    Returns a line that says what images will pay if some are to be noised once more.
    """
    previews = []
    for part in partitions:
        store = ReleaseStore(roots[part.client_id])
        store.check_traces()
        if not store.ledger().records:
            continue
        request = setup.release_request(client=part.client_id, allow_new_release=allow_new_release)
        previews.append(store.preview(images.subset(part.indices), request))
    num_again = sum(preview.again for preview in previews)
    if not num_again:
        return []
    worst = max(previews, key=lambda preview: preview.epsilon_after)
    return [
        f"NEW RELEASE of {num_again} released images: epsilon of an image goes up to "
        f"{worst.epsilon_after:.4g} (from {worst.epsilon_before:.4g}) at delta "
        f"{setup.config.privacy.delta:g}"
    ]


def _check_groups(
    config: RunConfig, images: ImageSet, partitions: Sequence[ClientPartition]
) -> None:
    """Refuse a client that has no training image of its majority or minority classes.

    Copies of an image and those held out do not count. Kinds of split other than
    majority_minority may leave a client without a class.
    """
    if config.partition.kind != "majority_minority":
        return
    for part in partitions:
        own = client_images(config, images, partitions, part.client_id)
        there = set(own.images.labels[own.train].tolist())
        for name, group in (("majority", part.majority), ("minority", part.minority)):
            if group and not there & set(group):
                names = ", ".join(images.class_names[k] for k in group[:_NAMES_SHOWN])
                more = ", ..." if len(group) > _NAMES_SHOWN else ""
                raise ConfigError(
                    f"partition: client {part.client_id} has no training image of its {name} "
                    f"classes ({names}{more}): {len(own.images)} distinct images, "
                    f"{len(own.heldout)} held out; give it more images or lower "
                    "partition.majority_ratio or data.holdout_fraction"
                )


def _notes(config: RunConfig, resolution: int) -> list[str]:
    """Notes on settings that work but are meant for other images."""
    notes = []
    for role, section in (("coarse", config.coarse), ("fine", config.fine)):
        low, high = find_preset(config, role).resolutions
        if not low <= resolution <= high:
            notes.append(
                f"note: {role}.preset {section.preset} is meant for images of {low} to {high} "
                f"pixels, these have {resolution}"
            )
    return notes


def _check_reference(
    config: RunConfig, test: ImageSet, partitions: Sequence[ClientPartition]
) -> None:
    """Refuse image metrics without test images to measure against."""
    if not config.evaluation.image_metrics:
        return
    if len(test) < 5:
        raise ConfigError(
            f"evaluation.image_metrics: need at least 5 test images, got {len(test)}; "
            "set it to false"
        )
    for part in partitions:
        for group in filter(None, (part.majority, part.minority)):
            count = int(np.isin(test.labels, group).sum())
            if count < 2:
                raise ConfigError(
                    f"evaluation.image_metrics: need at least 2 test images of classes {group} "
                    f"(client {part.client_id}), got {count}; set it to false"
                )


def _check_space(config: RunConfig, out: Path, sizes: dict[str, int], *, num_bytes: int) -> None:
    """Refuse a run whose stores would not fit on the disk."""
    per_client = 4 * (3 * (3 * sizes["fine"] + sizes["fine"]) + 3 * 3 * sizes["coarse"])
    needed = config.partition.num_clients * per_client + 16 * sizes["coarse"] + 2 * num_bytes
    free = shutil.disk_usage(nearest_folder(out)).free
    if free < needed:
        raise ConfigError(
            f"{out}: the run needs about {needed / 1e9:.1f} GB of disk space, "
            f"{free / 1e9:.1f} GB are free"
        )
