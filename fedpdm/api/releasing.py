"""Settings, images, and what a client releases of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.config.reading import read_mapping
from fedpdm.config.suite import merge
from fedpdm.data import ImageSet
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.privacy.mechanism import released_images
from fedpdm.privacy.releases import ReleaseStore, SpentBudget
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.run_setup import set_up

__all__ = ["account", "configure", "load_images", "release", "share_out"]

PathLike = str | Path


def configure(path: PathLike | None = None, **sections: Any) -> RunConfig:
    """A run's settings: a YAML file's, with sections laid over them, and defaults for the rest.

    `configure("digits.yaml", privacy={"epsilon": 3})`; keys as in `fedpdm config`. `ConfigError`,
    one line with the key, for what is unknown, of a wrong type or out of range.
    """
    base: dict[str, Any] = {}
    if path is not None:
        base = read_mapping(Path(path))
        base.setdefault("name", Path(path).stem)
    return config_from_mapping(merge(base, sections))


def load_images(config: RunConfig, split: str = "train") -> ImageSet:
    """The configured data set's `train` or `test` split; `ValueError` or `OSError` if a file is
    missing or damaged (it is named)."""
    return load_split(config, split)


def share_out(config: RunConfig, images: ImageSet) -> tuple[ImageSet, ...]:
    """Each client's images by `config.partition`, equal ones once; as a simulation shares them."""
    parts = build_partitions(config, images)
    return tuple(
        client_images(config, images, parts, client).images for client in range(len(parts))
    )


def release(
    config: RunConfig,
    images: ImageSet,
    store: PathLike,
    *,
    client: int = 0,
    allow_new_release: bool = False,
) -> ReleasedDataset:
    """The images' release by `config.privacy`, rows in their order; noised now, or long ago.

    Args:
        config: settings; `run.simulation` says whether the noise is seeded.
        images: what the client holds; each is known, and pays, by its pixels as they came in
            (`ImageSet.identities`, or the pixels here).
        store: the client's own directory: releases, and the ledger that adds up what they cost.
            Images that it knows are handed out again and cost nothing.
        client: whose store it is.
        allow_new_release: noise known images once more if the settings differ; else refused.

    Raises:
        ConfigError: (a `ValueError`) for the config of a baseline, which releases nothing.
        StoreError: (a `ValueError`) for a store of another client or data set, a damaged one, or a
            second release that is not allowed; the store is as it was.
    """
    request = set_up(config, images).release_request(
        client=client, allow_new_release=allow_new_release
    )
    return released_images(ReleaseStore(Path(store)).obtain(images, request))


def account(store: PathLike, *, delta: float = 1e-5) -> SpentBudget:
    """What each image in a client's store has spent so far, from its ledger: exact epsilon at
    `delta`, all releases composed. Reads only."""
    return ReleaseStore(Path(store)).spent(delta=delta)
