"""Denoisers for points of R^d, shaped (B, 1, 1, d) like small images.

`LinearDenoiser` is the paper's piecewise-linear, class-conditional denoiser (section 5.2): for each
class the posterior mean of N(m_k, diag(v_k)), with the means m_k to be learned and v known. Its
denoising loss is quadratic in m_k, with the classes' sample means as minimiser, whatever the
weights of t; for releases at t0 they are the means of x_tilde / sqrt(abar_t0).

`MLPDenoiser` is a small network that assumes nothing about the data.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedpdm.diffusion.denoisers import NO_LABEL, TrainableDenoiser
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["LinearDenoiser", "MLPDenoiser", "average_means", "fit_means"]


class _Means(nn.Module):
    """The learned part of a `LinearDenoiser`."""

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.means = nn.Parameter(means.float().clone())


class LinearDenoiser(TrainableDenoiser):
    """x0_hat = m_k + g_t (x_t - a m_k), g_t = a v_k / (a^2 v_k + s^2); see `fedpdm.diffusion.gmm`.

    `means` is (K, d), the starting point of training or the fit; `variances` (K, d), not trained.
    """

    def __init__(
        self, means: torch.Tensor, variances: torch.Tensor, schedule: NoiseSchedule
    ) -> None:
        super().__init__()
        self.network: _Means = _Means(means)
        abar = torch.tensor(schedule.alphas_cumprod)[:, None, None]
        shared = bool((variances == variances[:1]).all())
        v = variances[:1] if shared else variances
        gain = abar.sqrt() * v / (abar * v + (1.0 - abar))  # (T + 1, 1 or K, d)
        self.register_buffer("_gain", gain.float(), persistent=False)
        self.register_buffer("_rest", (1.0 - gain * abar.sqrt()).float(), persistent=False)
        self._gain: torch.Tensor
        self._rest: torch.Tensor

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape (B, 1, 1, d); every example needs a label in [0, K)."""
        if bool((t == t[:1]).all()):
            t = t[:1]  # as samplers ask: one row of the tables for all
        kind = torch.zeros_like(t) if self._gain.shape[1] == 1 else labels
        m = self.network.means[labels]
        estimate = self._gain[t, kind] * x_t.flatten(1) + self._rest[t, kind] * m
        return estimate.view(x_t.shape)


def fit_means(points: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    """Mean per class, float64 (K, d), of points (N, d): the loss's minimiser in closed form.

    `ValueError` naming a class without points.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if bool((counts == 0).any()):
        raise ValueError(f"class {int(torch.argmin(counts))} has no points to fit")
    sums = torch.zeros((num_classes, points.shape[1]), dtype=torch.float64)
    sums.index_add_(0, labels, points.double())
    return sums / counts[:, None]


def average_means(means: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """Federated average of the clients' class means (K, d), with counts (M, K) as weights."""
    weights = counts.double() / counts.sum(dim=0)
    return torch.stack([w[:, None] * m.double() for w, m in zip(weights, means, strict=True)]).sum(
        dim=0
    )


class MLPDenoiser(TrainableDenoiser):
    """A three-layer network on (x_t, t, label) that predicts v (Salimans and Ho 2022).

    `width` units per layer, SiLU, sinusoidal features of log sigma_t, one embedding per class and
    one for no label.
    """

    def __init__(
        self, *, dim: int, num_classes: int, schedule: NoiseSchedule, width: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.network: nn.ModuleDict = nn.ModuleDict(
            {
                "label": nn.Embedding(num_classes + 1, width),
                "time": nn.Linear(16, width),
                "input": nn.Linear(dim, width),
                "middle": nn.Linear(width, width),
                "last": nn.Linear(width, width),
                "output": nn.Linear(width, dim),
            }
        )
        nn.init.zeros_(self.network["output"].weight)  # type: ignore[arg-type]
        abar = torch.tensor(schedule.alphas_cumprod)
        log_sigma = 0.5 * ((1.0 - abar).clamp_min(1e-8) / abar).log()
        angles = log_sigma[:, None] * torch.logspace(-1.5, 0.5, 8, base=2.0)[None] * math.pi / 2
        self.register_buffer("_signal", abar.sqrt().float(), persistent=False)
        self.register_buffer("_noise", (1.0 - abar).sqrt().float(), persistent=False)
        self.register_buffer(
            "_features", torch.cat([angles.sin(), angles.cos()], dim=1).float(), persistent=False
        )
        self._signal: torch.Tensor
        self._noise: torch.Tensor
        self._features: torch.Tensor

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape (B, 1, 1, d); labels in [0, K), or `NO_LABEL`."""
        x = x_t.flatten(1)
        act = nn.functional.silu
        parts = self.network
        label = torch.where(labels == NO_LABEL, self.num_classes, labels)
        condition = parts["time"](self._features[t]) + parts["label"](label)
        hidden = act(parts["input"](x) + condition)
        hidden = hidden + act(parts["middle"](hidden) + condition)
        hidden = hidden + act(parts["last"](hidden))
        raw = parts["output"](hidden)
        signal, noise = self._signal[t][:, None], self._noise[t][:, None]
        return (signal * x - noise * raw).view(x_t.shape)
