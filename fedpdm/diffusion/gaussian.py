"""Classes as Gaussians with few directions of their own: the exact denoiser at every t.

Component j, of class k_j and weight w_j, is N(m_j, S_j) in R^d with

    S_j = V_j' diag(g_j) V_j + rho_j (I - V_j' V_j),

r orthonormal rows V_j with variances g_j > 0 and the variance rho_j > 0 everywhere else. The
forward process makes that a^2 S_j + s^2 I, a^2 = abar, s^2 = 1 - abar: the same directions, other
variances. So with y = x_t - a m_j the posterior mean of the clean image is (docs/method.md
section 5)

    E[x_0 | x_t, j] = m_j + a S_j (a^2 S_j + s^2 I)^-1 y
                    = m_j + a (h(rho_j) y + V_j' diag(h(g_j) - h(rho_j)) V_j y),

    h(v) = v / (a^2 v + s^2),

and it is averaged over the components of the class, or over all without a label, with the weights
p(j | x_t) ~ w_j N(x_t; a m_j, a^2 S_j + s^2 I), which come from the same V_j y. Nothing is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["ClassGaussians", "GaussianDenoiser"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassGaussians:
    """J Gaussian components in R^d, each of a class.

    `means` float (J, d); `directions` (J, r, d), orthonormal rows; `variances` (J, r) and `rest`
    (J,) positive; `weights` (J,), at least 0, one of them positive; `classes` int (J,). A class may
    have several components or none. Computed with in float64. `ValueError` for anything else.
    """

    means: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    weights: Tensor
    classes: Tensor

    def __post_init__(self) -> None:
        for name in ("means", "directions", "variances", "rest", "weights"):
            object.__setattr__(self, name, getattr(self, name).double())
        count, d = self.means.shape if self.means.ndim == 2 else (-1, -1)
        r = self.variances.shape[-1] if self.variances.ndim == 2 else -1
        shapes = [tuple(t.shape) for t in (self.directions, self.variances, self.rest)]
        if shapes != [(count, r, d), (count, r), (count,)] or count < 1:
            raise ValueError(
                f"means {tuple(self.means.shape)}, directions, variances and rest must be (J, d), "
                f"(J, r, d), (J, r) and (J,), got {shapes}"
            )
        if self.weights.shape != (count,) or self.classes.shape != (count,):
            raise ValueError(f"weights and classes must be ({count},)")
        numbers = torch.cat([t.flatten() for t in self._floats()])
        if not bool(numbers.isfinite().all()):
            raise ValueError("means, directions, variances, rest and weights must be finite")
        least = min(float(self.rest.min()), float(self.variances.min()) if r else math.inf)
        if not least > 0.0:
            raise ValueError(f"variances must be positive, got {least:g}")
        if float(self.weights.min()) < 0.0 or not float(self.weights.sum()) > 0.0:
            raise ValueError("weights must be at least 0, and one of them positive")
        products = self.directions @ self.directions.transpose(1, 2)
        if r and not torch.allclose(products, torch.eye(r).to(products), atol=1e-4):
            raise ValueError("directions must be orthonormal rows")

    def _floats(self) -> tuple[Tensor, ...]:
        return self.means, self.directions, self.variances, self.rest, self.weights

    def tensors(self) -> dict[str, Tensor]:
        """By name, float32 and int64, as they are kept and sent."""
        names = ("means", "directions", "variances", "rest", "weights")
        values = {name: getattr(self, name).float() for name in names}
        return {**values, "classes": self.classes.to(torch.int64)}

    def to(self, device: torch.device) -> ClassGaussians:
        """The same on a device."""
        return ClassGaussians(**{name: getattr(self, name).to(device) for name in vars(self)})

    def draw(self, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """One float32 point (N, d) per label, int (N,); a negative label is any class.

        `ValueError` for a class without components.
        """
        share = self.weights.expand(len(labels), -1) * self._allowed(labels)
        if not bool((share.sum(dim=1) > 0).all()):
            raise ValueError("a class without components cannot be drawn from")
        chosen = torch.multinomial(share, 1, generator=generator)[:, 0]
        shape = (len(labels), self.means.shape[1])
        z = torch.randn(shape, generator=generator, device=self.means.device, dtype=torch.float64)
        along = self.rest[chosen].sqrt()[:, None] * z
        inside = torch.einsum("nrd,nd->nr", self.directions[chosen], z)
        more = self.variances[chosen].sqrt() - self.rest[chosen].sqrt()[:, None]
        along += torch.einsum("nr,nrd->nd", inside * more, self.directions[chosen])
        return (self.means[chosen] + along).float()

    def _allowed(self, labels: Tensor) -> Tensor:
        """1 where a component is of the label's class, or the label is none: float64 (B, J)."""
        same = self.classes[None, :] == labels[:, None].to(self.classes)
        return (same | (labels[:, None] == NO_LABEL).to(same.device)).double()

    def _seen(self, x_t: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """Of x_t (B, d) at abar (B, 1): V y (B, J, r) and log p(x_t | j) (B, J).

        y (B, J, d) itself is never made: for large images it would be most of the memory.
        """
        (d, r), a = (self.means.shape[1], self.variances.shape[1]), abar.sqrt()
        along = torch.einsum("jrd,bd->bjr", self.directions, x_t)
        along = along - a[:, :, None] * torch.einsum("jrd,jd->jr", self.directions, self.means)
        squares = x_t.square().sum(dim=1, keepdim=True) - 2.0 * a * (x_t @ self.means.T)
        squares = squares + abar * self.means.square().sum(dim=1)
        noise = 1.0 - abar
        inside = abar[:, :, None] * self.variances + noise[:, :, None]
        outside = abar * self.rest + noise
        left = (squares - along.square().sum(dim=2)).clamp_min(0.0)
        quadratic = left / outside + (along.square() / inside).sum(dim=2)
        scale = (d - r) * outside.log() + inside.log().sum(dim=2) + d * math.log(2.0 * math.pi)
        return along, -0.5 * (quadratic + scale)

    def log_joint(self, x_t: Tensor, abar: float | Tensor = 1.0) -> Tensor:
        """log of w_j p(x_t | j), weights made to sum to 1: float64 (B, J), of x_t (B, *).

        `abar` in (0, 1], one for all or (B,).
        """
        x = x_t.flatten(1).double()
        level = torch.as_tensor(abar, dtype=torch.float64, device=x.device).expand(len(x))
        return self._seen(x, level[:, None])[1] + self._log_weights()

    def _log_weights(self) -> Tensor:
        return (self.weights / self.weights.sum()).log()

    def log_class_joint(
        self, x_t: Tensor, num_classes: int, abar: float | Tensor = 1.0, *, even: bool = False
    ) -> Tensor:
        """log p(x_t, class), float64 (B, num_classes); -inf for a class without components.

        `even`: all classes that have components are equally likely. The largest is the class that
        the Gaussians read in x_t.
        """
        joint = self.log_joint(x_t, abar)
        classes = torch.arange(num_classes, device=self.classes.device)
        of_class = (self.classes[None, :] == classes[:, None]) & (self.weights > 0)
        masked = joint[:, None, :].masked_fill(~of_class[None], -math.inf)
        total = masked.logsumexp(dim=2)
        if even:
            own = self._log_weights().expand(num_classes, -1).masked_fill(~of_class, -math.inf)
            prior = own.logsumexp(dim=1)
            total = torch.where(prior.isfinite(), total - prior, total)
        return total

    def log_class_posterior(
        self, x_t: Tensor, num_classes: int, abar: float | Tensor = 1.0, *, even: bool = False
    ) -> Tensor:
        """log p(class | x_t); arguments and result as of `log_class_joint`."""
        joint = self.log_class_joint(x_t, num_classes, abar, even=even)
        return joint - joint.logsumexp(dim=1, keepdim=True)

    def posterior_mean(self, x_t: Tensor, abar: Tensor, labels: Tensor) -> Tensor:
        """E[x_0 | x_t, class] float64 (B, d) of x_t (B, d) at abar (B,), labels int (B,).

        A label without components is answered as no label.
        """
        x, level = x_t.double(), abar.double()[:, None]
        along, log_likelihood = self._seen(x, level)
        there = self.weights > 0
        allowed = (self._allowed(labels) > 0) & there
        allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, there)
        share = (log_likelihood + self._log_weights()).masked_fill(~allowed, -math.inf)
        share = share.softmax(dim=1)
        a, noise = level.sqrt(), 1.0 - level
        outside = self.rest / (level * self.rest + noise)  # (B, J)
        inside = self.variances / (level[:, :, None] * self.variances + noise[:, :, None])
        weight = share * outside
        mean = (share - level * weight) @ self.means + a * weight.sum(dim=1, keepdim=True) * x
        gain = (inside - outside[:, :, None]) * along * share[:, :, None]
        return mean + a * torch.einsum("bjr,jrd->bd", gain, self.directions)


class GaussianDenoiser:
    """`ClassGaussians` as a `DenoisingFunction` on tensors (B, *) of d numbers."""

    def __init__(self, gaussians: ClassGaussians, schedule: NoiseSchedule) -> None:
        self.gaussians = gaussians
        self.schedule = schedule

    def __call__(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor, clipped: Tensor | None = None
    ) -> Tensor:
        """x0_hat of x_t's shape and dtype; t int (B,), labels int (B,)."""
        flat = x_t.flatten(1)
        abar = self.schedule.gather(t, x_t).flatten()
        answer = self.gaussians.posterior_mean(flat, abar, labels)
        return answer.view(x_t.shape).to(x_t.dtype)
