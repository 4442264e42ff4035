"""Audit of noised gradients: do the rounds of a plan keep to what the ledger says?

As `fedpdm.attacks.auditing`, with canaries in gradients. A canary's gradient is far longer than the
clip norm C, along a direction that is its own: + or - by a secret coin, the worst pair. So it adds
+-C on one number of a round's sum if it is drawn, which happens with probability q, and no canary
disturbs the guess of another. With x a number of a sum in units of C and s its noise, a round says

    ln ((1 - q) N(x; 0, s^2) + q N(x; 1, s^2)) / ((1 - q) N(x; 0, s^2) + q N(x; -1, s^2)),

and rounds add up. That is the best test there is, of the pair that the accountant composes: the
share of right guesses must be (1 + delta(0)) / 2, no more and no less.

Numbers that no canary is along show the noise. Those of canaries show who is drawn: their mean is
q, and sums over images, over rounds and of squares spread as independent draws do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import special, stats

from fedpdm.attacks.auditing import AuditReport, judge
from fedpdm.attacks.canaries import CanaryGame, GameScores
from fedpdm.attacks.likelihood import Array
from fedpdm.attacks.noisechecks import (
    SIGNIFICANCE,
    Finding,
    Rows,
    check_each_energy,
    check_energy,
    check_reuse,
    check_shape,
    check_suspects,
)
from fedpdm.privacy.accountant import delta_spent, epsilon_spent
from fedpdm.privacy.mechanism import GradientParameters, NoisedGradients, ReleasedGradient
from fedpdm.privacy.noise import GRID, NoiseSource
from fedpdm.privacy.subsampled import round_loss

__all__ = ["audit_gradients", "canary_gradients"]

STRETCH = 1024  # numbers of noise at a time
LONG = 1e6  # a canary's gradient, in clip norms
_PIECE = 64  # rows


def canary_gradients(
    game: CanaryGame, plan: GradientParameters, *, size: int
) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
    """Gradients of drawn canaries, int64 (B,), in pieces float32 (n, `size`).

    `ValueError` unless half of the numbers are along no canary.
    """
    count = len(game.secret)
    if not 1 <= count <= size // 2:
        raise ValueError(f"canaries must be in [1, {size // 2}] for {size} weights, got {count}")
    signs = _signs(game) * LONG * plan.clip_norm

    def rows(drawn: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in drawn.split(_PIECE):
            found = np.zeros((len(part), size), dtype=np.float32)
            found[np.arange(len(part)), part.numpy()] = signs[part.numpy()]
            yield torch.from_numpy(found)

    return rows


def audit_gradients(
    game: CanaryGame,
    uploads: Sequence[ReleasedGradient],
    *,
    delta: float,
    recorded: int,
    suspects: Sequence[NoiseSource] = (),
    confidence: float = 0.95,
) -> AuditReport:
    """Judge everything that left a client whose images have `canary_gradients`.

    Args:
        uploads: every message that was sent, restarts included, of one plan.
        delta: at which epsilon is stated.
        recorded: releases of an image by this plan in the client's ledger.
        suspects: noise streams of the first round, at their start, that somebody else could draw
            again.
        confidence: of the lower bounds.

    Raises:
        ValueError: no upload, uploads of several plans, or numbers out of range.
    """
    if not uploads or any(each.parameters != uploads[0].parameters for each in uploads):
        raise ValueError("uploads must be of one plan, and at least one")
    plan, count = uploads[0].parameters, len(game.secret)
    sums = _distinct(uploads)
    every = np.stack([total for totals in sums.values() for total in totals])
    x = every[:, :count] / math.sqrt(plan.limit) * _signs(game)
    event = NoisedGradients().event(plan)
    accuracy = 0.5 + delta_spent([event], epsilon=0.0) / 2.0
    # The noise as it is: whole steps make it a little more than the plan's.
    noised = dataclasses.replace(event, noise_multiplier=GRID / math.sqrt(plan.limit))
    scores = round_loss(x, noised).sum(axis=0) * _signs(game)
    played = GameScores(
        scores=scores,
        mu=np.full(count, 2.0 * float(special.ndtri(accuracy))),
        num_distinct=np.full(count, max(map(len, sums.values())), dtype=np.int64),
        distance_ratio=np.ones(count),
    )
    z = _stretches(every[:, count:] / GRID)
    noise = [
        _check_power(int(((scores < 0.0) == game.secret).sum()), count, accuracy),
        *_check_samples(x, plan),
        check_energy(z),
        check_each_energy(z, what="piece"),
        check_shape(z),
        check_reuse(z, what="piece"),
    ]
    first = _stretches(every[:1] / GRID)
    noise += check_suspects([(first, np.ones(len(first), dtype=bool))], suspects)
    epsilon = epsilon_spent([event], delta=delta)
    return judge(
        game,
        played,
        noise=noise,
        num_uploads=len(uploads),
        implied_epsilon=epsilon,
        claimed_epsilon=epsilon,
        delta=delta,
        recorded=recorded,
        confidence=confidence,
    )


def _signs(game: CanaryGame) -> Array:
    """Of each canary's gradient, float64 (m,): -1 where the client holds the second of a pair."""
    return np.where(game.secret, -1.0, 1.0)


def _distinct(uploads: Sequence[ReleasedGradient]) -> dict[int, list[Array]]:
    """The sums of each round that are no replays, float64 (d,) each."""
    found: dict[int, list[Array]] = defaultdict(list)
    for each in uploads:
        total, known = each.total.double().numpy(), found[int(each.round)]
        if not any(np.array_equal(total, other) for other in known):
            known.append(total)
    return found


def _stretches(rows: Array) -> Rows:
    """Numbers of each row (n, d) in stretches of one length, float32 (m, STRETCH or d)."""
    size = min(STRETCH, rows.shape[1])
    kept = rows[:, : rows.shape[1] // size * size]
    return kept.reshape(-1, size).astype(np.float32)


def _finding(name: str, seen: str, p: float) -> Finding:
    return Finding(name=name, passed=p >= SIGNIFICANCE, seen=seen, p_value=p)


def _check_power(num_right: int, count: int, accuracy: float) -> Finding:
    """The best test is as good as theory says: better, and there is less noise; worse, and the
    audit sees less than it should."""
    p = float(stats.binomtest(num_right, count, min(accuracy, 1.0)).pvalue)
    seen = f"{num_right / count:.2%} of the secrets are guessed; {accuracy:.2%} in theory"
    return _finding("power", seen, p)


def _check_samples(x: Array, plan: GradientParameters) -> list[Finding]:
    """Who is drawn, by x (rounds, m): each canary's number in its own direction."""
    rate, noise = plan.sample_rate, GRID**2 / plan.limit
    drawn = rate * (1.0 - rate)
    variance = drawn + noise
    tails = drawn * (1.0 - 6.0 * drawn) / variance**2  # excess kurtosis of x
    rounds, count = x.shape
    score = (float(x.mean()) - rate) / math.sqrt(variance / x.size)
    found = [
        _finding(
            "signal",
            f"a canary adds {x.mean():.4f} C on average; {rate:.4f} in theory",
            2.0 * float(special.ndtr(-abs(score))),
        )
    ]
    for name, values, number in (
        ("samples", x.sum(axis=1), count),
        ("draws of an image", x.sum(axis=0), rounds),
        ("each draw", x.ravel(), 1),
    ):
        squares = (values - number * rate) ** 2 / (number * variance)
        freedom = len(values) * 2.0 / (2.0 + tails / number)
        energy = float(squares.mean()) * freedom
        low, high = special.chdtr(freedom, energy), special.chdtrc(freedom, energy)
        seen = f"their variance is {squares.mean():.4f} of that of independent draws"
        found.append(_finding(name, seen, min(1.0, 2.0 * float(min(low, high)))))
    return found
