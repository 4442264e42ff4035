"""Gaussian mixtures with axis-aligned components: everything about them is known exactly.

Component k is N(mu_k, diag(v_k)). The forward process keeps a mixture a mixture,

    x_t | y = k  ~  N( a mu_k, a^2 v_k + s^2 ),   a^2 = abar_t, s^2 = 1 - abar_t   (DDPM Eq. 4),

and so does an unclipped release (t = t0). Given x_t, the clean point has the posterior mean

    E[x_0 | x_t, y = k] = mu_k + g_k (x_t - a mu_k),   g_k = a v_k / (a^2 v_k + s^2),

averaged over k with the responsibilities p(k | x_t) where no label is given. The score follows by
Tweedie's formula: grad log q(x_t) = (a E[x_0 | x_t] - x_t) / s^2.

Axes lose no generality: clipping, noise and samplers are invariant to rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["GaussianMixture", "MixtureDenoiser", "make_mixture", "spectrum_variances"]

SPECTRA = ("unit", "power")


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianMixture:
    """K equally likely components in R^d: `means` and `variances` are float64 (K, d), v > 0."""

    means: torch.Tensor
    variances: torch.Tensor

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.means.shape != self.variances.shape:
            raise ValueError(
                "means and variances must have one shape (K, d), got "
                f"{tuple(self.means.shape)} and {tuple(self.variances.shape)}"
            )
        if not bool((self.variances > 0).all()):
            raise ValueError(f"variances must be positive, got {float(self.variances.min()):g}")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[1]

    def repeated(self, times: int) -> GaussianMixture:
        """`times` copies side by side: class r K + k is class k of copy r."""
        return GaussianMixture(
            means=self.means.repeat(times, 1), variances=self.variances.repeat(times, 1)
        )

    def draw(self, labels: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """One float32 point (N, d) per label, int (N,)."""
        z = torch.randn((len(labels), self.dim), generator=generator)
        return z.mul_(self.variances.sqrt().float()[labels]).add_(self.means.float()[labels])

    def noised(self, alpha_bar: float) -> GaussianMixture:
        """The distribution of sqrt(abar) x_0 + sqrt(1 - abar) z; of an unclipped release at t0."""
        if not 0.0 < alpha_bar <= 1.0:
            raise ValueError(f"alpha_bar must be in (0, 1], got {alpha_bar}")
        return GaussianMixture(
            means=math.sqrt(alpha_bar) * self.means,
            variances=alpha_bar * self.variances + (1.0 - alpha_bar),
        )

    def _log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, k), float64 (N, K)."""
        residual = x.double()[:, None, :] - self.means
        exponent = (residual.square() / self.variances).sum(dim=2)
        scale = (2.0 * math.pi * self.variances).log().sum(dim=1)
        return -0.5 * (exponent + scale) - math.log(self.num_classes)

    def log_density(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x) of points (N, d), or log p(x | y) with labels int (N,): float64 (N,)."""
        joint = self._log_joint(x)
        if labels is None:
            return joint.logsumexp(dim=1)
        return joint.gather(1, labels[:, None])[:, 0] + math.log(self.num_classes)

    def score(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """grad_x log p(x), or of log p(x | y): float64 (N, d)."""
        each = (self.means - x.double()[:, None, :]) / self.variances
        if labels is not None:
            return each[torch.arange(len(x)), labels]
        share = self._log_joint(x).softmax(dim=1)
        return (share[:, :, None] * each).sum(dim=1)


class MixtureDenoiser:
    """E[x_0 | x_t, y] of a mixture, exactly: a `DenoisingFunction` on tensors (B, *) of d numbers.

    A negative label is none: the average over the classes.
    """

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        self.mixture = mixture
        self.schedule = schedule

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape and dtype; t int (B,), labels int (B,)."""
        x = x_t.flatten(1).double()
        estimate = torch.empty_like(x)
        for level in t.unique().tolist():
            abar = self.schedule.alpha_bar(level)
            known = (t == level) & (labels >= 0)
            unknown = (t == level) & (labels < 0)
            noised = self.mixture.noised(abar)
            for rows, given in ((known, labels[known]), (unknown, None)):
                here = x[rows]
                score = noised.score(here, given)
                estimate[rows] = (here + (1.0 - abar) * score) / math.sqrt(abar)
        return estimate.view(x_t.shape).to(x_t.dtype)


def spectrum_variances(spectrum: str, dim: int, *, exponent: float = 2.0) -> torch.Tensor:
    """Variances of the axes, float64 (d,), with mean 1: so the norm to be hidden is the same.

    `unit`: all 1. `power`: the i-th proportional to i^-exponent, like the principal components of
    images (Field 1987 finds about 2 for the power of natural images over frequency).
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if spectrum == "unit":
        return torch.ones(dim, dtype=torch.float64)
    if spectrum == "power":
        variances = torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent
        return variances * (dim / variances.sum())
    raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}, got {spectrum!r}")


def make_mixture(*, num_classes: int, radius: float, variances: torch.Tensor) -> GaussianMixture:
    """K components whose means lie on a circle of the given radius in the first two dimensions.

    In one dimension they are evenly spaced on [-radius, radius]. `variances` is float64 (d,), the
    same for all classes.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if not (radius >= 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be at least 0, got {radius}")
    means = torch.zeros((num_classes, len(variances)), dtype=torch.float64)
    if len(variances) == 1:
        means[:, 0] = torch.linspace(-radius, radius, num_classes, dtype=torch.float64)
    else:
        angle = 2.0 * math.pi * torch.arange(num_classes, dtype=torch.float64) / num_classes
        means[:, 0], means[:, 1] = radius * angle.cos(), radius * angle.sin()
    return GaussianMixture(means=means, variances=variances.expand(num_classes, -1).clone())
