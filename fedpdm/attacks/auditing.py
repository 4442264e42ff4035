"""Audit of a release path with canaries: do the uploads keep to the claimed epsilon?

The auditor draws a game (`canaries`), runs the real path on its images, and judges everything
that left: lower bounds on epsilon from the adversary's guesses (`bounds`), the noise itself, which
the auditor can see as she knows the images (`noisechecks`), and the books:

    claim     the claimed epsilon pays for mu^2 = sum over distinct uploads of (2 C / sigma)^2
    ledger    no image has more distinct uploads than there are recorded releases

`audit` is for released images, `fedpdm.attacks.sum_auditing` for noised sums. An audit can refute a
claim; that it passes does not prove one. The chance that a correct path fails is below 1e-5:
`SIGNIFICANCE` for each check of the noise and for the guesses, and far less than their 5% for the
two one-run bounds, which allow for mechanisms that are not this one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpdm.attacks.bounds import epsilon_of_mu, independent_p_value, mu_of_epsilon
from fedpdm.attacks.canaries import (
    CanaryGame,
    GameScores,
    Guesses,
    expected_accuracy,
    guess,
    new_rows,
    score_game,
)
from fedpdm.attacks.likelihood import Array, chunks, clipped_means
from fedpdm.attacks.noisechecks import (
    SIGNIFICANCE,
    Finding,
    Rows,
    check_each_energy,
    check_energy,
    check_pixels,
    check_reuse,
    check_shape,
    check_signal,
    check_suspects,
)
from fedpdm.data import ImageSet
from fedpdm.privacy.accountant import compose, epsilon_spent
from fedpdm.privacy.mechanism import event_of
from fedpdm.privacy.noise import NoiseSource
from fedpdm.privacy.types import ReleasedDataset

__all__ = ["AuditReport", "audit", "judge", "residuals"]


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The audit's result; `dataclasses.asdict` of it is JSON.

    Attributes:
        image_shape: (C, H, W); num_uploads: releases that were sent, replays included.
        num_distinct: largest number of distinct uploads of one image; recorded: in the ledger.
        claimed_epsilon: under test, at delta; implied_epsilon: what the uploads' own parameters
            cost the image that was uploaded most.
        claimed_mu: the mu of the claimed epsilon; reached_mu: median distance of a pair in units
            of the noise, all distinct uploads together; distance_ratio: median distance of a
            clipped pair over 2 C.
        accuracy: share of all secrets guessed right; expected_accuracy: in theory.
        guesses: right guesses and bounds; epsilon_steinke, epsilon_gaussian (any mechanism) and
            epsilon_independent (images noised independently): lower bounds at
            `guesses.confidence`.
        findings: one per check; passed: whether all of them passed.
    """

    image_shape: tuple[int, int, int]
    num_uploads: int
    num_distinct: int
    recorded: int
    claimed_epsilon: float
    delta: float
    implied_epsilon: float
    claimed_mu: float
    reached_mu: float
    distance_ratio: float
    accuracy: float
    expected_accuracy: float
    guesses: Guesses
    epsilon_steinke: float
    epsilon_gaussian: float
    epsilon_independent: float
    findings: tuple[Finding, ...]
    passed: bool


def audit(
    game: CanaryGame,
    uploads: Sequence[ReleasedDataset],
    *,
    claimed_epsilon: float,
    delta: float,
    recorded: int,
    suspects: Sequence[NoiseSource] = (),
    confidence: float = 0.95,
) -> AuditReport:
    """Judge everything that left a client which was given `game.images`.

    Args:
        uploads: every release that was sent, restarts included, rows in the order of the images.
        claimed_epsilon: what an image paid in all, at `delta`, in exact or looser accounting.
        recorded: releases of an image in the client's ledger.
        suspects: noise streams, at their start, that somebody else could draw again.
        confidence: of the lower bounds.

    Raises:
        ValueError: uploads that do not fit the game, or numbers out of range.
    """
    played = score_game(game, uploads)
    masks = new_rows(uploads)
    return judge(
        game,
        played,
        noise=_noise_findings(game.images, uploads, masks, suspects),
        num_uploads=len(uploads),
        implied_epsilon=_implied_epsilon(uploads, masks, delta=delta),
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        recorded=recorded,
        confidence=confidence,
    )


def judge(
    game: CanaryGame,
    played: GameScores,
    *,
    noise: Sequence[Finding],
    num_uploads: int,
    implied_epsilon: float,
    claimed_epsilon: float,
    delta: float,
    recorded: int,
    confidence: float = 0.95,
) -> AuditReport:
    """The report on a game that was played: guesses, books, and the findings on the `noise`.

    `implied_epsilon` is what the parameters of what left cost the image that paid most. Raises
    `ValueError` for numbers out of range.
    """
    if recorded < 0:
        raise ValueError(f"recorded must be at least 0, got {recorded}")
    claimed_mu = mu_of_epsilon(claimed_epsilon, delta=delta)
    ratio = float(np.median(played.distance_ratio))
    made = guess(game, played, mu=claimed_mu * ratio, delta=delta, confidence=confidence)
    epsilon_gaussian = epsilon_of_mu(made.gaussian_mu, delta=delta)
    num_distinct = int(played.num_distinct.max())
    books = [
        _check_claim(claimed_epsilon, implied_epsilon),
        _check_ledger(num_distinct, recorded),
        _check_bound(
            "Steinke", made.steinke_epsilon, claimed_epsilon, most=made.most_steinke_epsilon
        ),
        _check_bound(
            "Gaussian DP",
            epsilon_gaussian,
            claimed_epsilon,
            most=epsilon_of_mu(made.most_gaussian_mu, delta=delta),
        ),
        _check_guesses(made, claimed_mu),
    ]
    findings = (*books, *noise)
    _, channels, height, width = game.images.images.shape
    return AuditReport(
        image_shape=(channels, height, width),
        num_uploads=num_uploads,
        num_distinct=num_distinct,
        recorded=recorded,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        implied_epsilon=implied_epsilon,
        claimed_mu=claimed_mu,
        reached_mu=float(np.median(played.mu)),
        distance_ratio=ratio,
        accuracy=made.num_right_of_all / made.num_canaries,
        expected_accuracy=expected_accuracy(played.mu),
        guesses=made,
        epsilon_steinke=made.steinke_epsilon,
        epsilon_gaussian=epsilon_gaussian,
        epsilon_independent=epsilon_of_mu(made.independent_mu, delta=delta),
        findings=findings,
        passed=all(finding.passed for finding in findings),
    )


def residuals(images: ImageSet, upload: ReleasedDataset) -> tuple[Rows, Array]:
    """The noise of an upload of `images`, float32 (N, d), and along each image, float64 (N,).

    The latter, <z, c> / ||c||, is NaN where the clipped image c is zero.
    """
    abar = upload.parameters.alpha_bar
    count, size = len(images), math.prod(images.images.shape[1:])
    z, along = np.empty((count, size), dtype=np.float32), np.full(count, np.nan)
    for part in chunks(count, size):
        mean = clipped_means(images.images[part], upload.parameters)
        x_tilde = upload.x_tilde[part].flatten(1).double().numpy()
        noise = (x_tilde - math.sqrt(abar) * mean) / math.sqrt(1.0 - abar)
        norms = np.linalg.norm(mean, axis=1)
        np.divide(np.vecdot(noise, mean), norms, out=along[part], where=norms > 0)
        z[part] = noise
    return z, along


def _noise_findings(
    images: ImageSet,
    uploads: Sequence[ReleasedDataset],
    masks: Sequence[NDArray[np.bool_]],
    suspects: Sequence[NoiseSource],
) -> list[Finding]:
    """Every check of the noise, over all rows that are no replays."""
    made = [residuals(images, upload) for upload in uploads]
    z = np.concatenate([rows[new] for (rows, _), new in zip(made, masks, strict=True)])
    along = np.concatenate([each[new] for (_, each), new in zip(made, masks, strict=True)])
    return [
        check_energy(z),
        check_each_energy(z),
        check_signal(along[~np.isnan(along)]),
        check_shape(z),
        check_reuse(z),
        check_pixels(z),
        *check_suspects(
            [(rows, new) for (rows, _), new in zip(made, masks, strict=True)], suspects
        ),
    ]


def _implied_epsilon(
    uploads: Sequence[ReleasedDataset], masks: Sequence[NDArray[np.bool_]], *, delta: float
) -> float:
    """What the uploads' own parameters cost, for the image that pays most."""
    events = [event_of(upload.parameters) for upload in uploads]
    histories = np.unique(np.stack(masks), axis=1).T  # which uploads held an image anew
    return max(
        epsilon_spent([compose(list(itertools.compress(events, row)))], delta=delta)
        for row in histories
    )


def _check_claim(claimed: float, implied: float) -> Finding:
    return Finding(
        name="claim",
        passed=claimed >= implied * (1.0 - 1e-6),
        seen=f"epsilon {claimed:.4g} is claimed; the parameters of what left cost {implied:.4g}",
    )


def _check_ledger(num_distinct: int, recorded: int) -> Finding:
    return Finding(
        name="ledger",
        passed=num_distinct <= recorded,
        seen=f"an image left in {num_distinct} distinct forms; recorded releases: {recorded}",
    )


def _check_bound(name: str, bound: float, claimed: float, *, most: float) -> Finding:
    return Finding(
        name=f"lower bound ({name})",
        passed=bound <= claimed,
        seen=f"epsilon is at least {bound:.4g} by the guesses (so many can show {most:.4g} at "
        f"most); claimed is {claimed:.4g}",
    )


def _check_guesses(made: Guesses, mu: float) -> Finding:
    """All guesses, if images are noised independently; p is exact at the claimed mu."""
    p = independent_p_value(mu, num_guesses=made.num_canaries, num_right=made.num_right_of_all)
    share = made.num_right_of_all / made.num_canaries
    return Finding(
        name="guesses",
        passed=p >= SIGNIFICANCE,
        seen=f"{share:.2%} of the secrets are guessed; {math.erf(mu / math.sqrt(8)) / 2 + 0.5:.2%} "
        "is the most that the claim allows on average",
        p_value=p,
    )
