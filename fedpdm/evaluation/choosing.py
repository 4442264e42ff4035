"""A client of class statistics chooses how to sample, on its own held-out images.

What is open in the config (hand-over, labels under it, candidates) is tried in all combinations. A
combination is judged three times (docs/method.md section 5):

* On the classes of which the client has few images, by the share of near-copies of its training
  images. More than `COPIES` and a standard error above what is there without copying is not
  accepted: that of held-out images, or of the Gaussians' draws of these classes that nothing has
  refined, whichever is more.
* On the classes of which it holds out enough images, by the share of images that a small classifier
  takes for the class that was asked for. The client trains it on its own training images. Less than
  the best share and a standard error under it is not accepted.
* On the same classes, by the kernel distance between what is drawn for a class and the held-out
  images of that class, as a mean over these classes, in the classifier's features. Pixels would
  not do: their first two moments are those of the Gaussians before any refining.

Of what is accepted the smallest distance wins; what copies is not judged any further. At last the
classes on which this was judged are drawn by the client's own model alone as well: where that is
better by the same rule, and does not copy, it draws these classes from then on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from fedpdm.data.client_images import ClientImages
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.evaluation.trials import FEW, IMAGES, NUM_STEPS, OWN_STEPS, Likeness, Trials
from fedpdm.setup.choice import CANDIDATES, SamplingChoice, fallback
from fedpdm.setup.run_setup import RunSetup

__all__ = ["choose_sampling", "most_calls"]

LEVELS: Final = (0.10, 0.15, 0.20, 0.25, 0.30)  # of T
LEAST_OF_CLASS: Final = 5  # held-out images, for a class to be judged on
LEAST: Final = 20  # of these in all, of at least two classes
MOST_CLASSES: Final = 16
COPIES: Final = 0.08


def most_calls() -> int:
    """The most that a choice asks of the fine model, in images that it denoises once.

    The first part is for near-copies, of every combination, and for distances, of those that are
    accepted; the second for what is chosen and the own model alone.
    """
    tried = len(LEVELS) * 2 * CANDIDATES * (IMAGES + FEW) * NUM_STEPS
    return tried + (CANDIDATES + 1) * IMAGES * OWN_STEPS


def choose_sampling(
    setup: RunSetup,
    held: ClientImages,
    coarse: GaussianDenoiser,
    fine: DenoisingFunction,
    *,
    device: torch.device,
    where: str,
) -> SamplingChoice:
    """The choice of a client that holds these images, with its finished models.

    `where` names the client in what is shown of progress. Where there is nothing to choose by (few
    images are held out, or they are too large for the classifier), `fallback`, which says so.
    """
    if setup.config.sampling.coarse_worth is not None:
        return fallback(setup, "sampling.coarse_worth mixes both models")
    if not 4 <= setup.spec.resolution <= 128:
        return fallback(setup, "nothing is chosen on images of this size")
    there = _judged_classes(held, coarse)
    judged = there[:MOST_CLASSES]
    heldout = held.heldout[np.isin(held.images.labels[held.heldout], judged)]
    if len(judged) < 2 or len(heldout) < LEAST:
        return fallback(
            setup,
            f"too few held-out images to choose on: {len(heldout)} of {len(judged)} classes, "
            f"needed {LEAST} of 2, {LEAST_OF_CLASS} of each",
        )
    rare = sorted(set(held.train_labels.tolist()) - set(there)) or judged
    levels, told, counts = _options(setup)
    trials = Trials.of(
        setup, held, coarse, judged, rare, heldout, device=device, most=max(counts), where=where
    )
    tried = [
        SamplingChoice(handover=level, fine_labels=labels, candidates=count, why="")
        for level, labels, count in itertools.product(levels, told, counts)
    ]
    without = {count: trials.copies_without(count) for count in counts}
    copies = trials.near_copies(fine, tried)
    over = [
        c - _accepted(without[one.candidates], FEW) for one, c in zip(tried, copies, strict=True)
    ]
    kept = np.flatnonzero(np.array(over) <= max(0.0, min(over))).tolist()
    likeness = trials.likeness(fine, [tried[k] for k in kept])
    chosen = _nearest(likeness)
    best = kept[chosen]
    choice = replace(
        tried[best],
        why=f"chosen among {len(tried)} on {len(heldout)} held-out images of {len(judged)} classes",
        scores={
            **likeness[chosen]._asdict(),
            "near_copies": copies[best],
            "near_copies_without_copying": without[tried[best].candidates],
        },
    )
    section, knows_all = setup.config.sampling, setup.config.fine.t_range == "all"
    if section.own_classes == "never" or not knows_all:
        return choice
    return _with_own_classes(choice, there, trials, fine)


def _with_own_classes(
    choice: SamplingChoice, classes: Sequence[int], trials: Trials, fine: DenoisingFunction
) -> SamplingChoice:
    """The choice, with these classes drawn by the own model alone where that is better and does not
    copy."""
    (together,) = trials.likeness(fine, [choice], num_steps=OWN_STEPS)
    alone, copies = trials.own_model(fine)
    better = _nearest([together, alone]) == 1
    own = better and copies <= _accepted(trials.copies_of_real, IMAGES)
    found = {f"own_{name}": value for name, value in alone._asdict().items()}
    return replace(
        choice,
        own_classes=tuple(sorted(classes)) if own else (),
        scores={**choice.scores, **found, "own_near_copies": copies},
    )


def _options(setup: RunSetup) -> tuple[list[int], list[bool], list[int]]:
    """Hand-overs, labels under them and candidates to try: what the config leaves open.

    A fine model that was trained up to the hand-over alone is not asked above it.
    """
    section, T = setup.config.sampling, setup.schedule.num_steps
    reach = T if setup.config.fine.t_range == "all" else setup.handover
    levels = sorted({min(max(1, round(level * T)), reach) for level in LEVELS})
    return (
        [section.handover] if section.handover else levels,
        [False, True] if section.fine_labels is None else [section.fine_labels],
        [section.candidates] if section.candidates else [1, CANDIDATES],
    )


def _judged_classes(held: ClientImages, coarse: GaussianDenoiser) -> list[int]:
    """Classes of the client's majority with enough held-out images, and with a Gaussian."""
    labels = held.images.labels[held.heldout]
    counts = np.bincount(labels, minlength=held.images.num_classes)
    gaussians = coarse.gaussians
    known = set(gaussians.classes[gaussians.weights > 0].tolist())
    found = [k for k in held.majority if counts[k] >= LEAST_OF_CLASS and k in known]
    return sorted(found, key=lambda k: (-counts[k], k))


def _accepted(without: float, count: int) -> float:
    """The largest share of near-copies among `count` images that may be, where so many are there
    without copying."""
    error = (2.0 * without * (1.0 - without) / count) ** 0.5  # of the difference of two such shares
    return without + COPIES + error


def _nearest(tried: Sequence[Likeness]) -> int:
    """Where the distance is smallest, of those whose images are recognised."""
    least = _recognised(max(one.fidelity for one in tried))
    far = [one.distance if one.fidelity >= least else math.inf for one in tried]
    return int(np.argmin(far))


def _recognised(best: float) -> float:
    """The smallest share of recognised images that may be, where the best is so much."""
    # Where none of them failed there is an error all the same.
    p = (IMAGES * best + 1.0) / (IMAGES + 2.0)
    return best - (2.0 * p * (1.0 - p) / IMAGES) ** 0.5
