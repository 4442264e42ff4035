"""The distance of a method's samples to the truth, and its interval over replicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from fedpdm.diffusion.gmm import GaussianMixture
from fedpdm.diffusion.twostage import SamplerOutput, SamplerSettings, sample_in_batches
from fedpdm.evaluation.metrics import assignment_distance, frechet_distance, gaussian_statistics
from fedpdm.rng import Purpose, torch_generator
from fedpdm.toy.federation import Models, Problem

__all__ = [
    "Estimate",
    "Measurement",
    "Slope",
    "draw_samples",
    "fit_slope",
    "measure",
    "ratio_of_means",
    "sampling_floor",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """Mean of independent values (R,) and its Student interval; R = 1 has none (infinite)."""
        mean = float(values.mean())
        if len(values) < 2:
            return cls(mean=mean, low=-math.inf, high=math.inf)
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        half = float(stats.t.isf(0.025, len(values) - 1)) * error
        return cls(mean=mean, low=mean - half, high=mean + half)

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Squared 2-Wasserstein distances of one method's samples of one class, per replicate (R,).

    `gaussian` compares mean and covariance (exact where samples are Gaussian, else a lower bound,
    Gelbrich 1990), less what as many exact samples would show; `assignment` is by exact matching
    with as many samples of the truth, less what two sets of the truth show; None if not asked for.
    """

    method: str
    label: int
    gaussian: Array
    assignment: Array | None


def ratio_of_means(a: Array, b: Array) -> Estimate:
    """mean(a) / mean(b) of paired replicates (R,), interval by the delta method."""
    ratio = float(a.mean() / b.mean())
    deviation = Estimate.of((a - ratio * b) / b.mean())  # its mean is 0
    return Estimate(mean=ratio, low=ratio + deviation.low, high=ratio + deviation.high)


@dataclass(frozen=True, kw_only=True)
class Slope:
    """A weighted least-squares slope with its 95% interval."""

    value: float
    low: float
    high: float


def fit_slope(x: Sequence[float], y: Sequence[float], half_widths: Sequence[float]) -> Slope:
    """Slope of y over x (N,), N >= 2, weighted by the 95% half-widths of y, with an intercept."""
    points, values = np.asarray(x), np.asarray(y)
    weights = 1.0 / np.square(np.asarray(half_widths))
    centre = float(np.average(points, weights=weights))
    spread = float((weights * np.square(points - centre)).sum())
    if not spread > 0:
        raise ValueError("fit_slope needs at least two different x")
    value = float((weights * (points - centre) * values).sum()) / spread
    half = 1.0 / math.sqrt(spread)
    return Slope(value=value, low=value - half, high=value + half)


def sampling_floor(variances: Array, num_samples: int) -> float:
    """`frechet_distance` between N(mu, diag(v)) and S exact samples, on average, to order 1 / S.

    The mean gives sum v / S. The Bures distance of v and v + E is sum E_ij^2 / (2 (v_i + v_j)) to
    second order, and Var E_ij = v_i v_j (1 + [i = j]) / S (Wishart).
    """
    v = np.asarray(variances, dtype=np.float64)
    pairs = np.outer(v, v) / (2.0 * (v[:, None] + v[None, :]))
    return float((v.sum() + pairs.sum() + np.trace(pairs)) / num_samples)


def draw_samples(
    problem: Problem,
    models: Models,
    method: str,
    *,
    label: int,
    replicates: int,
    num_samples: int,
    seed: int,
    scheduler: str = "ddpm",
    num_steps: int | None = None,
) -> SamplerOutput:
    """`num_samples` samples of a class per replicate, through the sampler; see `measure`."""
    coarse, fine = models.pair(method)
    labels = torch.arange(replicates) * problem.mixture.num_classes + label
    two_chains = problem.chain == "noise_to_noise" and coarse is not None
    every = problem.schedule.num_steps + (problem.t0 if two_chains and fine is not None else 0)
    return sample_in_batches(
        coarse,
        fine,
        SamplerSettings(
            schedule=problem.schedule,
            t0=problem.t0,
            scheduler=scheduler,
            num_steps=every if num_steps is None else num_steps,
            chain=problem.chain,
            batch_size=1 << 16,
        ),
        image_shape=(1, 1, problem.mixture.dim),
        labels=labels.repeat_interleave(num_samples),
        generator=torch_generator(seed, Purpose.SAMPLING, client=label),
    )


def measure(
    problem: Problem,
    models: Models,
    method: str,
    *,
    label: int,
    replicates: int,
    num_samples: int,
    seed: int,
    scheduler: str = "ddpm",
    num_steps: int | None = None,
    matching: bool = False,
) -> Measurement:
    """Sample a class and measure the distance to its component.

    Args:
        models: of the `Clients` with this problem and these replicates.
        label: the class, in [0, K).
        num_samples: per replicate.
        scheduler, num_steps: as in `fedpdm.diffusion.sampling`; None takes every step.
        matching: measure `assignment` too.
    """
    output = draw_samples(
        problem, models, method, label=label, replicates=replicates, num_samples=num_samples,
        seed=seed, scheduler=scheduler, num_steps=num_steps,
    )  # fmt: skip
    sets = output.images.view(replicates, num_samples, problem.mixture.dim).double().numpy()
    truth = GaussianMixture(
        means=problem.mixture.means[label : label + 1],
        variances=problem.mixture.variances[label : label + 1],
    )
    mean, v = truth.means[0].numpy(), truth.variances[0].numpy()
    floor = sampling_floor(v, num_samples)
    gaussian = np.empty(replicates)
    for row, points in enumerate(sets):
        found = gaussian_statistics(points)
        gaussian[row] = frechet_distance(found.mean, found.cov, mean, np.diag(v)) - floor
    assignment = None
    if matching:
        generator = torch_generator(seed, Purpose.EVALUATION, client=label)
        draw = torch.zeros(num_samples, dtype=torch.int64)
        first, second = (truth.draw(draw, generator=generator).numpy() for _ in range(2))
        itself = assignment_distance(first, second)
        assignment = np.array([assignment_distance(points, first) - itself for points in sets])
    return Measurement(method=method, label=label, gaussian=gaussian, assignment=assignment)
