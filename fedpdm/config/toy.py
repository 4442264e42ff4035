"""Keys of the Gaussian-mixture toy's experiment."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.schema import check_name, key

__all__ = ["ToyConfig"]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """The data."""

    classes: int = key(3, "components K", low=2, high=64)
    dim: int = key(2, "dimensions d", low=1, high=512)
    radius: float = key(2.0, "distance of the components' means from 0", low=0)
    exponent: float = key(
        2.0, "of the power spectrum: variance of axis i is proportional to i^-exponent", low=0
    )


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who holds how much."""

    clients: int = key(3, "clients M", low=2, high=1024)
    minority: int = key(20, "points n of a minority class at a client", low=2)
    total: int = key(20000, "points N of a class over all clients", low=2)


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """The release."""

    sigma2: float = key(1.0, "noise variance of a release (nearest t0)", above=0)
    clip_norm: float | None = key(
        None, "L2 bound C; default: above nearly every point of the mixture", above=0
    )
    delta: float = key(1e-5, "of the epsilon sweep", above=0, below=1)
    num_steps: int = key(1000, "T of the linear schedule, whose betas scale with 1 / T", low=100)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How well it is measured."""

    seed: int = key(0, "of everything", low=0)
    replicates: int = key(64, "independent federations per cell", low=2)
    samples: int = key(200, "samples per class and federation", low=10)
    ancestral_steps: int = key(
        500, "steps of the ancestral sampler; all T in the sigma2 sweep", low=1
    )
    trained_replicates: int = key(3, "federations with trained denoisers", low=2)
    training_steps: int = key(800, "gradient steps per trained denoiser", low=1)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which values are swept, one quantity at a time; an empty list leaves a sweep out."""

    sigma2: tuple[float, ...] = key((0.1, 1.0, 2.0, 5.0, 10.0, 100.0), "noise", above=0)
    minority: tuple[int, ...] = key((5, 10, 20, 50), "n", low=2)
    total: tuple[int, ...] = key((100, 200, 500, 2000), "N", low=2)
    clients: tuple[int, ...] = key((2, 4, 16, 64), "M at fixed N, n = N / 10 M", low=2)
    dim: tuple[int, ...] = key((1, 2, 4, 8), "d", low=1)
    epsilon: tuple[float, ...] = key((1.0, 3.0, 10.0, 30.0, 100.0), "privacy", above=0)
    epsilon_dim: int = key(10, "d of the epsilon sweep", low=2, high=512)


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The toy's experiment."""

    name: str
    mixture: MixtureConfig = MixtureConfig()
    federation: FederationConfig = FederationConfig()
    release: ReleaseConfig = ReleaseConfig()
    measure: MeasureConfig = MeasureConfig()
    sweep: SweepConfig = SweepConfig()

    def __post_init__(self) -> None:
        check_name(self.name)
