"""Denoisers whose membership statistics are known: linear, and exactly memorising."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedpdm.attacks.membership import AttackTarget
from fedpdm.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear")
SHAPE = (1, 4, 4)


class LinearDenoiser:
    """Posterior mean of N(mean_y, variance I): x0_hat = m + g_t (x_t - a m), g = a v/(a^2 v + s^2).

    `means` has a row per class and, last, one for no label.
    """

    def __init__(self, means: np.ndarray, *, variance: float) -> None:
        self.means = torch.from_numpy(means).double()
        self.variance = variance
        self.asked: list[int] = []

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.asked += t.unique().tolist()
        abar = SCHEDULE.gather(t, x_t)
        mean = self.means[labels].view(-1, 1, 1, 1)
        gain = abar.sqrt() * self.variance / (abar * self.variance + 1.0 - abar)
        return (mean + gain * (x_t.double() - abar.sqrt() * mean)).to(x_t.dtype)


class MemorisingDenoiser(nn.Module):
    """Posterior mean over a finite member set, exactly: softmax over members.

    What an infinitely trained, infinitely large network would be. With `labels` a question that
    has one is answered from the members of that class. Members and the logarithms of their
    weights are its parameters.
    """

    def __init__(self, members: torch.Tensor, labels: torch.Tensor | None) -> None:
        super().__init__()
        self.labels = labels
        self.shape = members.shape[1:]
        self.members = nn.Parameter(members.flatten(1).clone())
        self.log_weights = nn.Parameter(torch.zeros(len(members)))

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x_t.flatten(1)
        abar = SCHEDULE.gather(t, x).to(x.dtype)
        distance = (x[:, None] - abar.sqrt()[:, None] * self.members).square().sum(dim=2)
        logits = self.log_weights - distance / (2.0 * (1.0 - abar))
        if self.labels is not None:
            other = (labels[:, None] != self.labels) & (labels[:, None] >= 0)
            logits = logits.masked_fill(other, -torch.inf)
        share = logits.softmax(dim=1)
        return (share @ self.members).view(-1, *self.shape)


def linear_target(
    means: tuple[float, ...] = (0.0,),
    *,
    variance: float = 0.5,
    t_range: tuple[int, int] = (1, 1000),
    labels_known: bool = True,
) -> AttackTarget:
    return AttackTarget(
        denoiser=LinearDenoiser(np.array(means), variance=variance),
        schedule=SCHEDULE,
        t_range=t_range,
        labels_known=labels_known,
    )


def memorising_target(
    members: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    t_range: tuple[int, int] = (1, 1000),
) -> AttackTarget:
    denoiser = MemorisingDenoiser(members, labels)
    return AttackTarget(
        denoiser=denoiser,
        schedule=SCHEDULE,
        t_range=t_range,
        parameters=tuple(denoiser.parameters()),
    )


def images(count: int, *, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(count, *SHAPE), standard normal."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, *SHAPE))).to(dtype)


def no_labels(count: int) -> torch.Tensor:
    return torch.full((count,), -1)
