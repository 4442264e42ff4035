"""The guessing game of an audit of class statistics: canaries in sums.

A client is given one of each pair by a secret coin, as in `fedpdm.attacks.canaries`, and sends
noised sums. An image is in them through its clipped vector a (class means) and through
a a^T (second moments). Of two images a and b at the clip bound C with angle g between them,

    |a - b|^2 = 2 C^2 (1 - cos g),    |a a^T - b b^T|_F^2 = 2 C^4 sin^2 g:

the opposite of an image moves the means most and the products not at all, an orthogonal one moves
the products most and the means by 1 / sqrt(2) of the most. With the default shares of the budget,
orthogonal pairs reach 97% of the largest distance of all three sums together, so pairs here are
orthogonal. All canaries of a class are orthogonal to each other as well: patterns of 0 and 255 by
rows of a Hadamard matrix, so that no canary disturbs the guess of another in its class. In the sum
over all classes those of other classes do a little, like noise.

The auditor plays the server too, so she chooses what clients are told: the middle of the range of
pixels as every class's mean, and all directions. Where a class has several components, the images
of a single pair in doubt are each at a centre of their own, which is the most that an image can
move such sums. All other canaries are at one centre: their numbers at two would disturb each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.canaries import CanaryGame, GameScores
from fedpdm.attacks.likelihood import Array
from fedpdm.data import ImageSet, normalize
from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.statistics import in_places
from fedpdm.privacy.mechanism.whole import unpack_symmetric, whole_vectors
from fedpdm.privacy.noise import GRID

__all__ = [
    "SumView",
    "auditors_public",
    "distinct_sums",
    "draw_sum_game",
    "opposites",
    "score_sum_game",
    "single_sums",
]

Whole = NDArray[np.int64]
Public = Mapping[str, torch.Tensor]

OUT_OF_REACH = 1e3  # of a centre, in each direction
_PALEY = np.array([-1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1])  # 1 at the squares modulo 11


def _hadamard(size: int) -> NDArray[np.int8]:
    """Rows of +-1, orthogonal to each other: the largest such matrix of order 2^k or 12 2^k."""
    twelve = np.ones((12, 12), dtype=np.int8)
    twelve[1:, 1:] = [np.roll(_PALEY, shift) for shift in range(11)]
    start = np.ones((1, 1), dtype=np.int8)
    two = math.log2(size)
    if size >= 12 and 12 * 2 ** math.floor(math.log2(size / 12)) > 2 ** math.floor(two):
        start = twelve
    while 2 * len(start) <= size:
        start = np.kron(np.array([[1, 1], [1, -1]], dtype=np.int8), start)
    return start


def draw_sum_game(
    num_canaries: int,
    *,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    background: float = 0.0,
) -> CanaryGame:
    """Draw canaries and secrets, in as many classes as are needed; arguments as `draw_game`.

    `ValueError` for another shape, or no canary.
    """
    if len(shape) != 3 or shape[0] not in (1, 3) or math.prod(shape) < 4:
        raise ValueError(f"shape must be (C, H, W) of at least 4 values with C 1 or 3, got {shape}")
    if num_canaries < 1:
        raise ValueError(f"num_canaries must be at least 1, got {num_canaries}")
    signs = _hadamard(math.prod(shape))
    order, pairs = len(signs), len(signs) // 2
    num_classes = -(-num_canaries // pairs)
    both = np.full((2, num_classes * pairs, math.prod(shape)), 128, dtype=np.uint8)
    for k in range(num_classes):  # other orthogonal patterns in each
        turned = signs[rng.permutation(order)] * rng.choice([-1, 1], size=order).astype(np.int8)
        at = rng.permutation(math.prod(shape))[:order]
        own = np.arange(k * pairs, (k + 1) * pairs)
        for side in range(2):
            both[side][np.ix_(own, at)] = np.where(turned[side::2] > 0, 255, 0)
    first, second = both[:, :num_canaries].reshape(2, num_canaries, *shape)
    secret = rng.integers(0, 2, size=num_canaries).astype(bool)
    images = ImageSet(
        images=np.where(secret[:, None, None, None], second, first),
        labels=np.arange(num_canaries) // pairs,
        class_names=tuple(f"canary {k}" for k in range(num_classes)),
        background=background,
    )
    return CanaryGame(first=first, second=second, secret=secret, images=images)


def opposites(shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two orthogonal images (C, H, W) at the clip bound, the worst pair for all sums."""
    game = draw_sum_game(1, shape=shape, rng=np.random.default_rng(0))
    return game.first[0], game.second[0]


def auditors_public(
    parameters: StatisticsParameters,
    shape: tuple[int, int, int],
    pair: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
) -> dict[str, torch.Tensor]:
    """What clients are told before all sums but the first; see the module.

    `parameters` are those of the last round, `pair` the only two images (C, H, W) that are in
    doubt, if there are no more.
    """
    basis = cosine_basis(shape, parameters.dimensions)
    middle = basis @ np.full(math.prod(shape), -parameters.shift)
    means = torch.from_numpy(middle).float().expand(parameters.num_classes, -1).clone()
    public = {"means": means, "directions": torch.eye(parameters.directions, len(basis))}
    if parameters.moves:
        q = len(public["directions"])
        centers = np.full((parameters.num_classes, parameters.components, q), OUT_OF_REACH)
        centers[:, 0] = 0.0
        if pair is not None:
            x = normalize(np.stack(pair), shift=parameters.shift).flatten(1).double().numpy()
            centers[:, :2] = 0.0
            centers[:, :2, : len(basis)] = x @ basis.T - middle
        public["centers"] = torch.from_numpy(centers.reshape(-1, q)).float()
    return public


class SumView:
    """One noised sum (of a single time) as who knows the client's images and the server sees it.

    `sent` is the release, `public` what the client was told.
    """

    def __init__(self, sent: ReleasedStatistics, public: Public) -> None:
        if len(sent.counts) != 1:
            raise ValueError(f"a view is of one time, got {len(sent.counts)}")
        self.sent, self.parameters, self._public = sent, sent.parameters, public
        self.products = sent.parameters.products

    def vectors(self, images: NDArray[np.uint8], labels: Whole) -> Whole:
        """What images (n, C, H, W) are in the sum by, in whole steps: int64 (n, d)."""
        parameters = self.parameters
        x = normalize(images, shift=parameters.shift).flatten(1).numpy().astype(np.float64)
        x = x @ cosine_basis(images.shape[1:], self.sent.directions.shape[2]).T
        if parameters.stage != "means":
            x = x - self._public["means"].double().numpy()[labels]
        if parameters.projected:
            x = x @ self.sent.directions[0].double().numpy().T
        whole = whole_vectors(x, steps=parameters.steps, limit=parameters.limit)
        if parameters.moves:
            whole = in_places(whole, labels, self._public["centers"].double().numpy(), parameters)
        return whole

    def rows(self, labels: Whole) -> Whole:
        """Which of the sums images of these labels are in, (n,)."""
        return np.zeros_like(labels) if self.parameters.stage == "pooled" else labels

    def observed(self, row: int) -> Array:
        """A noised sum as it is, float64: (d,) or (d, d)."""
        return self.shaped(self.sent.sums[0, row].numpy().astype(np.float64))

    def shaped(self, values: Array) -> Array:
        """Numbers of a sum (n,) as (d,) or (d, d)."""
        if not self.products:
            return values
        p = self.sent.directions.shape[2]
        q = self.sent.directions.shape[1] if self.parameters.projected else p
        return unpack_symmetric(values, q)

    def total(self, vectors: Whole) -> Array:
        """The sum of these vectors, or of their products, without noise."""
        wide = vectors.astype(np.float64)
        return wide.T @ wide if self.products else wide.sum(axis=0)

    def along(self, residual: Array, a: Whole, b: Whole) -> Array:
        """<residual, what a adds less what b adds>, float64 (n,)."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not self.products:
            return (x - y) @ residual
        return np.vecdot(x @ residual, x) - np.vecdot(y @ residual, y)

    def squared_distance(self, a: Whole, b: Whole) -> Array:
        """Of what a and b add, in whole steps: float64 (n,)."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not self.products:
            return np.vecdot(x - y, x - y)
        xx, yy, xy = np.vecdot(x, x), np.vecdot(y, y), np.vecdot(x, y)
        return xx * xx + yy * yy - 2.0 * xy * xy

    def evidence(
        self,
        a: NDArray[np.uint8],
        b: NDArray[np.uint8],
        labels: Whole,
        *,
        others: tuple[NDArray[np.uint8], Whole] | None = None,
    ) -> tuple[Array, Array]:
        """Of pairs of images, one of each in the sum: (log-likelihood ratio of a against b in
        nats, squared distance in units of the noise), float64 (n,) each.

        `others` are images with labels that are in the sum for certain. The ratio of a pair takes
        the middle of every other pair for what else is there.
        """
        first, second, rows = self.vectors(a, labels), self.vectors(b, labels), self.rows(labels)
        scores = np.empty(len(rows))
        for row in np.unique(rows):
            at = rows == row
            middle = (self.total(first[at]) + self.total(second[at])) / 2.0
            if others is not None:
                middle += self.total(self.vectors(*others)[self.rows(others[1]) == row])
            scores[at] = self.along(self.observed(row) - middle, first[at], second[at])
        return scores / GRID**2, self.squared_distance(first, second) / GRID**2


def single_sums(uploads: Sequence[ReleasedStatistics]) -> list[ReleasedStatistics]:
    """Every sum that left, one time each, in order."""
    return [
        replace(
            upload,
            counts=upload.counts[at : at + 1],
            sums=upload.sums[at : at + 1],
            directions=upload.directions[at : at + 1],
        )
        for upload in uploads
        for at in range(len(upload.counts))
    ]


def distinct_sums(uploads: Sequence[ReleasedStatistics]) -> list[ReleasedStatistics]:
    """Those that are no replays of earlier ones, value for value."""
    found: list[ReleasedStatistics] = []
    for each in single_sums(uploads):
        known = (
            other.parameters == each.parameters and torch.equal(other.sums, each.sums)
            for other in found
        )
        if not any(known):
            found.append(each)
    return found


def score_sum_game(game: CanaryGame, views: Sequence[SumView]) -> GameScores:
    """Play the adversary on every distinct sum that left the client.

    `ValueError` without one.
    """
    if not views:
        raise ValueError("uploads must hold at least 1 sum, got 0")
    scores, square, nearest = np.zeros((3, len(game.secret)))
    labels, most, seen = game.images.labels, 0.0, set()
    for view in views:
        gained, distance = view.evidence(game.first, game.second, labels)
        scores += gained
        square += distance
        if view.parameters.stage not in seen:
            seen.add(view.parameters.stage)
            nearest += distance
            most += view.parameters.mu**2
    return GameScores(
        scores=scores,
        mu=np.sqrt(square),
        num_distinct=np.full(len(scores), len(views)),
        distance_ratio=np.sqrt(nearest / most),
    )
