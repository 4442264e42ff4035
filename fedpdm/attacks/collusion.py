"""Collusion: everybody else's published models together against one client.

A client's fine model has seen its own images only, and the coarse model releases only. So all other
clients' published fine models should tell nothing about a client beyond what the coarse one tells.
The colluders pool what they have:

* reconstruction: the mean of the models' x0_hat (`PooledDenoiser`), and each model by itself;
* membership: the sum of the models' standardised scores (`pooled_scores`), against the coarse
  model's alone (`roc.auc_difference`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.denoising import Reconstructor

__all__ = ["PooledDenoiser", "pooled_scores"]

Array = NDArray[np.float64]


class PooledDenoiser:
    """The mean of several attackers' x0_hat: a `DenoisingFunction` for t from 1 to T.

    Each is asked as it is when alone: at the nearest level it knows, with its own flag, with labels
    or without.

    Args:
        members: not noise-to-noise, and all with clipped answers or all without.
        generator: on the CPU; the noise up to the level of a truncated coarse model.
    """

    def __init__(self, members: Sequence[Reconstructor], *, generator: torch.Generator) -> None:
        if not members:
            raise ValueError("members must hold at least 1 attacker, got 0")
        if len({each.answers_clipped for each in members}) > 1:
            raise ValueError("members must all answer with clipped images, or none, got both")
        if any(each.noise_to_noise for each in members):
            raise ValueError("members must not be noise-to-noise models: they estimate x_tilde")
        self.members = tuple(members)
        self._generator = generator

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape; t is one level for all. The flag is the members' own."""
        (level,) = t.unique().tolist()
        total = torch.zeros_like(x_t)
        for each in self.members:
            total += each.ask(x_t, level, labels, self._generator)
        return total / len(self.members)


def pooled_scores(scores: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """(members (N,), non-members (M,)): the sum over models of scores with mean 0 and variance 1.

    Args:
        scores: per model, of the same members and non-members in the same order; high is member.
            Each is standardised over both together; a constant score counts as 0.

    Raises:
        ValueError: for no model, or numbers of images that differ.
    """
    if not scores:
        raise ValueError("scores must hold at least 1 model's, got 0")
    sizes = {(len(members), len(others)) for members, others in scores}
    if len(sizes) > 1:
        raise ValueError(f"scores must be of the same images for every model, got {sorted(sizes)}")
    ((num_members, _),) = sizes
    total = np.zeros(sum(next(iter(sizes))))
    for members, others in scores:
        both = np.concatenate([members, others]).astype(np.float64)
        deviation = both.std()
        if deviation > 0:
            total += (both - both.mean()) / deviation
    return total[:num_members], total[num_members:]
