"""Linkage of class statistics: which of two images is in a client's sums?

Two sets of images differ in one image of one label, a or b, the worst pair
(`fedpdm.attacks.sum_canaries`). A client releases each of them again and again, every time with
fresh noise. Who knows all the other images and the pair decides by the likelihood ratio of all
that was sent. With D the distance of what a and b add, in units of the noise, and mu that of the
planned rounds,

    AUC = Phi(D / sqrt(2)) <= Phi(mu / sqrt(2)),   TPR = Phi(Phi^-1(FPR) + D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedpdm.attacks.likelihood import Array
from fedpdm.attacks.roc import auc, auc_interval, tpr_at_fpr
from fedpdm.attacks.sum_canaries import Public, SumView, distinct_sums
from fedpdm.data import ImageSet
from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters

__all__ = ["SumLinkage", "SumLinkageSummary", "auc_of_mu", "link_sums", "with_image"]

Obtain = Callable[[ImageSet], Sequence[ReleasedStatistics]]


@dataclass(frozen=True, kw_only=True)
class SumLinkageSummary:
    """The attack in numbers; `dataclasses.asdict` of it is JSON.

    `num_releases` of either set. `mu` is that of all planned rounds, `reached_mu` the pair's
    distance. `auc` is measured, in [`auc_low`, `auc_high`] at `confidence`; `auc_analytic` follows
    from the distance, `agrees` says that it lies in the interval. `tpr` and `tpr_analytic` are at
    a FPR of at most `fpr`. `worst_auc` and `worst_tpr` are those of mu: no pair and no test does
    better. `rounds` has (stage, distance in it, measured AUC, analytic AUC) for each sum alone.
    """

    num_images: int
    num_releases: int
    mu: float
    reached_mu: float
    auc: float
    auc_low: float
    auc_high: float
    confidence: float
    auc_analytic: float
    agrees: bool
    fpr: float
    tpr: float
    tpr_analytic: float
    worst_auc: float
    worst_tpr: float
    rounds: tuple[tuple[str, float, float, float], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SumLinkage:
    """`summary`, and the scores (nats) of releases of the first and of the second set."""

    summary: SumLinkageSummary
    positive: Array
    negative: Array


def auc_of_mu(mu: float) -> float:
    """The AUC of the best test between neighbours, at a distance of mu."""
    return float(special.ndtr(mu / math.sqrt(2.0)))


def with_image(others: ImageSet, image: NDArray[np.uint8], label: int) -> ImageSet:
    """`others` and one image (C, H, W) more."""
    return ImageSet(
        images=np.concatenate([others.images, image[None]]),
        labels=np.append(others.labels, label),
        class_names=others.class_names,
        background=others.background,
    )


def link_sums(
    others: ImageSet,
    pair: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    obtain: Obtain,
    public: Public,
    planned: Sequence[StatisticsParameters],
    *,
    num_releases: int,
    label: int = 0,
    fpr: float = 0.01,
    confidence: float = 0.99,
) -> SumLinkage:
    """Attack `num_releases` releases of each of the two sets.

    Args:
        others: the images that both sets have; the two images of the `pair` are not among them.
        obtain: the release path of a new client: images to all sums that it sends.
        public: what clients are told before all sums but the first.
        planned: the parameters of all rounds.

    Raises:
        ValueError: fewer than 2 releases.
    """
    if num_releases < 2:
        raise ValueError(f"num_releases must be at least 2, got {num_releases}")
    a, b = (image[None] for image in pair)
    labels, known = np.array([label]), (others.images, others.labels)
    scores: dict[str, list[list[float]]] = {each.stage: [[], []] for each in planned}
    distances = dict.fromkeys(scores, 0.0)
    for _ in range(num_releases):
        for side, image in enumerate(pair):
            gained = dict.fromkeys(scores, 0.0)
            sent = obtain(with_image(others, image, label))
            for view in (SumView(each, public) for each in distinct_sums(sent)):
                evidence, square = view.evidence(a, b, labels, others=known)
                gained[view.parameters.stage] += float(evidence[0])
                distances[view.parameters.stage] = math.sqrt(float(square[0]))
            for stage, value in gained.items():
                scores[stage][side].append(value)
    sides = [np.array([scores[stage][side] for stage in scores]) for side in range(2)]
    positive, negative = (each.sum(axis=0) for each in sides)
    low, high = auc_interval(positive, negative, confidence=confidence)
    mu, reached = math.hypot(*(each.mu for each in planned)), math.hypot(*distances.values())
    analytic = auc_of_mu(reached)
    summary = SumLinkageSummary(
        num_images=len(others) + 1,
        num_releases=num_releases,
        mu=mu,
        reached_mu=reached,
        auc=auc(positive, negative),
        auc_low=low,
        auc_high=high,
        confidence=confidence,
        auc_analytic=analytic,
        agrees=low <= analytic <= high,
        fpr=fpr,
        tpr=tpr_at_fpr(positive, negative, fpr=fpr),
        tpr_analytic=float(special.ndtr(special.ndtri(fpr) + reached)),
        worst_auc=auc_of_mu(mu),
        worst_tpr=float(special.ndtr(special.ndtri(fpr) + mu)),
        rounds=tuple(
            (
                stage,
                distances[stage],
                auc(*(side[at] for side in sides)),
                auc_of_mu(distances[stage]),
            )
            for at, stage in enumerate(scores)
        ),
    )
    return SumLinkage(summary=summary, positive=positive, negative=negative)
