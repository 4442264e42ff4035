"""One client's images: each once, and which of them are for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.imageset import ImageSet
from fedpdm.data.partition import ClientPartition
from fedpdm.rng import Purpose, numpy_rng

__all__ = ["ClientImages", "client_images", "split_heldout"]


def split_heldout(
    num_images: int, *, fraction: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, int64, sorted; at least one image is for training."""
    order = numpy_rng(seed, Purpose.HOLDOUT, client=client).permutation(num_images)
    num_heldout = min(round(fraction * num_images), num_images - 1)
    return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientImages:
    """What a simulated client holds: `images` each once; `train`, `heldout` are positions there.

    `indices` int64 (N,) are the positions of `images` in the split that is shared out.
    """

    client_id: int
    images: ImageSet
    train: np.ndarray
    heldout: np.ndarray
    indices: np.ndarray
    majority: tuple[int, ...]
    minority: tuple[int, ...]

    @property
    def train_labels(self) -> np.ndarray:
        """int64 (n,) of the training images."""
        return self.images.labels[self.train]


def client_images(
    config: RunConfig, images: ImageSet, parts: Sequence[ClientPartition], client_id: int
) -> ClientImages:
    """Client `client_id`'s part of the `train` split `images`, which `parts` share out."""
    if not 0 <= client_id < len(parts):
        raise ConfigError(
            f"partition.num_clients: {len(parts)}, but there is a client {client_id}; "
            "the federation must have as many nodes (num-supernodes)"
        )
    part = parts[client_id]
    own, indices = images.subset(part.indices), part.indices
    first = own.distinct()
    if len(first) < len(own):
        own, indices = own.subset(first), indices[first]
    train, heldout = split_heldout(
        len(own), fraction=config.data.holdout_fraction, seed=config.run.seed, client=client_id
    )
    return ClientImages(
        client_id=client_id,
        images=own,
        train=train,
        heldout=heldout,
        indices=indices,
        majority=part.majority,
        minority=part.minority,
    )
