"""The closed forms that the toy's measurements must match.

Setting: component N(mu, diag(v)), known v; every denoiser is the linear posterior of its own
estimate of mu. The client's estimate mu_m is the mean of its n points, the coarse estimate mu_G
that of the N releases of all clients, of variance v + sigma^2, sigma^2 = (1 - abar_t0) / abar_t0.

Per axis, the hand-over at t0 leaves the sample mean w mu_G + (1 - w) mu_m, with

    w = v / (v + sigma^2)          ancestral sampling (DDPM): the posterior forgets
    w = sqrt(v / (v + sigma^2))    probability flow (DDIM, DPM-Solver++): the flow keeps more,

and the right variance. So the squared 2-Wasserstein distance to the truth is, in expectation,

    sum_i  g^2 (v + sigma^2) / N + (1 - w)^2 v / n + 2 g (1 - w) v / N  +  (w_T mu)^2.

The third term is there because the client's own n points are among the N. g = w - w_T, and the
fourth term, are there because sampling starts at N(0, I) instead of at q(x_T), w_T being w at
sigma_T: a share w_T of the mean is lost. With w_T = 0 and v = 1 the first two terms are the closed
form of docs/method.md section 5. The paper's Theorem 5.2 bounds the same quantity.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "SAMPLER_KINDS",
    "coarse_weight",
    "expected_w2",
    "published_ratio",
    "theorem_bound",
    "theorem_gain",
]

SAMPLER_KINDS = ("ancestral", "flow")


def coarse_weight(variances: ArrayLike, sigma2: float, *, kind: str) -> NDArray[np.float64]:
    """w per axis, (d,): the share of the coarse mean in the samples' mean.

    `kind` is one of `SAMPLER_KINDS`. `ValueError` for another, or for a negative sigma2.
    """
    if kind not in SAMPLER_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SAMPLER_KINDS)}, got {kind!r}")
    if not sigma2 >= 0:
        raise ValueError(f"sigma2 must be at least 0, got {sigma2}")
    v = np.asarray(variances, dtype=np.float64)
    share = v / (v + sigma2)
    return np.sqrt(share) if kind == "flow" else share


def expected_w2(
    method: str,
    *,
    mean: ArrayLike,
    variances: ArrayLike,
    num_own: int,
    num_all: int,
    sigma2: float,
    sigma2_T: float,
    kind: str = "ancestral",
) -> float:
    """E W2^2 between the samples of one class and the truth, for `alone`, `pfdm` or `central`.

    Args:
        mean, variances: of the component, (d,).
        num_own: n, the client's points of the class; num_all: N, everybody's, these included.
        sigma2: noise variance of a release over its signal's scale; sigma2_T: the same at T.
        kind: of sampler, see `coarse_weight`.
    """
    v, mu = np.asarray(variances, dtype=np.float64), np.asarray(mean, dtype=np.float64)
    lost = coarse_weight(v, sigma2_T, kind=kind)
    bias = float(np.sum((lost * mu) ** 2))
    if method in ("alone", "central"):
        count = num_own if method == "alone" else num_all
        return bias + float(np.sum((1.0 - lost) ** 2 * v)) / count
    if method != "pfdm":
        raise ValueError(f"method must be alone, pfdm or central, got {method!r}")
    w = coarse_weight(v, sigma2, kind=kind)
    shared, own = w - lost, 1.0 - w
    pooled = shared**2 * (v + sigma2) + 2.0 * shared * own * v
    return bias + float(np.sum(pooled / num_all + own**2 * v / num_own))


def published_ratio(sigma2: float, *, num_own: int, num_all: int) -> float:
    """E W2^2 of PFDM over training alone at v = 1, as in docs/method.md section 5.

    The client's own share of the N points is neglected there.
    """
    pooled = 1.0 / ((1.0 + sigma2) * num_all)
    return (pooled + (sigma2 / (1.0 + sigma2)) ** 2 / num_own) * num_own


def theorem_bound(sigma2: float, *, dim: int, num_own: int, num_all: int) -> float:
    """Theorem 5.2 of the paper without its constant: the order of E W2^2 at v = 1."""
    scale = 2.0 + 3.0 * sigma2
    return dim**2 * (2.0 / (scale * num_all) + 3.0 * sigma2 / (scale * num_own))


def theorem_gain(sigma2: float, *, dim: int, num_own: int) -> float:
    """Theorem 5.2's lower bound on the gain over training alone, without its constant."""
    return (sigma2 + 1.0) / (2.0 * sigma2 + 1.0) ** 2 * dim**2 / num_own


def sigma2_at(alpha_bar: float) -> float:
    """(1 - abar) / abar."""
    return (1.0 - alpha_bar) / alpha_bar if alpha_bar > 0 else math.inf
