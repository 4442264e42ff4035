"""Values that pass between the modules, and the only ones that may leave a client.

What a client may send is a *type*: `ReleasedDataset`, which only the mechanism makes, and
`CoarseUpdate`, which is computed from one. `fedpdm.wire` encodes these and refuses everything
else, so that raw images and fine weights cannot leave by mistake. (Baselines that average models of
raw images say so in the update, and the wire refuses it outside simulation.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "GaussianEvent",
    "ReleaseParameters",
    "ReleasedDataset",
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
    deviation of the noise of the grid that the release is rounded to (`fedpdm.privacy.noise`).
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
    Constructed in `fedpdm.privacy.mechanism` alone (a test holds that).
    """

    x_tilde: torch.Tensor
    labels: torch.Tensor
    parameters: ReleaseParameters
    event: GaussianEvent
    noise_source: str
    seeded: bool

    def __len__(self) -> int:
        return len(self.x_tilde)
