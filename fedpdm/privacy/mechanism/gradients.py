"""Noised sums of clipped gradients: a network above the hand-over, by DP-SGD. `network`.

First come class statistics, with their share of the budget. Then, in each of T rounds, a client
draws each of its images with probability q, independently, and sends

    sum over the drawn images of CLIP(g, C)  +  noise,    g = mean of K gradients of the image's
                                                              loss, at K draws of t and noise,

of the weights that the server sent. Which images were drawn is told to nobody. Neighbours: one
image replaced by any other of the same label (`fedpdm.privacy.subsampled` has the accounting). A
gradient that is not finite counts as zero, so whatever weights the server sends, what a client
answers is bounded and says nothing of why.

What is added for an image may depend on that image, its place and what all know, never on which
other images were drawn: t and noise come from a stream of the image's place (their seed may be
known), the network is in `eval` mode. Otherwise the sum of the others would say whether an image
was drawn, and drawing would protect less than accounted. The last digits of floating-point numbers
do depend on what else is in a batch, so a deployed client computes one image's gradient at a time.

It works on the noise's grid of `GRID` steps per standard deviation: with sigma / C =
`noise_multiplier` a clipped gradient is whole steps whose squares sum to at most

    L = floor((GRID / noise_multiplier)^2),

checked in whole numbers, so sums are whole and the exact sampler of `fedpdm.privacy.noise` adds
whole noise to them.

The plan of all T rounds is one release: one record in the ledger, in which every image of the
client pays for all rounds, drawn or not, before the first. `run` names the run that the plan is of,
so another run is another release. The rounds' sums are kept beside it
(`fedpdm.privacy.releases.rounds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig, run_digest
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.accountant import epsilon_spent, multiplier_for
from fedpdm.privacy.calibration import calibrate_rounds
from fedpdm.privacy.mechanism.door import (
    Layout,
    ReleaseMechanism,
    ReleaseSource,
    StoredRelease,
    register,
)
from fedpdm.privacy.mechanism.statistics import ClassStatistics
from fedpdm.privacy.mechanism.whole import sum_of_whole
from fedpdm.privacy.noise import GRID, LARGEST, NoiseSource
from fedpdm.privacy.types import Parameters, Release, SubsampledGaussianEvent

__all__ = [
    "GradientParameters",
    "NoisedGradients",
    "ReleasedGradient",
    "largest_total",
    "noised_round",
]

MOST_ROUNDS = 100_000
CLIP_NORMS = (1e-6, 1e6)  # of which whole steps of float32 gradients stay finite
LEAST_NOISE = 1e-3  # over C: sums of squares of whole steps stay exact


@dataclass(frozen=True, kw_only=True)
class GradientParameters(Parameters):
    """What a plan of rounds was made with.

    `noise_multiplier` is sigma / C, `clip_norm` C in units of the gradient, `draws` K, `run` the
    run's digest, `grid` as that of `ReleaseParameters`.
    """

    mechanism: ClassVar[str] = "network"

    noise_multiplier: float
    sample_rate: float
    rounds: int
    clip_norm: float
    draws: int
    run: str
    grid: int

    @property
    def limit(self) -> int:
        """Largest sum of squares of a clipped gradient's whole steps."""
        return math.floor((self.grid / self.noise_multiplier) ** 2)

    @property
    def steps(self) -> float:
        """Whole steps for one unit of a gradient."""
        return math.sqrt(self.limit) / self.clip_norm


@dataclass(frozen=True, kw_only=True)
class ReleasedGradient(Release):
    """A round's noised sum, in whole steps. In a store's record of the plan: round 0, one zero.

    `round` is int64 (1,), counted from 1 in the plan, `total` int32 (d,), the network's parameters
    after one another.
    """

    parameters: GradientParameters
    round: torch.Tensor
    total: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"round": self.round, "total": self.total}


@register
class NoisedGradients(ReleaseMechanism[GradientParameters]):
    """See the module."""

    parameters: ClassVar[type[GradientParameters]] = GradientParameters
    names = ("round", "total")

    def plan(
        self, config: RunConfig, schedule: NoiseSchedule, *, shift: float, num_classes: int
    ) -> tuple[Parameters, ...]:
        """The rounds of class statistics, and the plan of the network's rounds as the last."""
        privacy, section = config.privacy, config.network
        if privacy.epsilon is None:
            raise ConfigError("privacy.epsilon: release network needs it, and no t0; got null")
        epsilon, delta = privacy.epsilon, privacy.delta
        mu = math.sqrt(1.0 - section.share) / multiplier_for(epsilon=epsilon, delta=delta)
        sums = ClassStatistics().sums(config, mu=mu, shift=shift, num_classes=num_classes)
        try:
            noise = calibrate_rounds(
                epsilon=epsilon,
                delta=delta,
                sample_rate=section.sample_rate,
                rounds=section.rounds,
                share=1.0 - section.share,
            )
        except ValueError as error:
            raise ConfigError(
                f"network.share: {section.share:g} of privacy.epsilon {epsilon:g}, at delta "
                f"{delta:g} for network.rounds = {section.rounds}: {error}"
            ) from None
        while True:  # rounding errs high
            last = GradientParameters(
                noise_multiplier=noise,
                sample_rate=section.sample_rate,
                rounds=section.rounds,
                clip_norm=section.clip_norm,
                draws=section.draws,
                run=run_digest(config),
                grid=GRID,
            )
            events = [*map(ClassStatistics().event, sums), self.event(last)]
            if epsilon_spent(events, delta=delta) <= epsilon:
                break
            noise *= 1.0 + 1e-6
        try:
            self.check(last)
        except ValueError as error:
            raise ConfigError(f"network.share: {section.share:g}: {error}") from None
        return (*sums, last)

    def event(self, parameters: GradientParameters) -> SubsampledGaussianEvent:
        return SubsampledGaussianEvent(
            noise_multiplier=parameters.noise_multiplier,
            sample_rate=parameters.sample_rate,
            rounds=parameters.rounds,
        )

    def check(self, parameters: GradientParameters) -> None:
        noise, rate = parameters.noise_multiplier, parameters.sample_rate
        if not LEAST_NOISE <= noise < math.inf:
            raise ValueError(
                f"noise_multiplier must be at least {LEAST_NOISE} and finite, got {noise}"
            )
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"sample_rate must be in (0, 1], got {rate}")
        if not 1 <= parameters.rounds <= MOST_ROUNDS:
            raise ValueError(f"rounds must be in [1, {MOST_ROUNDS}], got {parameters.rounds}")
        if not CLIP_NORMS[0] <= parameters.clip_norm <= CLIP_NORMS[1]:
            raise ValueError(
                f"clip_norm must be in [{CLIP_NORMS[0]:g}, {CLIP_NORMS[1]:g}], got "
                f"{parameters.clip_norm}"
            )
        if parameters.draws < 1:
            raise ValueError(f"draws must be at least 1, got {parameters.draws}")
        if parameters.grid != GRID:
            raise ValueError(f"grid must be {GRID}, as the noise's, got {parameters.grid}")
        if parameters.limit < 1:
            raise ValueError(
                f"a noise of {noise:.3g} C leaves a gradient less than one step of the noise's grid"
            )

    def same(self, a: GradientParameters, b: GradientParameters) -> bool:
        """Machines may round the noise differently."""
        alike = dataclasses.replace(a, noise_multiplier=b.noise_multiplier) == b
        return alike and math.isclose(a.noise_multiplier, b.noise_multiplier, rel_tol=1e-9)

    def layout(
        self, parameters: GradientParameters, count: int, image_shape: tuple[int, int, int]
    ) -> Layout:
        """Of the record of the plan, before its first round."""
        return {"round": ("I64", (1,)), "total": ("I32", (1,))}

    def make(
        self, source: ReleaseSource, parameters: GradientParameters, noise: NoiseSource
    ) -> Iterator[np.ndarray]:
        """Nothing is noised yet: the record says that the images pay for what will be."""
        self.check(parameters)
        yield np.zeros(1, dtype=np.int64)
        yield np.zeros(1, dtype=np.int32)

    def gather(
        self, stored: Sequence[StoredRelease], digests: Sequence[bytes], labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        return dict(stored[0].tensors)

    def restore(
        self, tensors: Mapping[str, torch.Tensor], *, check_values: bool, **made: Any
    ) -> ReleasedGradient:
        made |= {name: tensors[name] for name in self.names}
        released = ReleasedGradient(**made)
        number, total = released.round, released.total
        if (number.dtype, number.shape) != (torch.int64, (1,)) or total.dtype != torch.int32:
            raise ValueError("round must be int64 (1,) and total int32")
        if total.ndim != 1 or not 0 <= int(number) <= released.parameters.rounds:
            raise ValueError(
                f"round must be in [0, {released.parameters.rounds}] and total have one dimension, "
                f"got {int(number)} and {tuple(total.shape)}"
            )
        return released

    def describe(self, parameters: GradientParameters) -> str:
        return (
            f"gradients of {parameters.rounds} rounds, each of a share {parameters.sample_rate:g} "
            f"of the images, clip norm {parameters.clip_norm:g}, noise "
            f"{parameters.noise_multiplier:.4g} of it"
        )

    def sentence(self, parameters: GradientParameters) -> str:
        noise = parameters.noise_multiplier * parameters.clip_norm
        return (
            f"At last, in each of {parameters.rounds} rounds, some images are drawn by chance, "
            f"each with a probability of {parameters.sample_rate:g}, and it is told to nobody "
            "which. For each of them it is computed how the weights of the shared network should "
            "change to fit it better. Each such change is shortened to a length of at most "
            f"{parameters.clip_norm:g}, their sum is covered with random noise of {noise:.3g} on "
            "each number, and that is sent. Every image pays for all rounds, drawn or not."
        )

    def settings(self, parameters: GradientParameters) -> dict[str, float]:
        return {
            "gradient_clip_norm": parameters.clip_norm,
            "gradient_noise_multiplier": parameters.noise_multiplier,
            "sample_rate": parameters.sample_rate,
            "network_rounds": parameters.rounds,
        }

    def blank(self, parameters: GradientParameters, noise: NoiseSource) -> ReleasedGradient:
        """What a store keeps before the first round; it is never sent."""
        return self._released(parameters, noise, number=0, total=np.zeros(1, dtype=np.int32))

    def noised(
        self, exact: np.ndarray, parameters: GradientParameters, *, number: int, noise: NoiseSource
    ) -> ReleasedGradient:
        """The message of round `number`: an exact sum in whole steps, int64 (d,), and noise."""
        drawn = np.empty(exact.shape, dtype=np.float32)
        noise.fill(drawn)
        # Cut to 32 bits after the noise: an error would tell of the sum that it is large.
        total = np.clip(exact + drawn.astype(np.int64), 1 - 2**31, 2**31 - 1)
        return self._released(parameters, noise, number=number, total=total.astype(np.int32))

    def _released(
        self, parameters: GradientParameters, noise: NoiseSource, *, number: int, total: np.ndarray
    ) -> ReleasedGradient:
        return ReleasedGradient(
            parameters=parameters,
            event=self.event(parameters),
            noise_source=noise.description,
            seeded=noise.seeded,
            round=torch.tensor([number]),
            total=torch.from_numpy(total),
        )


def noised_round(
    gradients: Iterable[torch.Tensor],
    parameters: GradientParameters,
    *,
    number: int,
    size: int,
    noise: NoiseSource,
) -> ReleasedGradient:
    """The message of round `number` of a plan.

    `gradients` are those of the drawn images, float32 (n, d), d = `size`, in any pieces. One that
    is not finite counts as zero.
    """
    exact = np.zeros(size, dtype=np.int64)
    for rows in gradients:
        found = sum_of_whole(rows, steps=parameters.steps, limit=parameters.limit)
        exact += found.cpu().numpy().astype(np.int64)
    return NoisedGradients().noised(exact, parameters, number=number, noise=noise)


def largest_total(parameters: GradientParameters, images: int) -> int:
    """What no number of a client's sum exceeds in magnitude, of at most so many drawn images."""
    return images * math.isqrt(parameters.limit) + LARGEST
