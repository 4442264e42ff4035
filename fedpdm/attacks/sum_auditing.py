"""Audit of class statistics: do a client's noised sums keep to the claimed epsilon?

As `fedpdm.attacks.auditing`, with canaries in sums (`fedpdm.attacks.sum_canaries`). What the
adversary guesses with is the sum itself; the noise of a sum, which the auditor sees as she knows
all images in it, is checked in stretches of at most `STRETCH` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpdm.attacks.auditing import AuditReport, judge
from fedpdm.attacks.canaries import CanaryGame
from fedpdm.attacks.likelihood import Array
from fedpdm.attacks.noisechecks import (
    Finding,
    Rows,
    check_each_energy,
    check_energy,
    check_reuse,
    check_shape,
    check_signal,
    check_suspects,
)
from fedpdm.attacks.sum_canaries import Public, SumView, distinct_sums, score_sum_game
from fedpdm.privacy.accountant import compose, epsilon_spent
from fedpdm.privacy.mechanism import ReleasedStatistics, event_of
from fedpdm.privacy.mechanism.whole import pack_symmetric
from fedpdm.privacy.noise import GRID, NoiseSource

__all__ = ["audit_sums"]

STRETCH = 1024  # numbers of noise at a time


def audit_sums(
    game: CanaryGame,
    uploads: Sequence[ReleasedStatistics],
    public: Public,
    *,
    claimed_epsilon: float,
    delta: float,
    recorded: int,
    suspects: Sequence[Sequence[NoiseSource]] = (),
    confidence: float = 0.95,
) -> AuditReport:
    """Judge everything that left a client which was given `game.images`.

    Args:
        uploads: every release that was sent, restarts included.
        public: what the client was told before all sums but the first.
        claimed_epsilon: what the run states for all sums together, at `delta`.
        recorded: releases of an image in the client's ledger.
        suspects: noise streams, at their start, that somebody else could draw again: for each
            distinct sum in its order.
        confidence: of the lower bounds.

    Raises:
        ValueError: no upload, one that does not fit the game, or numbers out of range.
    """
    views = [SumView(each, public) for each in distinct_sums(uploads)]
    played = score_sum_game(game, views)
    events = [event_of(view.parameters) for view in views]
    noise = [_check_counts(game, views)]
    residuals = [_residuals(game, view) for view in views]
    along = [_along(game, view, z) for view, z in zip(views, residuals, strict=True)]
    z = _stretches([row for rows in residuals for row in rows])
    noise += [
        check_energy(z),
        check_each_energy(z, what="piece"),
        check_signal(np.concatenate(along)),
        check_shape(z),
        check_reuse(z, what="piece"),
    ]
    for rows, known in zip(residuals, suspects, strict=False):
        flat = _stretches([rows.reshape(-1)])
        noise += check_suspects([(flat, np.ones(len(flat), dtype=bool))], known)
    return judge(
        game,
        played,
        noise=noise,
        num_uploads=len(uploads),
        implied_epsilon=epsilon_spent([compose(events)], delta=delta),
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        recorded=recorded,
        confidence=confidence,
    )


def _check_counts(game: CanaryGame, views: Sequence[SumView]) -> Finding:
    """Every canary is in each sum once: a sum says how many images of each class are in it."""
    classes = game.images.num_classes
    wanted = np.bincount(game.images.labels, minlength=classes)
    wrong = [v for v in views if not np.array_equal(v.sent.counts[0].numpy(), wanted)]
    seen = f"each of {len(views)} sums says that it has {wanted.sum()} images"
    if wrong:
        held = int(wrong[0].sent.counts.sum())
        seen = f"a sum of {wrong[0].parameters.stage} has {held} images, not {wanted.sum()}"
    return Finding(name="counts", passed=not wrong, seen=seen)


def _residuals(game: CanaryGame, view: SumView) -> Rows:
    """What is in the sums besides the images, in units of the noise: float32 (rows, n)."""
    images, labels = game.images.images, game.images.labels
    vectors, rows = view.vectors(images, labels), view.rows(labels)
    found = view.sent.sums[0].double().numpy()
    for row in range(len(found)):
        total = np.rint(view.total(vectors[rows == row])).astype(np.int64)
        found[row] -= pack_symmetric(total) if view.products else total
    return (found / GRID).astype(np.float32)


def _along(game: CanaryGame, view: SumView, residuals: Rows) -> Array:
    """The noise along what the canary in a sum has added more than the other one of its pair, in
    units of its deviation: float64 (m,)."""
    labels, secret = game.images.labels, game.secret[:, None, None, None]
    held = view.vectors(game.images.images, labels)
    other = view.vectors(np.where(secret, game.first, game.second), labels)
    norms, rows = np.sqrt(view.squared_distance(held, other)), view.rows(labels)
    found = np.zeros(len(labels))
    for row in np.unique(rows):
        at = rows == row
        noise = view.shaped(residuals[row].astype(np.float64))
        found[at] = view.along(noise, held[at], other[at])
    return np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)


def _stretches(rows: Sequence[np.ndarray]) -> Rows:
    """Numbers of all rows (n,) in stretches of one length, float32 (m, d); what is left over at
    the end of a row is left out."""
    size = min(STRETCH, *(len(row) for row in rows))
    return np.concatenate([row[: len(row) // size * size].reshape(-1, size) for row in rows])
