"""The Bayes-optimal estimate of an image from a noisy one, where the prior is known.

For a Gaussian mixture it is `fedpdm.diffusion.gmm.MixtureDenoiser`. Here the prior is a finite
public set: one of M known images x_j, equally likely. The clipped images c_j are what noise was
added to, so

    p(j | x_t) ~ exp(-||x_t / sqrt(abar_t) - c_j||^2 / (2 sigma_t^2)),
    sigma_t^2 = (1 - abar_t) / abar_t,

and E[x | x_t] = sum_j p(j | x_t) x_j has the least mean squared error of all estimates: no
attacker who considers the same M images reconstructs better.
"""

from __future__ import annotations

import math

import torch

from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.mechanism import clip_l2

__all__ = ["CandidateDenoiser"]

_VALUES = 1 << 22


class CandidateDenoiser:
    """E[x | x_t, y] over a finite set: a `DenoisingFunction`.

    Args:
        candidates: (M, *) float, at the models' scale, unclipped.
        labels: int (M,): with a label y, only candidates of that class are considered.
        clip_norm: noise was added to the clipped candidates; None: to the candidates themselves.
        restore: answers are the unclipped candidates (the attacker knows them), else the clipped.
    """

    def __init__(
        self,
        candidates: torch.Tensor,
        labels: torch.Tensor,
        *,
        schedule: NoiseSchedule,
        clip_norm: float | None = None,
        restore: bool = True,
    ) -> None:
        if len(candidates) == 0 or labels.shape != (len(candidates),):
            raise ValueError(
                f"candidates must be (M, *) with labels (M,), M at least 1, got "
                f"{tuple(candidates.shape)} and {tuple(labels.shape)}"
            )
        clipped = candidates if clip_norm is None else clip_l2(candidates, clip_norm=clip_norm)
        self.schedule = schedule
        self.labels = labels
        self._means = clipped.flatten(1).double()
        self._answers = candidates.flatten(1).double() if restore else self._means
        self._norms = self._means.square().sum(dim=1)

    def log_posterior(
        self, x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor
    ) -> torch.Tensor:
        """log p(j | x_t, y), float64 (B, M); x_t (B, *), t int (B,), a negative label is none."""
        abar = self.schedule.gather(t, x_t).flatten()
        sigma2 = ((1.0 - abar) / abar)[:, None]
        y = x_t.flatten(1).double() / abar.sqrt()[:, None]
        logits = (y @ self._means.T - 0.5 * self._norms) / sigma2
        outside = (labels[:, None] >= 0) & (labels[:, None] != self.labels)
        if bool(outside.all(dim=1).any()):
            missing = int(labels[outside.all(dim=1)][0])
            raise ValueError(f"candidates must hold an image of class {missing}, got none")
        return logits.masked_fill(outside, -math.inf).log_softmax(dim=1)

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape and dtype."""
        rows = max(1, _VALUES // len(self._means))
        parts = zip(x_t.split(rows), t.split(rows), labels.split(rows), strict=True)
        answers = [self.log_posterior(x, s, labels=y).exp() @ self._answers for x, s, y in parts]
        return torch.cat(answers).view(x_t.shape).to(x_t.dtype)
