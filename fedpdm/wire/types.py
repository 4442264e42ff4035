"""What a client computes from its release and sends: a coarse update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["CoarseUpdate"]


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
