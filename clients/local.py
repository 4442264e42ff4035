"""What one client has at hand: its images, its store, its part of the configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.build import ImageSpec, build_image_spec, build_partitions, load_split
from fedpdm.config import ConfigError, RunConfig, config_from_json, config_to_json
from fedpdm.data import ImageSet
from fedpdm.rng import Purpose, numpy_rng
from fedpdm.runs import RunDirectory
from fedpdm.runtime import run_config_of, run_root
from fedpdm.store import ClientStore

__all__ = ["LocalClient", "open_local_client"]


@dataclass(frozen=True, kw_only=True)
class LocalClient:
    """One client's private side.

    `images` are its raw images; `train` and `heldout` index them (int64). `reference` is the
    data set's public test split, None outside simulation.
    """

    client_id: int
    config: RunConfig
    spec: ImageSpec
    images: ImageSet
    train: np.ndarray
    heldout: np.ndarray
    majority: tuple[int, ...]
    minority: tuple[int, ...]
    store: ClientStore
    reference: ImageSet | None

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Class groups by name: majority and minority, or all where there is no minority."""
        if not self.minority:
            return {"all": self.majority}
        return {"majority": self.majority, "minority": self.minority}


@functools.lru_cache(maxsize=2)
def _simulated_data(config_json: str) -> tuple[ImageSet, ImageSet, tuple[Any, ...]]:
    """In simulation one party holds all data: load it once per process, split it identically."""
    config = config_from_json(config_json)
    train = load_split(config, "train")
    return train, load_split(config, "test"), build_partitions(config, train)


def split_heldout(
    num_images: int, *, fraction: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, int64, sorted; at least one image is for training."""
    order = numpy_rng(seed, Purpose.HOLDOUT, client=client).permutation(num_images)
    num_heldout = min(round(fraction * num_images), num_images - 1)
    return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])


def open_local_client(
    node_config: dict[str, Any], flower_run_config: dict[str, Any], run_id: int
) -> LocalClient:
    """The client that this node is.

    In simulation `partition-id` says which part of the configured data set it holds; elsewhere
    `node_config` gives `partition-id`, `data-dir` and `store-dir`.
    """
    config = run_config_of(flower_run_config)
    client_id = int(node_config["partition-id"])
    if config.run.simulation:
        train, test, partitions = _simulated_data(config_to_json(config))
        if client_id >= len(partitions):
            raise ConfigError(
                f"partition.num_clients: {len(partitions)}, but there is a client {client_id}; "
                "the federation must have as many nodes (num-supernodes)"
            )
        part = partitions[client_id]
        images, majority, minority = train.subset(part.indices), part.majority, part.minority
        reference: ImageSet | None = test
        store = RunDirectory(run_root(flower_run_config, config, run_id)).client_path(client_id)
    else:
        for key in ("data-dir", "store-dir"):
            if key not in node_config:
                raise ConfigError(f"node config: {key} is missing (client {client_id})")
        images = load_split(config, "train", root=Path(str(node_config["data-dir"])))
        majority, minority, reference = tuple(np.unique(images.labels).tolist()), (), None
        store = Path(str(node_config["store-dir"]))
    train_indices, heldout = split_heldout(
        len(images), fraction=config.data.holdout_fraction, seed=config.run.seed, client=client_id
    )
    return LocalClient(
        client_id=client_id,
        config=config,
        spec=build_image_spec(config, images),
        images=images,
        train=train_indices,
        heldout=heldout,
        majority=tuple(majority),
        minority=tuple(minority),
        store=ClientStore(store),
        reference=reference,
    )
