"""What a server asks for, and the coarse update that a client computes from its release."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["CoarseUpdate", "Phase", "WireError"]


class WireError(ValueError):
    """A message that may not be sent, or cannot be accepted; one line."""


class Phase(enum.StrEnum):
    """What a client is asked for in a round of training, besides its own fine model."""

    COARSE = "coarse"  # local steps of the coarse model
    RELEASE = "release"  # its release itself
    GRADIENT = "gradient"  # a noised sum of gradients of the network
    FINE = "fine"  # nothing


@dataclass(frozen=True, kw_only=True)
class CoarseUpdate:
    """Coarse weights after local steps on one client's `ReleasedDataset`.

    `weights` maps parameter names to tensors; `num_examples` is the number of released
    images that the client holds (never the number of batches); `seeded` is that of the release.
    `basis` is `released`, or for baselines in simulation what else was trained on: `raw` or
    `dp_sgd`.
    """

    weights: Mapping[str, torch.Tensor]
    num_examples: int
    client_id: int
    round: int
    seeded: bool
    basis: str = "released"
