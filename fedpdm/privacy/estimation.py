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

Images are in coordinates of a public basis until `class_gaussians` turns them back into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.privacy.mechanism import ReleasedStatistics, mechanism_of
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.whole import pack_symmetric, unpack_symmetric

__all__ = [
    "ClassMeans",
    "PooledDirections",
    "class_gaussians",
    "class_means",
    "pooled_directions",
    "total_of",
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


def _checked(releases: Sequence[ReleasedStatistics], stage: str) -> Sequence[ReleasedStatistics]:
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


def _numbers(releases: Sequence[ReleasedStatistics]) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, int64 (K,), and how many times each sum was noised, int64 (rows,)."""
    counts, noisy = zip(*((each.counts, each.noisy) for each in releases), strict=True)
    return torch.cat(counts).sum(dim=0).numpy(), torch.cat(noisy).sum(dim=0).numpy()


def class_means(releases: Sequence[ReleasedStatistics]) -> ClassMeans:
    """Of the first round. Each class's mean is drawn to that of all, m, by what is noise in it:
    m + s / (s + v_k) (m_k - m), v_k the noise's variance and s that of classes around m (per
    number), which the classes with little noise tell. m itself is drawn to 0, the shift, likewise
    (James and Stein, positive part)."""
    parameters = _checked(releases, "means")[0].parameters
    images, noisy = _numbers(releases)
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
    parameters = _checked(releases, "pooled")[0].parameters
    p = releases[0].directions.shape[2]
    parts = [each.sums.double().sum(dim=(0, 1)).numpy() for each in releases]
    steps = [each.parameters.steps for each in releases]
    packed = np.sum([part / step**2 for part, step in zip(parts, steps, strict=True)], axis=0)
    images, noisy = (int(each.sum()) for each in _numbers(releases))
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


def total_of(release: ReleasedStatistics, directions: torch.Tensor | None) -> ReleasedStatistics:
    """One client's sums of all times as one total, in whole steps.

    `directions`, float32 (r, p), are the W that the server asks with: sums of products that were
    made with others are turned to these, as the server would, and rounded.
    """
    counts, sums = release.counts.sum(dim=0, keepdim=True), release.sums.sum(dim=0, keepdim=True)
    wanted = torch.zeros_like(release.directions[:1])
    if release.parameters.stage == "classes":
        assert directions is not None  # what the release was made with
        wanted[0, : len(directions)] = directions
        if not torch.equal(release.directions, wanted.expand_as(release.directions)):
            matrices = turned(release, wanted[0].double().numpy())
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


def _class_moments(
    releases: Sequence[ReleasedStatistics], leading: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments (K, q, q) in the rows of `leading` (q, p), each class's variance of the noise
    on an entry above the diagonal (K,), and its images (K,).

    Sums made with other directions, of an earlier run, are turned to these: A T A' with A the
    products of both; what lies outside of those directions is lost.
    """
    parameters = _checked(releases, "classes")[0].parameters
    images, noisy = _numbers(releases)
    total = np.sum([turned(each, leading) / each.parameters.steps**2 for each in releases], axis=0)
    most = np.maximum(images, 1.0)
    noise = noisy * parameters.sigma**2 / 2.0 / most**2
    return total / most[:, None, None], noise, images


def class_gaussians(
    means: ClassMeans,
    pooled: PooledDirections,
    releases: Sequence[ReleasedStatistics],
    *,
    image_shape: tuple[int, int, int],
) -> ClassGaussians:
    """A Gaussian for each class with images, in pixels of `image_shape`, d = C H W.

    `releases` are of the third round; without any, all classes have the pooled covariance. Entry
    (i, j) of a class's second moment differs from the pooled one by D; noise of variance v is on
    it. D counts by s / (s + v), s = mean over classes of D^2 - v: by how far the classes' entries
    stand out of their noise.
    """
    held = np.flatnonzero(means.counts)
    p, kept = means.means.shape[1], len(pooled.directions)
    basis = cosine_basis(image_shape, p)
    if basis.shape[0] != p:
        raise ValueError(f"means have {p} dimensions, images {image_shape} have {len(basis)}")
    q = min(kept, releases[0].parameters.directions) if releases else 0
    variances = np.tile(pooled.variances, (len(held), 1))
    directions = np.tile(pooled.directions, (len(held), 1, 1))
    if q:
        moments, noise, images = _class_moments(releases, pooled.directions[:q])
        common = np.diag(pooled.variances[:q])
        doubled = 1.0 + np.eye(q)  # noise on the diagonal has twice the variance
        differences, spread = moments - common, noise[:, None, None] * doubled
        there = images > 0
        signal = np.maximum((differences[there] ** 2 - spread[there]).mean(axis=0), 0.0)
        for row, k in enumerate(held):
            if not there[k]:
                continue
            share = np.divide(
                signal, signal + spread[k], out=np.ones((q, q)), where=signal + spread[k] > 0
            )
            values, turn = np.linalg.eigh(common + share * differences[k])
            variances[row, :q] = np.maximum(values, pooled.rest)
            directions[row, :q] = turn.T @ pooled.directions[:q]
    return ClassGaussians(
        means=torch.from_numpy(means.means[held] @ basis),
        directions=torch.from_numpy(directions @ basis),
        variances=torch.from_numpy(variances),
        rest=torch.full((len(held),), pooled.rest, dtype=torch.float64),
        weights=torch.from_numpy(means.counts[held].astype(np.float64)),
        classes=torch.from_numpy(held),
    )
