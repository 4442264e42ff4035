"""Noise schedules and the forward process.

With betas b_1..b_T, `abar_t = prod_{s<=t} (1 - b_s)` and `abar_0 = 1`, the forward process is

    q(x_t | x_0) = N( sqrt(abar_t) x_0, (1 - abar_t) I )                          (DDPM Eq. 4)
    q(x_t | x_s) = N( sqrt(abar_t / abar_s) x_s, (1 - abar_t / abar_s) I ),  s <= t.

`t` counts the noising steps that were applied: 0 is clean, T is the end. diffusers counts from 0
for one step; that conversion is made in `fedpdm.diffusion.sampling` and
`fedpdm.diffusion.denoisers` alone. Coefficients are kept in float64.

Kinds of schedule, with u_t = (t / T + s) / (1 + s) pi / 2 and s = 0.008:

    linear           b_t evenly spaced from beta_start to beta_end       (DDPM section 4)
    cosine           abar_t = cos(u_t) / cos(u_0)                        (not squared)
    squared_cosine   abar_t = cos(u_t)^2 / cos(u_0)^2                    (Nichol and Dhariwal 2021,
                     Eq. 17; squaredcos_cap_v2 in diffusers)

In both cosines abar_T would be 0, so betas are capped at 0.999 as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from fedpdm.diffusion.names import SCHEDULE_KINDS

__all__ = ["NoiseSchedule", "make_schedule", "q_sample", "q_sample_from"]

MAX_STEPS = 1_000_000
COSINE_OFFSET = 0.008  # s; keeps the first betas from vanishing
MAX_BETA = 0.999  # of the cosines; leaves the last step a signal
_COSINE_POWERS = {"cosine": 1, "squared_cosine": 2}


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule of T steps.

    `betas` is float64 (T,) with `betas[t - 1]` the variance added by step t; `alphas_cumprod` is
    float64 (T + 1,) indexed by t, with `alphas_cumprod[0] == 1`.
    """

    kind: str
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    _tables: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    def alpha_bar(self, t: int) -> float:
        """abar_t for t in [0, T]; `ValueError` outside."""
        if not 0 <= t <= self.num_steps:
            raise ValueError(f"t must be in [0, {self.num_steps}], got {t}")
        return float(self.alphas_cumprod[t])

    def noise_to_signal(self, t: int) -> float:
        """sigma_t = sqrt((1 - abar_t) / abar_t): the noise in units of the clean image."""
        abar = self.alpha_bar(t)
        return math.sqrt((1.0 - abar) / abar)

    def gather(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """abar_t per example as float64 (B, 1, ..., 1) on `like`'s device; t is int (B,).

        `ValueError` for t outside [0, T], where t is on the CPU. On a GPU such an index stops the
        device with an assertion of its own: to look at t would make every step wait for it.
        """
        table = self._table(like.device)
        try:
            values = table.index_select(0, t.to(like.device, torch.int64))
        except IndexError:
            found = t.unique().tolist()
            raise ValueError(f"t must be in [0, {self.num_steps}], got {found}") from None
        return values.view(-1, *([1] * (like.ndim - 1)))

    def _table(self, device: torch.device) -> torch.Tensor:
        """`alphas_cumprod` on a device, copied there once."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.alphas_cumprod, device=device)
        return self._tables[device]


def make_schedule(
    kind: str,
    *,
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> NoiseSchedule:
    """A schedule of one of `SCHEDULE_KINDS` (see the module); only `linear` takes the betas.

    `ValueError` for another kind, for num_steps outside [2, 1,000,000], for betas outside (0, 1)
    and for an abar_T that float32 cannot hold.
    """
    if num_steps < 2:
        raise ValueError(f"schedule.num_steps must be at least 2, got {num_steps}")
    if num_steps > MAX_STEPS:
        raise ValueError(f"schedule.num_steps must be at most {MAX_STEPS}, got {num_steps}")
    if kind == "linear":
        betas = _linear_betas(num_steps, beta_start, beta_end)
    elif kind in _COSINE_POWERS:
        betas = _cosine_betas(num_steps, power=_COSINE_POWERS[kind])
    else:
        known = f"{', '.join(SCHEDULE_KINDS[:-1])} or {SCHEDULE_KINDS[-1]}"
        raise ValueError(f"schedule.kind must be {known}, got {kind!r}")
    alphas_cumprod = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    if alphas_cumprod[-1] < np.finfo(np.float32).tiny:
        raise ValueError(  # linear alone: abar_T of the cosines is at least 2e-15
            f"schedule.beta_end: alphas_cumprod falls to {alphas_cumprod[-1]:.3g} at the last "
            "step, too small for float32; lower beta_end or num_steps"
        )
    betas.setflags(write=False)
    alphas_cumprod.setflags(write=False)
    return NoiseSchedule(kind=kind, betas=betas, alphas_cumprod=alphas_cumprod)


def _linear_betas(num_steps: int, beta_start: float, beta_end: float) -> np.ndarray:
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            "schedule.beta_start and beta_end must satisfy 0 < start <= end < 1, "
            f"got {beta_start} and {beta_end}"
        )
    return np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)


def _cosine_betas(num_steps: int, *, power: int) -> np.ndarray:
    grid = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    f = np.cos((grid + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * np.pi / 2.0) ** power
    return np.minimum(1.0 - f[1:] / f[:-1], MAX_BETA)


def q_sample(
    schedule: NoiseSchedule, x_0: torch.Tensor, t: torch.Tensor, *, noise: torch.Tensor
) -> torch.Tensor:
    """x_t given clean x_0: (B, *), t int (B,) in [0, T], noise (B, *) -> (B, *). DDPM Eq. 4."""
    abar = schedule.gather(t, x_0)
    return abar.sqrt().to(x_0.dtype) * x_0 + (1.0 - abar).sqrt().to(x_0.dtype) * noise


def q_sample_from(
    schedule: NoiseSchedule,
    x_s: torch.Tensor,
    *,
    s: torch.Tensor | int,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """x_t given x_s for s <= t: adds only the noise between s and t.

    Post-processing of x_s: applied to a stored release it spends no privacy. Shapes as in
    `q_sample`; `ValueError` if any s > t.
    """
    s = torch.full_like(t, s) if isinstance(s, int) else s
    if t.device.type == "cpu" and bool((s > t).any()):  # on a GPU the result is NaN
        raise ValueError(f"s must be at most t, got s={int(s.max())}, t={int(t.min())}")
    ratio = schedule.gather(t, x_s) / schedule.gather(s, x_s)
    return ratio.sqrt().to(x_s.dtype) * x_s + (1.0 - ratio).sqrt().to(x_s.dtype) * noise
