"""The guessing game of a one-run audit: pairs of canaries, one of each given to the client.

A pair is a random pattern of the pixel values 0 and 255 and its inverse. Around mid-grey the two
are antipodal, x and -x, so once clipped they are 2 C apart, the most there is, whenever
C <= sqrt(pixels); around another shift they are closer, and what counts is their true distance.
A secret coin per pair (Steinke, Nasr and Jagielski 2023, Algorithm 1) says which one is given;
the adversary sees everything that left the client and sums the likelihood ratios of a pair over
its *distinct* uploads: a replay tells nothing new.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from fedpdm.attacks.bounds import (
    best_num_guesses,
    gaussian_mu_bound,
    independent_mu_bound,
    steinke_epsilon_bound,
)
from fedpdm.attacks.likelihood import (
    Array,
    check_release,
    chunks,
    clipped_means,
    log_likelihood_ratios,
)
from fedpdm.data import ImageSet
from fedpdm.privacy.types import ReleasedDataset

__all__ = [
    "CanaryGame",
    "GameScores",
    "Guesses",
    "draw_game",
    "expected_accuracy",
    "guess",
    "new_rows",
    "score_game",
]

_NUMBERED_BITS = 62


@dataclass(frozen=True, kw_only=True, eq=False)
class CanaryGame:
    """What the auditor knows. All 2 m canaries have distinct pixels.

    Attributes:
        first, second: (m, C, H, W) uint8, the two canaries of each pair: inverse to each other, or
            orthogonal (`fedpdm.attacks.sum_canaries`).
        secret: (m,) bool, whether the client holds `second`.
        images: the m canaries that the client holds, in order; give it to the release path.
    """

    first: NDArray[np.uint8]
    second: NDArray[np.uint8]
    secret: NDArray[np.bool_]
    images: ImageSet


@dataclass(frozen=True, kw_only=True, eq=False)
class GameScores:
    """What the adversary computes from the uploads, (m,) each.

    Attributes:
        scores: float64, log-likelihood ratio of `first` against `second`, in nats.
        mu: float64, distance of the two in units of the noise: scores are N(+-mu^2 / 2, mu^2).
        num_distinct: int64, uploads of this canary that are no replays.
        distance_ratio: float64, distance of the clipped pair over the largest possible one, in the
            first upload (2 C), or of all sums together.
    """

    scores: Array
    mu: Array
    num_distinct: NDArray[np.int64]
    distance_ratio: Array


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Right guesses and what they prove at `confidence` (`bounds`).

    `num_right_of_all` are right if every canary is guessed. `num_guesses` is how many of the
    surest are guessed for the one-run bounds, fixed by theory alone, and `num_right` are right;
    the two `most_` are what these bounds would say if all of them were.
    """

    confidence: float
    num_canaries: int
    num_right_of_all: int
    num_guesses: int
    num_right: int
    steinke_epsilon: float
    gaussian_mu: float
    independent_mu: float
    most_steinke_epsilon: float
    most_gaussian_mu: float


def draw_game(
    num_canaries: int,
    *,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    background: float = 0.0,
) -> CanaryGame:
    """Draw canaries and secrets.

    Args:
        num_canaries: pairs m, at least 1.
        shape: (C, H, W) of an image, C 1 or 3.
        rng: the auditor's; the client must not know it.
        background: of the image set, the default shift of a run.

    Raises:
        ValueError: for another shape, or more canaries than there are patterns.
    """
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W) with C 1 or 3, got {shape}")
    bits = math.prod(shape)
    if not 1 <= num_canaries <= 2 ** (bits - 1):
        raise ValueError(
            f"num_canaries must be in [1, {2 ** (bits - 1)}] for {bits} pixels, got {num_canaries}"
        )
    patterns = _distinct_bits(num_canaries, bits - 1, rng)
    free = np.concatenate([np.zeros((num_canaries, 1), dtype=np.uint8), patterns], axis=1)
    free ^= rng.integers(0, 2, size=(num_canaries, 1), dtype=np.uint8)  # a pattern or its inverse
    first = (free * np.uint8(255)).reshape(num_canaries, *shape)
    second = np.uint8(255) - first
    secret = rng.integers(0, 2, size=num_canaries).astype(bool)
    images = ImageSet(
        images=np.where(secret[:, None, None, None], second, first),
        labels=np.zeros(num_canaries, dtype=np.int64),
        class_names=("canary",),
        background=background,
    )
    return CanaryGame(first=first, second=second, secret=secret, images=images)


def _distinct_bits(count: int, bits: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """`count` distinct rows of `bits` random bits, uint8 (count, bits)."""
    if bits <= _NUMBERED_BITS:
        numbers = rng.choice(2**bits, size=count, replace=False)
        return ((numbers[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    rows = rng.integers(0, 2, size=(count, bits), dtype=np.uint8)
    while len(np.unique(np.packbits(rows, axis=1), axis=0)) < count:  # as good as never
        rows = rng.integers(0, 2, size=(count, bits), dtype=np.uint8)
    return rows


def new_rows(uploads: Sequence[ReleasedDataset]) -> list[NDArray[np.bool_]]:
    """For each upload, which rows no earlier upload held already, value for value."""
    masks = []
    for position, upload in enumerate(uploads):
        new = torch.ones(len(upload), dtype=torch.bool)
        for earlier in uploads[:position]:
            if earlier.parameters == upload.parameters:
                new &= (earlier.x_tilde != upload.x_tilde).flatten(1).any(dim=1)
        masks.append(new.numpy())
    return masks


def score_game(game: CanaryGame, uploads: Sequence[ReleasedDataset]) -> GameScores:
    """Play the adversary on everything that left the client.

    Args:
        uploads: every release that was sent, rows in the order of `game.images`.

    Raises:
        ValueError: no upload, or one that does not fit the canaries.
    """
    if len(uploads) == 0:
        raise ValueError("uploads must hold at least 1 release, got 0")
    for number, upload in enumerate(uploads):
        check_release(upload, game.images.images.shape, name=f"uploads[{number}]")
    count, size = len(game.images), math.prod(game.images.images.shape[1:])
    scores, square, ratio = np.zeros((3, count))
    masks = new_rows(uploads)
    for number, (upload, new) in enumerate(zip(uploads, masks, strict=True)):
        parameters = upload.parameters
        for part in chunks(count, size):
            a = clipped_means(game.first[part], parameters)
            b = clipped_means(game.second[part], parameters)
            gained = log_likelihood_ratios(upload.x_tilde[part], a, b, parameters)
            distance = np.linalg.norm(a - b, axis=1)
            scores[part] += np.where(new[part], gained, 0.0)
            square[part] += np.where(new[part], (distance / parameters.sigma) ** 2, 0.0)
            if number == 0:
                ratio[part] = distance / (2.0 * parameters.clip_norm)
    return GameScores(
        scores=scores,
        mu=np.sqrt(square),
        num_distinct=np.sum(masks, axis=0, dtype=np.int64),
        distance_ratio=ratio,
    )


def guess(
    game: CanaryGame,
    played: GameScores,
    *,
    mu: float,
    delta: float,
    confidence: float = 0.95,
) -> Guesses:
    """Guess the secrets, and what the right guesses prove.

    Args:
        mu: what the canaries would show if the claim is true; it decides how many are guessed.
        delta: of the epsilon that Steinke's bound bounds.
    """
    right = (played.scores < 0.0) == game.secret
    count = len(right)
    num_guesses = best_num_guesses(mu, num_canaries=count, delta=delta, confidence=confidence)
    surest = np.argsort(-np.abs(played.scores), kind="stable")[:num_guesses]
    num_right = int(right[surest].sum())
    steinke, gaussian = (
        [
            bound(num_canaries=count, num_guesses=num_guesses, num_right=v, confidence=confidence)
            for v in (num_right, num_guesses)
        ]
        for bound in (functools.partial(steinke_epsilon_bound, delta=delta), gaussian_mu_bound)
    )
    return Guesses(
        confidence=confidence,
        num_canaries=count,
        num_right_of_all=int(right.sum()),
        num_guesses=num_guesses,
        num_right=num_right,
        steinke_epsilon=steinke[0],
        gaussian_mu=gaussian[0],
        independent_mu=independent_mu_bound(
            num_guesses=count, num_right=int(right.sum()), confidence=confidence
        ),
        most_steinke_epsilon=steinke[1],
        most_gaussian_mu=gaussian[1],
    )


def expected_accuracy(mu: Array) -> float:
    """Share of secrets guessed right if the noise is what it should be: mean Phi(mu / 2)."""
    return float(special.ndtr(mu / 2.0).mean())
