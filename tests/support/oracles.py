"""Closed forms and statistical checks that the tests share; none of it calls fedpdm.

Posterior means: for x_t = a x_0 + s z with a = sqrt(abar_t), s = sqrt(1 - abar_t),

    x_0 ~ N(m, S):              E[x_0 | x_t] = m + a S (a^2 S + s^2 I)^-1 (x_t - a m)
    x_0 ~ sum_k w_k N(m_k, v I): sum_k r_k(x_t) (m_k + a v / (a^2 v + s^2) (x_t - a m_k)).

Statistical checks return a description of the first deviation or None, so that a test can assert
None for the code and a description for a planted fault. Bounds follow from the sample size at a
stated two-sided significance, shared evenly among the comparisons made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, stats

Array = NDArray[np.float64]


class _PosteriorMean(ABC):
    """A denoising function that remembers how it was called."""

    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)
        self.levels: list[int] = []
        self.flags: list[torch.Tensor | None] = []

    @abstractmethod
    def _estimate(self, x: Array, abar: Array, labels: NDArray[np.int64]) -> Array:
        """x0_hat (B, d) of x (B, d) at abar (B, 1)."""

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.levels += sorted(set(t.tolist()))
        self.flags.append(clipped)
        abar = self.alphas_cumprod[t.numpy()][:, None]
        x = x_t.detach().double().flatten(1).numpy()
        estimate = self._estimate(x, abar, labels.numpy())
        return torch.from_numpy(estimate).view(x_t.shape).to(x_t.dtype)


class GaussianPosterior(_PosteriorMean):
    """E[x_0 | x_t] for x_0 ~ N(mean, cov) in R^d; tensors (B, ...) with d numbers per example."""

    def __init__(self, alphas_cumprod: ArrayLike, mean: ArrayLike, cov: ArrayLike) -> None:
        super().__init__(alphas_cumprod)
        self.mean = np.asarray(mean, dtype=np.float64)
        self.eigenvalues, self.basis = np.linalg.eigh(np.asarray(cov, dtype=np.float64))

    def _estimate(self, x: Array, abar: Array, labels: NDArray[np.int64]) -> Array:
        a = np.sqrt(abar)
        gain = a * self.eigenvalues / (abar * self.eigenvalues + 1.0 - abar)
        return self.mean + (gain * ((x - a * self.mean) @ self.basis)) @ self.basis.T

    def affine(self, t: int) -> tuple[Array, Array]:
        """(K, k) with E[x_0 | x_t] = K x_t + k."""
        abar = self.alphas_cumprod[t]
        gain = math.sqrt(abar) * self.eigenvalues / (abar * self.eigenvalues + 1.0 - abar)
        matrix = (self.basis * gain) @ self.basis.T
        return matrix, self.mean - math.sqrt(abar) * matrix @ self.mean


class MixturePosterior(_PosteriorMean):
    """E[x_0 | x_t, y] for the mixture of N(means[k], var I); labels choose k, -1 the mixture."""

    def __init__(self, alphas_cumprod: ArrayLike, means: ArrayLike, var: float) -> None:
        super().__init__(alphas_cumprod)
        self.means = np.asarray(means, dtype=np.float64)  # (K, d), equal weights
        self.var = var

    def _estimate(self, x: Array, abar: Array, labels: NDArray[np.int64]) -> Array:
        a, spread = np.sqrt(abar), abar * self.var + 1.0 - abar
        residual = x[:, None, :] - a[:, :, None] * self.means[None]  # (B, K, d)
        log_density = -(residual**2).sum(axis=2) / (2.0 * spread)
        log_density[
            (labels[:, None] >= 0) & (np.arange(len(self.means)) != labels[:, None])
        ] = -np.inf
        share = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        each = self.means[None] + (a * self.var / spread)[:, :, None] * residual
        return (share[:, :, None] * each).sum(axis=1)


def hockey_stick(mu: float, epsilon: float) -> float:
    """delta(epsilon) between N(mu, 1) and N(0, 1): the integral of max(0, p - e^eps q)."""
    start = epsilon / mu + mu / 2.0  # where p = e^eps q

    def excess(x: float) -> float:
        p = -0.5 * (x - mu) ** 2
        return math.exp(p) * -math.expm1(epsilon + mu**2 / 2.0 - mu * x) / math.sqrt(2 * math.pi)

    end = max(start, mu) + 12.0
    return float(integrate.quad(excess, start, end, epsabs=0.0, epsrel=1e-11, limit=400)[0])


def moments_fault(
    samples: ArrayLike,
    mean: ArrayLike,
    cov: ArrayLike,
    *,
    significance: float = 1e-6,
    slack: float = 0.0,
) -> str | None:
    """How samples (N, d) deviate from N(mean, cov), or None.

    In whitened coordinates means are N(0, 1/N), variances chi2_(N-1) / (N-1), and covariances have
    standard deviation 1 / sqrt(N). `slack` is added to every bound: for discretisation only.
    """
    x = np.asarray(samples, dtype=np.float64)
    n, d = x.shape
    root = np.linalg.cholesky(np.asarray(cov, dtype=np.float64))
    y = np.linalg.solve(root, (x - np.asarray(mean, dtype=np.float64)).T)
    tail = significance / (2 * (2 * d + d * (d - 1) // 2))
    z = float(stats.norm.isf(tail)) / math.sqrt(n)
    low = float(stats.chi2.ppf(tail, n - 1)) / (n - 1) - slack
    high = float(stats.chi2.isf(tail, n - 1)) / (n - 1) + slack
    covariance = np.cov(y)
    covariance = covariance.reshape(d, d)
    for i in range(d):
        if not abs(y[i].mean()) <= z + slack:
            return f"mean {i} is off by {y[i].mean():.4f}, allowed {z + slack:.4f}"
        if not low <= covariance[i, i] <= high:
            return f"variance {i} is {covariance[i, i]:.4f}, allowed {low:.4f} to {high:.4f}"
        for j in range(i):
            if not abs(covariance[i, j]) <= z + slack:
                return f"covariance {i}, {j} is {covariance[i, j]:.4f}, allowed {z + slack:.4f}"
    return None


def normal_fault(values: ArrayLike, *, significance: float = 1e-6) -> str | None:
    """How values (N,) deviate from N(0, 1) in moments or Kolmogorov-Smirnov; or None."""
    x = np.asarray(values, dtype=np.float64)
    n, share = len(x), significance / 3
    if fault := moments_fault(x[:, None], [0.0], [[1.0]], significance=share):
        return fault
    if (p := stats.kstest(x, "norm").pvalue) < share:
        return f"Kolmogorov-Smirnov p = {p:.2e}"
    kurtosis = float((x**4).mean())  # mean 3, variance 96 / n
    if abs(kurtosis - 3.0) > (bound := stats.norm.isf(share / 2) * math.sqrt(96.0 / n)):
        return f"fourth moment is {kurtosis:.4f}, allowed 3 +- {bound:.4f}"
    return None


def zero_mean_fault(values: ArrayLike, *, significance: float = 1e-6) -> str | None:
    """Whether the columns of values (N, k) have a mean that is not zero, by their own spread."""
    x = np.asarray(values, dtype=np.float64)
    score = x.mean(axis=0) / (x.std(axis=0, ddof=1) / math.sqrt(len(x)))
    bound = float(stats.norm.isf(significance / (2 * x.shape[1])))
    if np.abs(score).max() > bound:
        return f"mean is {np.abs(score).max():.1f} standard errors from zero, allowed {bound:.1f}"
    return None


def binomial_bounds(n: int, p: float, *, significance: float = 1e-6) -> tuple[int, int]:
    """Counts of n trials that a rate of p explains at the significance."""
    low = stats.binom.ppf(significance / 2, n, p)
    return int(low), int(stats.binom.isf(significance / 2, n, p))


def trailing_levels(num_levels: int, num_steps: int) -> list[int]:
    """Noise levels that a sampler of `num_steps` visits: evenly spaced, the last level first."""
    return [round(num_levels - k * num_levels / num_steps) for k in range(num_steps)]


def chain_moments(
    alphas_cumprod: ArrayLike,
    levels: list[int],
    answer: Callable[[int], GaussianPosterior],
    *,
    mean: ArrayLike,
    cov: ArrayLike,
    stochastic: bool,
) -> tuple[Array, Array]:
    """Mean and covariance after a whole reverse chain whose denoisers are Gaussian posteriors.

    Every step is affine: DDPM Eq. 6-7 with each stride as one step (stochastic), or DDIM Eq. 12
    with eta = 0. `answer(t)` is the denoiser at level t.
    """
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    m, c = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    eye = np.eye(len(m))
    for t, s in zip(levels, [*levels[1:], 0], strict=True):
        gain, offset = answer(t).affine(t)
        if stochastic:
            r = abar[t] / abar[s]
            clean = math.sqrt(abar[s]) * (1 - r) / (1 - abar[t])
            step = clean * gain + math.sqrt(r) * (1 - abar[s]) / (1 - abar[t]) * eye
            variance = (1 - r) * (1 - abar[s]) / (1 - abar[t])
        else:
            ratio = math.sqrt((1 - abar[s]) / (1 - abar[t]))
            clean = math.sqrt(abar[s]) - ratio * math.sqrt(abar[t])
            step, variance = clean * gain + ratio * eye, 0.0
        m, c = step @ m + clean * offset, step @ c @ step.T + variance * eye
    return m, c
