"""What the server makes of clients' noised sums: means, pooled directions, class Gaussians.

All of it is post-processing of releases. The formulas are those of docs/method.md section 5: with
N images in all, N_k of a class, sums of M clients (or of several times) and noise sigma on each
number,

    means     s_k / N_k, drawn to the mean of all images by what is noise in them
    pooled    S / N; eigenvalues above edge = sqrt(2 p M) sigma / N, the edge of the noise's
              spectrum, are kept and freed of what noise adds: (l + sqrt(l^2 - edge^2)) / 2;
              what is left of the trace is spread evenly over the rest. (The largest eigenvalue of
              noise alone varies by a share of p^(-2/3) around the edge: that much above it is
              asked for.)
    classes   T_k / N_k in the leading pooled directions, drawn to the pooled one entry by entry

`fedpdm.privacy.components` makes mixtures of them.

Images are in coordinates of a public basis until `class_gaussians` turns them back into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.privacy.mechanism import ReleasedStatistics, mechanism_of
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.whole import unpack_symmetric
from fedpdm.privacy.turning import turned

__all__ = [
    "ClassMeans",
    "ClassMixtures",
    "PooledDirections",
    "class_covariances",
    "class_gaussians",
    "class_means",
    "kept_sums",
    "numbers",
    "pooled_directions",
]

LEAST_VARIANCE = 1e-4  # of a direction: about that of rounding to 8 bits, and never zero


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMeans:
    """`means` float64 (K, p), `counts` int64 (K,): images of each class in the sums.

    A class without images has the mean of all.
    """

    means: np.ndarray
    counts: np.ndarray

    def public(self) -> dict[str, torch.Tensor]:
        """As clients get it for later rounds."""
        return {"means": torch.from_numpy(self.means).float()}


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledDirections:
    """`directions` float64 (r, p), orthonormal rows with `variances` (r,), largest first, and
    `rest`, the variance of every other direction. `edge` is that of the noise's spectrum.

    r = 0: no direction stands out of the noise.
    """

    directions: np.ndarray
    variances: np.ndarray
    rest: float
    edge: float

    def public(self, most: int) -> dict[str, torch.Tensor]:
        """As clients get it for the last round."""
        return {"directions": torch.from_numpy(self.directions[:most]).float()}


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMixtures:
    """`centers` float64 (K, J, q): of a class's components around its mean, in the leading pooled
    directions; `shares` (K, J), of the class's images, sum to 1. So weighed, centres sum to 0.
    """

    centers: np.ndarray
    shares: np.ndarray

    def between(self, k: int) -> np.ndarray:
        """How far the centres of a class spread, (q, q)."""
        spread: np.ndarray = self.centers[k].T @ (self.shares[k, :, None] * self.centers[k])
        return spread


def kept_sums(releases: Sequence[ReleasedStatistics], stage: str) -> Sequence[ReleasedStatistics]:
    """`ValueError` unless all are sums of this stage, alike and of at least one image."""
    if not releases:
        raise ValueError(f"{stage}: no sums were collected")
    first = releases[0]
    for each in releases:
        same = mechanism_of(first.parameters).same(first.parameters, each.parameters)
        if each.parameters.stage != stage or not same or each.sums.shape[2] != first.sums.shape[2]:
            raise ValueError(f"{stage}: sums of another round or with other settings among them")
    if not sum(int(each.counts.sum()) for each in releases):
        raise ValueError(f"{stage}: no sum has an image in it")
    return releases


def numbers(releases: Sequence[ReleasedStatistics]) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, int64 (K,), and how many times each sum was noised, int64 (rows,)."""
    counts, noisy = zip(*((each.counts, each.noisy) for each in releases), strict=True)
    return torch.cat(counts).sum(dim=0).numpy(), torch.cat(noisy).sum(dim=0).numpy()


def class_means(releases: Sequence[ReleasedStatistics]) -> ClassMeans:
    """Of the first round. Each class's mean is drawn to that of all, m, by what is noise in it:
    m + s / (s + v_k) (m_k - m), v_k the noise's variance and s that of classes around m (per
    number), which the classes with little noise tell. m itself is drawn to 0, the shift, likewise
    (James and Stein, positive part)."""
    parameters = kept_sums(releases, "means")[0].parameters
    images, noisy = numbers(releases)
    parts = [each.sums.double().sum(dim=0).numpy() / each.parameters.steps for each in releases]
    total = np.sum(parts, axis=0)
    held = images > 0
    grand, length = total.sum(axis=0) / images.sum(), np.linalg.norm(total.sum(axis=0))
    hidden = len(grand) * noisy.sum() * parameters.sigma**2  # of length^2, by noise
    grand *= max(0.0, 1.0 - hidden / length**2) if length > 0 else 0.0
    means = np.tile(grand, (len(images), 1))
    noise = noisy[held] * parameters.sigma**2 / images[held] ** 2.0
    off = total[held] / images[held, None] - grand
    spread = float(np.average(np.mean(off**2, axis=1) - noise, weights=1.0 / noise))
    means[held] += max(spread, 0.0) / (max(spread, 0.0) + noise[:, None]) * off
    return ClassMeans(means=means, counts=images)


def pooled_directions(releases: Sequence[ReleasedStatistics]) -> PooledDirections:
    """Of the second round."""
    parameters = kept_sums(releases, "pooled")[0].parameters
    p = releases[0].directions.shape[2]
    parts = [each.sums.double().sum(dim=(0, 1)).numpy() for each in releases]
    steps = [each.parameters.steps for each in releases]
    packed = np.sum([part / step**2 for part, step in zip(parts, steps, strict=True)], axis=0)
    images, noisy = (int(each.sum()) for each in numbers(releases))
    matrix = unpack_symmetric(packed, p) / images
    edge = math.sqrt(2.0 * p * noisy) * parameters.sigma / images
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = int((values > edge * (1.0 + p ** (-2.0 / 3.0))).sum())
    above = values[:kept]
    most = parameters.clip_norm**2  # no image's residual is longer
    variances = np.clip((above + np.sqrt(above**2 - edge**2)) / 2.0, LEAST_VARIANCE, most)
    trace = min(float(np.trace(matrix)), most)
    rest = max((trace - variances.sum()) / max(1, p - kept), LEAST_VARIANCE)
    return PooledDirections(
        directions=vectors[:, :kept].T.copy(),
        variances=variances,
        rest=min(rest, float(variances.min())) if kept else rest,
        edge=edge,
    )


def _class_moments(
    releases: Sequence[ReleasedStatistics], leading: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments (K, q, q) in the rows of `leading` (q, p), each class's variance of the noise
    on an entry above the diagonal (K,), and its images (K,).

    Sums made with other directions, of an earlier run, are turned to these: A T A' with A the
    products of both; what lies outside of those directions is lost.
    """
    parameters = kept_sums(releases, "classes")[0].parameters
    images, noisy = numbers(releases)
    total = np.sum([turned(each, leading) / each.parameters.steps**2 for each in releases], axis=0)
    most = np.maximum(images, 1.0)
    noise = noisy * parameters.sigma**2 / 2.0 / most**2
    return total / most[:, None, None], noise, images


def class_covariances(
    pooled: PooledDirections, releases: Sequence[ReleasedStatistics]
) -> dict[int, np.ndarray]:
    """Of the third round: the (q, q) covariance in the q leading pooled directions of each class
    with images in it. None where no direction is kept.

    Entry (i, j) of a class's second moment differs from the pooled one by D; noise of variance v is
    on it. D counts by s / (s + v), s = mean over classes of D^2 - v: by how far the classes'
    entries stand out of their noise.
    """
    kept = len(pooled.directions)
    q = min(kept, releases[0].parameters.directions) if releases else 0
    if not q:
        return {}
    moments, noise, images = _class_moments(releases, pooled.directions[:q])
    common = np.diag(pooled.variances[:q])
    doubled = 1.0 + np.eye(q)  # noise on the diagonal has twice the variance
    differences, spread = moments - common, noise[:, None, None] * doubled
    there = images > 0
    signal = np.maximum((differences[there] ** 2 - spread[there]).mean(axis=0), 0.0)
    found = {}
    for k in np.flatnonzero(there):
        share = np.divide(
            signal, signal + spread[k], out=np.ones((q, q)), where=signal + spread[k] > 0
        )
        found[int(k)] = common + share * differences[k]
    return found


def class_gaussians(
    means: ClassMeans,
    pooled: PooledDirections,
    releases: Sequence[ReleasedStatistics],
    *,
    image_shape: tuple[int, int, int],
    mixtures: ClassMixtures | None = None,
) -> ClassGaussians:
    """A Gaussian for each class with images, in pixels of `image_shape`, d = C H W.

    `releases` are of the third round; without any, all classes have the pooled covariance. With
    `mixtures` a class has J Gaussians of one covariance: that of the class without what its centres
    spread by, at least `pooled.rest` in every direction.
    """
    held = np.flatnonzero(means.counts)
    p = means.means.shape[1]
    basis = cosine_basis(image_shape, p)
    if basis.shape[0] != p:
        raise ValueError(f"means have {p} dimensions, images {image_shape} have {len(basis)}")
    variances = np.tile(pooled.variances, (len(held), 1))
    directions = np.tile(pooled.directions, (len(held), 1, 1))
    covariances = class_covariances(pooled, releases)
    for row, k in enumerate(held.tolist()):
        inside = covariances.get(k)
        if mixtures is not None and (q := mixtures.centers.shape[2]):
            whole = np.diag(pooled.variances[:q]) if inside is None else inside
            inside = whole - mixtures.between(k)
        if inside is None:
            continue
        values, turn = np.linalg.eigh(inside)
        q = len(values)
        variances[row, :q] = np.maximum(values, pooled.rest)
        directions[row, :q] = turn.T @ pooled.directions[:q]
    centers, weights = means.means[held], means.counts[held].astype(np.float64)
    times = 1
    if mixtures is not None:
        q, times = mixtures.centers.shape[2], mixtures.centers.shape[1]
        around = mixtures.centers[held] @ pooled.directions[:q]
        centers = (centers[:, None] + around).reshape(-1, p)
        weights = (weights[:, None] * mixtures.shares[held]).ravel()
    return ClassGaussians(
        means=torch.from_numpy(centers @ basis),
        directions=torch.from_numpy((directions @ basis).repeat(times, axis=0)),
        variances=torch.from_numpy(variances.repeat(times, axis=0)),
        rest=torch.full((len(weights),), pooled.rest, dtype=torch.float64),
        weights=torch.from_numpy(weights),
        classes=torch.from_numpy(held.repeat(times)),
    )
