"""What a release is: what made it, what it costs, and the values that may leave a client.

What a client may send is a *type*: a `Release`, which a registered mechanism makes
(`fedpdm.privacy.mechanism`), and `CoarseUpdate`, which is computed from one. `fedpdm.wire` encodes
these and refuses everything else, so that raw images and fine weights cannot leave by mistake.
(Baselines that average models of raw images say so in the update, and the wire refuses it outside
simulation.)
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

__all__ = [
    "ComposedEvent",
    "GaussianEvent",
    "Parameters",
    "PrivacyEvent",
    "Release",
    "ReleaseParameters",
    "ReleasedDataset",
    "SubsampledGaussianEvent",
]


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """What one release does to an image, for the accountant; the fields are numbers.

    The family is open: a mechanism may have an event of its own. The accountant refuses an event
    that it cannot read.
    """


@dataclass(frozen=True, kw_only=True)
class GaussianEvent(PrivacyEvent):
    """One use of the Gaussian mechanism on an image.

    `noise_multiplier` is the noise standard deviation over the L2 sensitivity, sigma / (2 C)
    for replacing one image by any other (docs/method.md section 2). Zero means no noise at all.
    """

    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class SubsampledGaussianEvent(PrivacyEvent):
    """`rounds` noised sums over Poisson samples of a client's images, each sent.

    In each round an image is drawn with probability `sample_rate` in (0, 1], independently of all
    others and of other rounds; if it is drawn, a vector of norm at most C is added to the sum for
    it. Later rounds may depend on what earlier ones gave. `noise_multiplier` is the noise standard
    deviation over C, sigma / C as of DP-SGD: **not** over the sensitivity 2 C as in
    `GaussianEvent`. Zero means no noise at all.
    """

    noise_multiplier: float
    sample_rate: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class ComposedEvent(PrivacyEvent):
    """Several mechanisms on one image, some subsampled; only the accountant's `compose` makes it.

    `gaussian` is all Gaussian ones together (an infinite multiplier where there is none). No two of
    `subsampled` have both noise and sampling rate alike. It is never recorded: records hold the
    events of single releases.
    """

    gaussian: GaussianEvent
    subsampled: tuple[SubsampledGaussianEvent, ...]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a release was made with; two releases with other parameters are two releases.

    Each mechanism has a subclass with a name of its own. Its fields are of type int, float or str.
    """

    mechanism: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ReleaseParameters(Parameters):
    """What a release of noised images was made with.

    `t0` is the number of noising steps (0 is clean), `clip_norm` the L2 bound C in units of
    the shifted [-1, 1] pixel scale, `shift` the public constant that was subtracted before
    clipping, `alpha_bar` the schedule's cumulative product at `t0`, `grid` the steps per standard
    deviation of the noise of the grid that the release is rounded to (`fedpdm.privacy.noise`).
    """

    mechanism: ClassVar[str] = "images"

    t0: int
    clip_norm: float
    shift: float
    schedule: str
    num_steps: int
    alpha_bar: float
    grid: int

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise in units of the shifted clean image."""
        return math.sqrt((1.0 - self.alpha_bar) / self.alpha_bar)


@dataclass(frozen=True, kw_only=True)
class Release(abc.ABC):
    """Privatised values, the only form in which what a client holds leaves it.

    `event` is what they cost an image, `seeded` marks noise that can be drawn again from a seed
    (simulation). Constructed in `fedpdm.privacy.mechanism` alone (a test holds that).
    """

    parameters: Parameters
    event: PrivacyEvent
    noise_source: str
    seeded: bool

    @abc.abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The values by name, as they are sent and kept."""


@dataclass(frozen=True, kw_only=True)
class ReleasedDataset(Release):
    """Privatised images, a row for each image.

    `x_tilde` is float32 (N, C, H, W), `sqrt(abar_t0) CLIP(x) + sqrt(1 - abar_t0) z`; `labels`
    is int64 (N,), public.
    """

    parameters: ReleaseParameters
    x_tilde: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.x_tilde)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"x_tilde": self.x_tilde, "labels": self.labels}
