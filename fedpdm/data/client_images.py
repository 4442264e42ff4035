"""One client's images: each once, and which of them are for training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.imageset import ImageSet
from fedpdm.data.members import MemberRecord, record_images
from fedpdm.data.partition import ClientPartition
from fedpdm.rng import Purpose, numpy_rng

__all__ = ["ClientImages", "client_images", "own_images", "split_heldout"]


def split_heldout(
    num_images: int, *, fraction: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, int64, sorted; at least one image is for training."""
    order = numpy_rng(seed, Purpose.HOLDOUT, client=client).permutation(num_images)
    num_heldout = min(round(fraction * num_images), num_images - 1)
    return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientImages:
    """What a client holds: `images` each once; `train`, `heldout` are positions there.

    `indices` int64 (N,) are the positions of `images` in the split that a simulation shares out,
    None for a client whose images are its own.
    """

    client_id: int
    images: ImageSet
    train: np.ndarray
    heldout: np.ndarray
    indices: np.ndarray | None
    majority: tuple[int, ...]
    minority: tuple[int, ...]

    @property
    def train_labels(self) -> np.ndarray:
        """int64 (n,) of the training images."""
        return self.images.labels[self.train]

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Class groups by name: majority and minority, or all where there is no minority."""
        if not self.minority:
            return {"all": self.majority}
        return {"majority": self.majority, "minority": self.minority}

    @functools.cached_property
    def members(self) -> MemberRecord | None:
        """What training draws from and what it leaves out; None outside a simulation."""
        if self.indices is None:
            return None
        every = record_images(self.images, self.indices)
        return MemberRecord(
            client_id=self.client_id,
            train=every.subset(self.train),
            heldout=every.subset(self.heldout),
        )


def own_images(
    config: RunConfig,
    images: ImageSet,
    *,
    client_id: int,
    indices: np.ndarray | None = None,
    part: ClientPartition | None = None,
) -> ClientImages:
    """A client's images, of equal ones the first, and which of them are for training.

    `part` says which classes are its majority in a simulation; elsewhere all that are there.
    """
    first = images.distinct()
    if len(first) < len(images):
        images = images.subset(first)
        indices = None if indices is None else indices[first]
    train, heldout = split_heldout(
        len(images), fraction=config.data.holdout_fraction, seed=config.run.seed, client=client_id
    )
    there = tuple(np.unique(images.labels).tolist())
    return ClientImages(
        client_id=client_id,
        images=images,
        train=train,
        heldout=heldout,
        indices=indices,
        majority=there if part is None else tuple(part.majority),
        minority=() if part is None else tuple(part.minority),
    )


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
    return own_images(
        config,
        images.subset(part.indices),
        client_id=client_id,
        indices=part.indices,
        part=part,
    )
