"""Where a class's Gaussians lie: what the server makes of clients' sums by component.

All of it is post-processing of releases. In the q leading pooled directions, around each class's
mean, J centres begin as draws of the class's Gaussian, from a public seed. In each round clients
sum their images by the nearest centre, and a centre moves to the mean of its images (Lloyd). One
where no more images are seen than noise may show stays. With n images seen, and noise of standard
deviation e on that number and s on each coordinate of their sum,

    share     max(n, e, 1), as a share of all of the class
    centre    drawn to the class's mean, in each direction d by g_d / (g_d + v), v = (s / n)^2 and
              g_d the spread of centres there beyond their noise, as those with little noise show it

and all are moved together so that the class's mean is what it was. Where nothing stands out of the
noise, all components are the class's one Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpdm.privacy.estimation import (
    ClassMixtures,
    PooledDirections,
    class_covariances,
    class_means,
    kept_sums,
    numbers,
    pooled_directions,
)
from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters
from fedpdm.privacy.mechanism.sums import component_stage
from fedpdm.privacy.turning import placed
from fedpdm.rng import Purpose, numpy_rng

__all__ = ["Moved", "class_mixtures", "first_centers", "move", "place_components", "told_before"]

SEEN = 2.0  # standard deviations of the noise: fewer images of a component are none
Sums = Callable[[str], Sequence[ReleasedStatistics]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """`centers` float64 (K, J, q) after a round, `images` (K, J) seen at each, at least one and
    what noise may show, `seen` bool (K, J) whether a centre moved, `noise` (K, J) the variance of a
    coordinate of it. What a class without images says means nothing."""

    centers: np.ndarray
    images: np.ndarray
    seen: np.ndarray
    noise: np.ndarray


def first_centers(
    pooled: PooledDirections,
    releases: Sequence[ReleasedStatistics],
    parameters: StatisticsParameters,
) -> np.ndarray:
    """Draws of the classes' Gaussians around their means, float64 (K, J, q); `releases` are of the
    third round, `parameters` those of a component stage."""
    leading = pooled.directions[: parameters.directions]
    common = np.diag(pooled.variances[: len(leading)])
    covariances, drawn = class_covariances(pooled, releases), []
    for k in range(parameters.num_classes):
        values, vectors = np.linalg.eigh(covariances.get(k, common))
        root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
        z = numpy_rng(0, Purpose.COMPONENTS, client=k).standard_normal(
            (parameters.components, len(leading))
        )
        drawn.append(z @ root)
    return np.array(drawn)


def move(
    releases: Sequence[ReleasedStatistics], stage: str, leading: np.ndarray, centers: np.ndarray
) -> Moved:
    """The round `stage`: `centers` (K, J, q) in the rows of `leading` (q, p), to where sums say."""
    parameters = kept_sums(releases, stage)[0].parameters
    _, noisy = numbers(releases)
    total = np.sum([placed(each, leading, centers) for each in releases], axis=0)
    found = total[..., -1] / parameters.weight
    error = parameters.grid * np.sqrt(noisy[:, None]) / parameters.weight
    images = np.maximum(found, np.maximum(error, 1.0))
    seen = found >= np.maximum(SEEN * error, 1.0)
    means = total[..., :-1] / parameters.steps / images[..., None]
    length = np.linalg.norm(means, axis=2, keepdims=True)
    means *= np.minimum(1.0, parameters.clip_norm / np.maximum(length, 1e-300))  # as each image is
    return Moved(
        centers=np.where(seen[..., None], means, centers),
        images=images,
        seen=seen,
        noise=noisy[:, None] * parameters.sigma**2 / images**2,
    )


def place_components(stage: StatisticsParameters, sums: Sums, *, rounds: int) -> Moved:
    """Centres after the first `rounds` component rounds, of the sums of each stage by its name;
    `stage` is any component stage of the run."""
    pooled = pooled_directions(sums("pooled"))
    leading = pooled.directions[: stage.directions]
    first = first_centers(pooled, sums("classes"), stage)
    none = np.zeros(first.shape[:2])
    moved = Moved(centers=first, images=none + 1.0, seen=none > 0, noise=none)
    for number in range(1, rounds + 1):
        name = component_stage(number)
        moved = move(sums(name), name, leading, moved.centers)
    return moved


def class_mixtures(moved: Moved) -> ClassMixtures:
    """After the last round."""
    seen = moved.seen[..., None]
    known = np.divide(1.0, moved.noise[..., None], out=np.zeros(seen.shape), where=seen)
    centers = np.where(seen, moved.centers, 0.0)
    above = (known * centers**2 - seen).sum(axis=(0, 1)) / max(known.sum(), 1e-300)
    spread = np.maximum(above, 0.0)
    centers *= known * spread / (known * spread + 1.0)
    shares = moved.images / moved.images.sum(axis=1, keepdims=True)
    centers -= (shares[..., None] * centers).sum(axis=1, keepdims=True)
    return ClassMixtures(centers=centers, shares=shares)


def told_before(stage: StatisticsParameters, sums: Sums) -> dict[str, torch.Tensor]:
    """What clients are told before a stage after the first: what the server has made of the sums of
    earlier ones, by name."""
    public = class_means(sums("means")).public()
    if not stage.projected:
        return public
    pooled = pooled_directions(sums("pooled"))
    public |= pooled.public(stage.directions)
    if stage.moves:
        done = int(stage.stage.rpartition("-")[2]) - 1
        centers = place_components(stage, sums, rounds=done).centers
        q = min(stage.directions, pooled.directions.shape[1])
        wide = np.zeros((math.prod(centers.shape[:2]), q))
        wide[:, : centers.shape[2]] = centers.reshape(len(wide), -1)
        public["centers"] = torch.from_numpy(wide).float()
    return public
