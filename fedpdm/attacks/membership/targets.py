"""The target of a membership attack: any denoiser, and the noise levels it was trained for.

A denoiser answers with x0_hat; the attacks are written in the noise it implies,

    eps_hat = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t)                     (DDPM Eq. 15).

Attacks of the literature ask a model at any t. A coarse model is trained for t > t0 only, so a
target carries its range; a level outside is moved to the nearest one inside. Where an attack
starts from the clean image (t = 0), it starts here from the noiseless point of the smallest
level, sqrt(abar_t) x_0: for a full model t = 1, where linear betas put it at 0.99995 x_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule, q_sample

__all__ = ["AttackTarget", "Progress", "check_images", "noise_like", "rows_in_batches"]

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackTarget:
    """A model under attack.

    Attributes:
        denoiser: (x_t, t, labels=) -> x0_hat, in the state it is to be attacked in (`eval()`,
            EMA weights).
        schedule: of the chain that the denoiser's t counts on.
        t_range: smallest and largest t the model was trained for, 1 <= smallest <= largest <= T.
        parameters: of the denoiser, one per tensor, for the gradient attack; () where the
            attacker does not see them.
        labels_known: whether the model takes labels and the attacker has those of the images;
            if not, every question is asked with `NO_LABEL`.
        device: where the denoiser lives; images are moved there a batch at a time.

    Images given to an attack are at the scale the model was trained on: normalised and shifted,
    clipped where the model saw clipped images.
    """

    denoiser: DenoisingFunction
    schedule: NoiseSchedule
    t_range: tuple[int, int]
    parameters: tuple[nn.Parameter, ...] = ()
    labels_known: bool = True
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        smallest, largest = self.t_range
        if not 1 <= smallest <= largest <= self.schedule.num_steps:
            raise ValueError(
                f"t_range must satisfy 1 <= smallest <= largest <= {self.schedule.num_steps}, "
                f"got {smallest} and {largest}"
            )

    def nearest(self, t: int) -> int:
        """`t` moved into `t_range`."""
        return min(max(t, self.t_range[0]), self.t_range[1])

    def levels(self, count: int) -> tuple[int, ...]:
        """The middles of `count` equal parts of `t_range`, ascending, without repeats."""
        if count < 1:
            raise ValueError(f"the number of levels must be at least 1, got {count}")
        smallest, largest = self.t_range
        span = largest - smallest
        return tuple(sorted({smallest + (2 * i + 1) * span // (2 * count) for i in range(count)}))

    def at_level(
        self, x_0: torch.Tensor, t: int | torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (B, *); t is one level or int (B,)."""
        return q_sample(self.schedule, x_0, _per_image(t, x_0), noise=noise)

    def noiseless(self, x_0: torch.Tensor, t: int) -> torch.Tensor:
        """sqrt(abar_t) x_0: the point of level t whose noise is 0."""
        return self.at_level(x_0, t, torch.zeros_like(x_0))

    def estimates(
        self, x_t: torch.Tensor, t: int | torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0_hat, eps_hat), each of x_t's shape (B, *); labels int (B,), t as in `at_level`."""
        if not self.labels_known:
            labels = torch.full_like(labels, NO_LABEL)
        levels = _per_image(t, x_t)
        abar = self.schedule.gather(levels, x_t)
        x0_hat = self.denoiser(x_t, levels, labels=labels)
        signal, noise = abar.sqrt().to(x_t.dtype), (1.0 - abar).sqrt().to(x_t.dtype)
        return x0_hat, (x_t - signal * x0_hat) / noise

    def noise_estimate(
        self, x_t: torch.Tensor, t: int | torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """eps_hat of x_t's shape (B, *); t in [1, T], one level or int (B,); labels int (B,)."""
        return self.estimates(x_t, t, labels)[1]


def _per_image(t: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(t, int):
        return torch.full((len(like),), t, dtype=torch.int64, device=like.device)
    return t


def check_images(x_0: torch.Tensor, labels: torch.Tensor, *, name: str = "x_0") -> None:
    """`ValueError` unless x_0 is floating point (N, C, H, W), N >= 1, with integer labels (N,)."""
    if x_0.ndim != 4 or len(x_0) == 0 or not x_0.is_floating_point():
        raise ValueError(
            f"{name} must be floating point (N, C, H, W) with N at least 1, "
            f"got {x_0.dtype} {tuple(x_0.shape)}"
        )
    if labels.shape != (len(x_0),) or labels.is_floating_point():
        raise ValueError(
            f"labels of {name} must be integers ({len(x_0)},), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )


def rows_in_batches(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(x_0, labels) in order, on the target's device; `progress` hears of each batch done."""
    check_images(x_0, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(x_0), batch_size):
        stop = min(start + batch_size, len(x_0))
        yield x_0[start:stop].to(target.device), labels[start:stop].to(target.device)
        if progress is not None:
            progress(stop, len(x_0))


def noise_like(x_0: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise of x_0's shape and dtype, on its device.

    Drawn image by image from a CPU generator, so that neither the batch size nor the device
    changes what an image gets.
    """
    each = [torch.randn(x_0.shape[1:], generator=generator, dtype=x_0.dtype) for _ in x_0]
    return torch.stack(each).to(x_0.device)
