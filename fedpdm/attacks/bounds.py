"""Lower bounds on epsilon from one run: m canaries, r guesses of their secret bits, v right.

Approximate DP (Steinke, Nasr and Jagielski 2023, Theorem 5.2): if a mechanism is (eps, delta)-DP,
v or more guesses are right with probability at most

    p = beta + 2 m alpha delta,   q = 1 / (1 + e^-eps),
    beta = P[Bin(r, q) >= v],     alpha = max_i P[v - i <= Bin(r, q) < v] / i.

Gaussian DP (Mahloujifar, Melis and Chaudhuri 2025, Auditing f-DP in one run). Let N be the number
of right guesses, J a uniform canary, r_i = P[J right, N >= i] and h_i = P[J wrong, N >= i].
Flipping the bit of J turns right into wrong and leaves the i right guesses elsewhere, so f-DP and
the concavity of fbar(x) = 1 - f(x) = Phi(Phi^-1(x) + mu) give r_(i+1) <= fbar(h_i). With
s_i = P[N >= i] and q_i = sum over j > i of s_j this reads

    m r_i = q_i + i s_i,    m h_i = (r - i) s_i - q_i,    q_i = q_(i+1) + s_(i+1),
    s_i >= (q_i + m fbar^-1((q_(i+1) + (i+1) s_(i+1)) / m)) / (r - i).

The right-hand sides grow in (q, s), so from s_v = tau, q_v = 0 they bound every N that has
P[N >= v] >= tau from below; if s_0 comes out above 1 there is none. Written so, nothing is
subtracted, and an underflow of fbar^-1 only weakens the bound.

Both hold for every mechanism, also one that treats all images alike: with probability 1/20 bad
luck for all of them. That costs: an honest mu = 2 shows as about 1.4 at m = 10,000, and guessing
all canaries as 0.7. If each image is noised *independently*, N is a sum of independent bits, each
right with probability at most Phi(mu / 2), and Clopper and Pearson's bound (1934) is exact.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from fedpdm.privacy.accountant import epsilon_spent, multiplier_for
from fedpdm.privacy.types import GaussianEvent

__all__ = [
    "best_num_guesses",
    "epsilon_of_mu",
    "gaussian_mu_bound",
    "independent_mu_bound",
    "independent_p_value",
    "mu_of_epsilon",
    "steinke_epsilon_bound",
]

Array = NDArray[np.float64]

_CONFIDENCE = 0.95
_GRID_SIZE = 64
_LARGEST_MU = 64.0


def epsilon_of_mu(mu: float, *, delta: float) -> float:
    """Exact epsilon at `delta` of a mu-Gaussian-DP mechanism; 0 at mu = 0."""
    if not (mu >= 0.0 and math.isfinite(mu)):
        raise ValueError(f"mu must be at least 0 and finite, got {mu}")
    multiplier = 1.0 / mu if mu > 0.0 else math.inf
    if not math.isfinite(multiplier):
        return 0.0
    return epsilon_spent([GaussianEvent(noise_multiplier=multiplier)], delta=delta)


def mu_of_epsilon(epsilon: float, *, delta: float) -> float:
    """Largest mu whose exact epsilon at `delta` is at most `epsilon`."""
    return 1.0 / multiplier_for(epsilon=epsilon, delta=delta)


def steinke_epsilon_bound(
    *,
    num_canaries: int,
    num_guesses: int,
    num_right: int,
    delta: float,
    confidence: float = _CONFIDENCE,
) -> float:
    """Largest epsilon that the guesses refute at `confidence`; 0 if they refute none.

    `num_guesses` must be fixed before the guesses are made. Within 1e-6, rounded down.

    Raises:
        ValueError: unless 0 <= num_right <= num_guesses <= num_canaries, num_guesses >= 1,
            delta in [0, 1) and confidence in (0, 1).
    """
    _check_counts(num_canaries, num_guesses, num_right, confidence)
    if not 0.0 <= delta < 1.0:
        raise ValueError(f"delta must be in [0, 1), got {delta}")

    def refuted(epsilon: float) -> bool:
        p = _steinke_p_value(epsilon, num_canaries, num_guesses, num_right, delta)
        return p < 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):  # ends: q rounds to 1 below 40, and then beta is 1
        low, high = high, 2.0 * high
    while high - low > 1e-6:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _steinke_p_value(
    epsilon: float, num_canaries: int, num_guesses: int, num_right: int, delta: float
) -> float:
    """Theorem 5.2: the chance of `num_right` or more right guesses is at most this."""
    q = float(special.expit(epsilon))
    beta = float(stats.binom.sf(num_right - 1, num_guesses, q))
    if delta == 0.0 or num_right == 0:
        return min(1.0, beta)
    below = stats.binom.pmf(np.arange(num_right - 1, -1, -1), num_guesses, q)
    alpha = float(np.max(np.cumsum(below) / np.arange(1, num_right + 1)))
    return min(1.0, beta + 2.0 * num_canaries * alpha * delta)


def best_num_guesses(
    mu: float, *, num_canaries: int, delta: float, confidence: float = _CONFIDENCE
) -> int:
    """How many guesses the one-run bounds do best with, by theory: fix it before looking.

    For the statistic T ~ N(+-mu/2, 1) of a Gaussian release, guessing where |T| > t guesses the
    share g = Phi(mu/2 - t) + Phi(-mu/2 - t) and is right with probability Phi(mu/2 - t) / g. Of
    a grid of shares, the one whose expected number of right guesses gives Steinke's bound most;
    the bound for Gaussian DP is largest at about the same.
    """
    if not (mu >= 0.0 and math.isfinite(mu)):
        raise ValueError(f"mu must be at least 0 and finite, got {mu}")
    _check_counts(num_canaries, num_canaries, 0, confidence)
    best, best_bound = num_canaries, -1.0
    thresholds = np.linspace(0.0, mu / 2.0 + 4.0, 25)
    right = special.ndtr(mu / 2.0 - thresholds)
    guessed = right + special.ndtr(-mu / 2.0 - thresholds)
    for share, accuracy in zip(guessed, right / guessed, strict=True):
        num_guesses = round(share * num_canaries)
        if num_guesses == 0:
            break
        bound = steinke_epsilon_bound(
            num_canaries=num_canaries,
            num_guesses=num_guesses,
            num_right=math.floor(accuracy * num_guesses),
            delta=delta,
            confidence=confidence,
        )
        if bound > best_bound:
            best, best_bound = num_guesses, bound
    return best


def gaussian_mu_bound(
    *, num_canaries: int, num_guesses: int, num_right: int, confidence: float = _CONFIDENCE
) -> float:
    """Largest mu of Gaussian DP that the guesses refute at `confidence`; 0 if they refute none.

    Within 1e-5, rounded down; at most 64. `epsilon_of_mu` turns it into epsilon.

    Raises:
        ValueError: unless 0 <= num_right <= num_guesses <= num_canaries, num_guesses >= 1 and
            confidence in (0, 1).
    """
    _check_counts(num_canaries, num_guesses, num_right, confidence)
    low, high = 0.0, _LARGEST_MU
    while high - low > 1e-5:  # sections of a grid: one pass over the guesses serves all its mu
        grid = np.linspace(low, high, _GRID_SIZE)
        refuted = _refuted(grid, num_canaries, num_guesses, num_right, 1.0 - confidence)
        last = int(np.count_nonzero(refuted)) - 1  # they are the smallest ones
        if last < 0:
            return 0.0  # only in the first pass
        if last == _GRID_SIZE - 1:
            return high
        low, high = float(grid[last]), float(grid[last + 1])
    return low


def _refuted(
    mu: Array, num_canaries: int, num_guesses: int, num_right: int, tau: float
) -> NDArray[np.bool_]:
    """For each mu, whether mu-Gaussian DP implies P[N >= num_right] < tau."""
    s, q = np.full_like(mu, tau), np.zeros_like(mu)
    for i in range(num_right - 1, -1, -1):
        right = np.minimum((q + (i + 1) * s) / num_canaries, 1.0)
        wrong = special.ndtr(special.ndtri(right) - mu)  # fbar^-1
        q += s
        s = np.maximum(s, (q + num_canaries * wrong) / (num_guesses - i))
        if (s > 1.0).all():
            break
    return s > 1.0 + 1e-9  # rounding of the sums stays far below


def independent_mu_bound(
    *, num_guesses: int, num_right: int, confidence: float = _CONFIDENCE
) -> float:
    """Largest mu that the guesses refute if images are noised independently; 0 if none.

    A guess on every canary, so that which are counted does not depend on the outcome.

    Raises:
        ValueError: unless 0 <= num_right <= num_guesses, num_guesses >= 1, confidence in (0, 1).
    """
    _check_counts(num_guesses, num_guesses, num_right, confidence)
    if num_right == 0:
        return 0.0
    wrong = num_guesses - num_right
    share = float(special.betaincinv(num_right, wrong + 1.0, 1.0 - confidence))
    return max(0.0, 2.0 * float(special.ndtri(share)))


def independent_p_value(mu: float, *, num_guesses: int, num_right: int) -> float:
    """Chance of `num_right` or more right guesses at most, of images noised independently."""
    _check_counts(num_guesses, num_guesses, num_right, _CONFIDENCE)
    return float(stats.binom.sf(num_right - 1, num_guesses, special.ndtr(mu / 2.0)))


def _check_counts(num_canaries: int, num_guesses: int, num_right: int, confidence: float) -> None:
    if num_canaries < 1:
        raise ValueError(f"num_canaries must be at least 1, got {num_canaries}")
    if not 1 <= num_guesses <= num_canaries:
        raise ValueError(f"num_guesses must be in [1, {num_canaries}], got {num_guesses}")
    if not 0 <= num_right <= num_guesses:
        raise ValueError(f"num_right must be in [0, {num_guesses}], got {num_right}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
