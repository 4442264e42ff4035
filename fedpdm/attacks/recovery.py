"""How good a reconstruction of an uploaded image is: distance, SSIM, re-identification.

With d(v) the L2 distance of a reconstruction v from the original x,

    recovery         = sum d(v) / sum d(none)        none:  the upload, only rescaled
    recovery (blind) = sum d(v) / sum d(blind)       blind: the mean of other images of the class

over the attacked images: 0 is perfect (docs/attacks.md). The first is 1 for "no attack",
but the noise of an upload is so large that an empty image scores well below 1, and at small t0 it
stays near 1 although everything is recovered. The second is 1 for who never saw the upload, so
it says what the upload gave away.

Re-identification: is the right original the nearest of N candidates? Structural similarity is
Wang et al. 2004's, by torchmetrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.memorisation import binomial_interval

__all__ = [
    "Identification",
    "blind_guess",
    "identify",
    "row_distances",
    "share_interval",
    "structural_similarity",
]

Array = NDArray[np.float64]

_SMALLEST_SSIM = 6  # pixels per side: its 11 x 11 window is filled up by reflection
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Identification:
    """How often the right original is the nearest of its candidates.

    `rate` = `num_right` / `num_images`, in [`low`, `high`] at `confidence` (Clopper and Pearson
    1934, which takes images as independent). `chance` is the mean of 1 / candidates. `rank_auc` is
    the mean share of the wrong candidates that are farther than the right one: 1/2 at chance among
    images of one class; who knows the label is above it among all.
    """

    num_images: int
    num_right: int
    rate: float
    low: float
    high: float
    confidence: float
    chance: float
    rank_auc: float


def row_distances(estimates: torch.Tensor, originals: torch.Tensor) -> Array:
    """L2 distances float64 (N,) of the rows of (N, *) tensors of one shape."""
    if estimates.shape != originals.shape:
        raise ValueError(
            f"estimates must have the originals' shape {tuple(originals.shape)}, "
            f"got {tuple(estimates.shape)}"
        )
    difference = estimates.double() - originals.double()
    distances: Array = difference.flatten(1).norm(dim=1).numpy()
    return distances


def structural_similarity(
    estimates: torch.Tensor, originals: torch.Tensor, *, bounds: tuple[float, float]
) -> Array | None:
    """SSIM per image, float64 (N,), of (N, C, H, W) tensors; values are clamped to `bounds`.

    None for images of fewer than 6 pixels per side, for which it is not defined.
    """
    if originals.ndim != 4 or min(originals.shape[2:]) < _SMALLEST_SSIM:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = [
        structural_similarity_index_measure(
            a.double(), b.double(), data_range=bounds, reduction="none"
        )
        for a, b in zip(estimates.split(_BATCH), originals.split(_BATCH), strict=True)
    ]
    similarity: Array = torch.cat([torch.as_tensor(v).view(-1) for v in values]).numpy()
    return similarity


def blind_guess(originals: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For each image the mean of the others of its class: the best guess without the upload.

    A class with one image gets the mean of all others. (N, *) float and int (N,) -> (N, *) float64;
    N at least 2.
    """
    if len(originals) < 2:
        raise ValueError(f"originals must hold at least 2 images, got {len(originals)}")
    rows = originals.flatten(1).double()
    guess = torch.empty_like(rows)
    for label in labels.unique().tolist():
        own = labels == label
        pool = own if int(own.sum()) > 1 else torch.ones_like(own)
        guess[own] = (rows[pool].sum(dim=0) - rows[own]) / (int(pool.sum()) - 1)
    return guess.view(originals.shape)


def identify(
    estimates: torch.Tensor,
    candidates: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    confidence: float = 0.95,
) -> Identification:
    """Is candidate i the nearest of the candidates to estimate i?

    Args:
        estimates, candidates: (N, *) float, row i of both from one image.
        labels: int (N,): candidates of another class are not considered. Labels are public, so
            this is what an attacker can do; default: all N are candidates.
        confidence: of the interval.
    """
    row_distances(estimates[:1], candidates[:1])  # its check
    own = torch.zeros(len(candidates), dtype=torch.int64) if labels is None else labels
    queries, rows = estimates.flatten(1).double(), candidates.flatten(1).double()
    centre = rows.mean(dim=0)
    queries, rows = queries - centre, rows - centre
    norms = rows.square().sum(dim=1)
    right, chance, farther = 0, [], []
    for start in range(0, len(queries), _BATCH):
        part = slice(start, start + _BATCH)
        here = torch.arange(len(queries))[part]
        squared = norms - 2.0 * queries[part] @ rows.T
        among = own[part, None] == own
        true = squared[torch.arange(len(here)), here]
        nearest = squared.masked_fill(~among, torch.inf).argmin(dim=1)
        right += int((nearest == here).sum())
        others = among.sum(dim=1) - 1
        chance.append(1.0 / (others + 1.0).double())
        beaten = (among & (squared > true[:, None])).sum(dim=1).double()
        equal = (among & (squared == true[:, None])).sum(dim=1).double() - 1.0
        known = others > 0
        farther.append(((beaten + 0.5 * equal)[known] / others[known]).double())
    ranks = torch.cat(farther)
    low, high = binomial_interval(right, len(queries), confidence=confidence)
    return Identification(
        num_images=len(queries),
        num_right=right,
        rate=right / len(queries),
        low=low,
        high=high,
        confidence=confidence,
        chance=float(torch.cat(chance).mean()),
        rank_auc=float(ranks.mean()) if len(ranks) else 0.5,
    )


def share_interval(
    distances: Array,
    reference: Array,
    *,
    confidence: float,
    num_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """(share, low, high) of `sum distances / sum reference`, float64 (N,) each, paired by image.

    The interval is the percentile bootstrap over images (Efron 1979). 0 where both are all 0.
    """

    def share(rows: NDArray[np.int64] | slice) -> Array:
        above, below = distances[rows].sum(axis=-1), reference[rows].sum(axis=-1)
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    each = np.array(
        [share(rng.integers(len(distances), size=len(distances))) for _ in range(num_bootstrap)]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(each, [tail, 1.0 - tail])
    return float(share(slice(None))), float(low), float(high)
