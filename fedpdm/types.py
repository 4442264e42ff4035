"""Values that pass between the modules, and the only ones that may leave a client.

What a client may send is a *type*: `ReleasedDataset`, which only the mechanism makes, and
`CoarseUpdate`, which is computed from one. `fedpdm.wire` encodes these and refuses everything
else, so that raw images and fine weights cannot leave by mistake. (Baselines that average models of
raw images say so in the update, and the wire refuses it outside simulation.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = [
    "CoarseUpdate",
    "GaussianEvent",
    "ReleaseParameters",
    "ReleasedDataset",
    "SamplerOutput",
    "TrainReport",
]


@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """One use of the Gaussian mechanism on an image.

    `noise_multiplier` is the noise standard deviation over the L2 sensitivity, sigma / (2 C)
    for replacing one image by any other (docs/method.md section 2). Zero means no noise at all.
    """

    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class ReleaseParameters:
    """What a release was made with; two releases with other parameters are two releases.

    `t0` is the number of noising steps (0 is clean), `clip_norm` the L2 bound C in units of
    the shifted [-1, 1] pixel scale, `shift` the public constant that was subtracted before
    clipping, `alpha_bar` the schedule's cumulative product at `t0`, `grid` the steps per standard
    deviation of the noise of the grid that the release is rounded to (`fedpdm.noise`).
    """

    t0: int
    clip_norm: float
    shift: float
    schedule: str
    num_steps: int
    alpha_bar: float
    grid: int


@dataclass(frozen=True, kw_only=True)
class ReleasedDataset:
    """Privatised images: the only form in which images leave a client.

    `x_tilde` is float32 (N, C, H, W), `sqrt(abar_t0) CLIP(x) + sqrt(1 - abar_t0) z`; `labels`
    is int64 (N,), public; `seeded` marks noise that can be drawn again from a seed (simulation).
    Constructed in `fedpdm.mechanism` alone (a test holds that).
    """

    x_tilde: torch.Tensor
    labels: torch.Tensor
    parameters: ReleaseParameters
    event: GaussianEvent
    noise_source: str
    seeded: bool

    def __len__(self) -> int:
        return len(self.x_tilde)


@dataclass(frozen=True, kw_only=True)
class CoarseUpdate:
    """Coarse weights after local steps on one client's `ReleasedDataset`.

    `weights` maps parameter names to tensors; `num_examples` is the number of released
    images that the client holds (never the number of batches); `seeded` is that of the release.
    `basis` is `released`, or for baselines in simulation what else was trained on: `raw` or
    `dp_sgd`.
    """

    weights: Mapping[str, torch.Tensor]
    num_examples: int
    client_id: int
    round: int
    seeded: bool
    basis: str = "released"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a stretch of training did: mean loss, steps, images seen and wall seconds."""

    loss: float
    num_steps: int
    num_images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """Samples of the two-stage sampler.

    `images` is float32 (N, C, H, W) in the shifted scale of the models; `coarse` is the last
    clean-image estimate of the coarse model, same shape, None where no coarse step was taken;
    `num_coarse_calls` and `num_fine_calls` count denoiser evaluations of one batch.
    """

    images: torch.Tensor
    coarse: torch.Tensor | None
    num_coarse_calls: int
    num_fine_calls: int
