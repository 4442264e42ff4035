"""Sums of other times, read as if they had been made now; a client's sums as one total.

A client that gets new images makes sums of these alone. Its older ones were made with the W and the
centres of their time. Sums of products are turned to the present W: A T A' with A the products of
both. Sums by component are turned likewise, and each counts, whole, at the present centre of its
class that is nearest to its mean. What lies outside of the present directions is lost.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedpdm.privacy.mechanism import ReleasedStatistics
from fedpdm.privacy.mechanism.whole import pack_symmetric, unpack_symmetric

__all__ = ["placed", "total_of", "turned"]

ALIKE = 0.02  # of entries of W: what sending them in fewer bits changes


def turned(release: ReleasedStatistics, leading: np.ndarray) -> np.ndarray:
    """Sums of products of one client in whole steps, all its times together, in the rows of
    `leading` (q, p): float64 (K, q, q)."""
    classes, q = release.parameters.num_classes, len(leading)
    total = np.zeros((classes, q, q))
    for counts, sums, directions in zip(
        release.counts.numpy(),
        release.sums.numpy(),
        release.directions.double().numpy(),
        strict=True,
    ):
        turn = leading @ directions.T
        for k in np.flatnonzero(counts):
            total[k] += turn @ unpack_symmetric(sums[k], len(directions)) @ turn.T
    return total


def placed(release: ReleasedStatistics, leading: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Sums by component of one client in whole steps, all its times together: float64
    (K, J, q + 1), the last number counts, for `leading` (q, p) and `centers` (K, J, q) in units."""
    parameters, q = release.parameters, len(leading)
    total = np.zeros((*centers.shape[:2], q + 1))
    for counts, sums, directions in zip(
        release.counts.numpy(),
        release.sums.double().numpy(),
        release.directions.double().numpy(),
        strict=True,
    ):
        wanted = np.zeros_like(directions)
        wanted[:q] = leading
        now = np.abs(directions - wanted).max() <= ALIKE
        parts = sums.reshape(*centers.shape[:2], -1)
        turn = np.eye(q, len(directions)) if now else leading @ directions.T
        parts = np.concatenate([parts[..., :-1] @ turn.T, parts[..., -1:]], axis=2)
        for k in np.flatnonzero(counts):
            if now:
                total[k] += parts[k]
                continue
            images = np.maximum(parts[k, :, -1], parameters.grid) / parameters.weight
            means = parts[k, :, :-1] / parameters.steps / images[:, None]
            away = np.square(means[:, None] - centers[k]).sum(axis=2)
            np.add.at(total[k], away.argmin(axis=1), parts[k])
    return total


def total_of(
    release: ReleasedStatistics,
    directions: torch.Tensor | None,
    centers: torch.Tensor | None = None,
) -> ReleasedStatistics:
    """One client's sums of all times as one total, in whole steps.

    `directions`, float32 (r, p), and `centers`, (K J, q), are what the server asks with: sums that
    were made with others are read as if made now, as the server would, and rounded.
    """
    parameters = release.parameters
    counts, sums = release.counts.sum(dim=0, keepdim=True), release.sums.sum(dim=0, keepdim=True)
    wanted = torch.zeros_like(release.directions[:1])
    if parameters.projected:
        assert directions is not None  # what the release was made with
        wanted[0, : len(directions)] = directions
        if not torch.equal(release.directions, wanted.expand_as(release.directions)):
            leading = wanted[0].double().numpy()
            if parameters.moves:
                assert centers is not None
                shape = (parameters.num_classes, parameters.components, -1)
                found = placed(release, leading, centers.double().numpy().reshape(shape))
                sums = torch.from_numpy(np.rint(found).astype(np.int64)).view(sums.shape)
            else:
                matrices = turned(release, leading)
                sums = torch.from_numpy(
                    np.stack([pack_symmetric(np.rint(m).astype(np.int64)) for m in matrices])[None]
                )
    return replace(
        release,
        counts=counts,
        sums=sums,
        directions=wanted,
        totalled=release.noisy.sum(dim=0, keepdim=True),
    )
