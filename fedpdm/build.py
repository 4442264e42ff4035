"""From a run configuration to the objects that do the work."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpdm.accountant import epsilon_bound, epsilon_spent
from fedpdm.calibration import calibrate_t0
from fedpdm.config import CoarseConfig, ConfigError, FineConfig, RunConfig
from fedpdm.data import DATASETS, ImageSet, count_classes
from fedpdm.denoisers import PRESETS, Denoiser, DenoiserSpec
from fedpdm.dpsgd import DpSgdSettings, dp_sgd_noise_multiplier
from fedpdm.loading import build_partitions, load_public, load_split
from fedpdm.mechanism import (
    NoiseSource,
    SeededNoise,
    SystemNoise,
    release_event,
    release_parameters,
)
from fedpdm.partition import ClientPartition
from fedpdm.releases import ReleaseRequest
from fedpdm.rng import Purpose, numpy_rng, seed_sequence
from fedpdm.schedule import NoiseSchedule, make_schedule
from fedpdm.training import OptimizerSettings

__all__ = [
    "ClientImages",
    "ImageSpec",
    "ReleasePlan",
    "build_denoiser",
    "build_dp_sgd",
    "build_image_spec",
    "build_noise",
    "build_optimizer_settings",
    "build_partitions",
    "build_release_plan",
    "build_release_request",
    "build_schedule",
    "client_images",
    "coarse_share",
    "load_public",
    "load_split",
    "sampler_options",
    "split_heldout",
]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Shape of the images, and the public shift: all that the server needs to know of the data."""

    channels: int
    resolution: int
    num_classes: int
    shift: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.resolution, self.resolution)


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """How each client's images are to be released; of a baseline that releases none, t0 is T."""

    t0: int
    clip_norm: float
    shift: float
    epsilon_exact: float
    epsilon_paper: float


def build_schedule(config: RunConfig) -> NoiseSchedule:
    section = config.schedule
    return make_schedule(
        section.kind,
        num_steps=section.num_steps,
        beta_start=section.beta_start,
        beta_end=section.beta_end,
    )


def build_image_spec(config: RunConfig, images: ImageSet | None = None) -> ImageSpec:
    """Shape and shift, from the registry where it knows the set, else from the images."""
    info = DATASETS[config.data.name]
    known = info.num_classes is not None and info.channels is not None
    if images is None and not known:
        images = load_split(config, "train")
    if images is not None:
        channels, height, width = images.images.shape[1:]
        if height != width:
            raise ConfigError(
                f"data.resolution: images are {height}x{width}, not square; set data.resolution"
            )
        num_classes, background = images.num_classes, images.background
    else:
        assert info.channels is not None
        assert info.num_classes is not None
        coloring = config.data.coloring
        channels = info.channels if coloring is None else (1 if coloring == "none" else 3)
        num_classes = count_classes(
            info.num_classes,
            class_label=typing.cast(Any, config.data.class_label),
            attributes=config.data.attributes,
            classes=config.data.classes,
        )
        background = info.background
        height = config.data.resolution or info.resolution or 0
    shift = config.privacy.shift
    return ImageSpec(
        channels=channels,
        resolution=height,
        num_classes=num_classes,
        shift=background if shift is None else shift,
    )


def split_heldout(
    num_images: int, *, fraction: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, int64, sorted; at least one image is for training."""
    order = numpy_rng(seed, Purpose.HOLDOUT, client=client).permutation(num_images)
    num_heldout = min(round(fraction * num_images), num_images - 1)
    return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientImages:
    """What a simulated client holds: `images` each once; `train`, `heldout` are positions there.

    `indices` int64 (N,) are the positions of `images` in the split that is shared out.
    """

    client_id: int
    images: ImageSet
    train: np.ndarray
    heldout: np.ndarray
    indices: np.ndarray
    majority: tuple[int, ...]
    minority: tuple[int, ...]

    @property
    def train_labels(self) -> np.ndarray:
        """int64 (n,) of the training images."""
        return self.images.labels[self.train]


def client_images(
    config: RunConfig, images: ImageSet, parts: Sequence[ClientPartition], client_id: int
) -> ClientImages:
    """Client `client_id`'s part of the `train` split `images`, which `parts` share out."""
    if not 0 <= client_id < len(parts):
        raise ConfigError(
            f"partition.num_clients: {len(parts)}, but there is a client {client_id}; "
            "the federation must have as many nodes (num-supernodes)"
        )
    part = parts[client_id]
    own, indices = images.subset(part.indices), part.indices
    first = own.distinct()
    if len(first) < len(own):
        own, indices = own.subset(first), indices[first]
    train, heldout = split_heldout(
        len(own), fraction=config.data.holdout_fraction, seed=config.run.seed, client=client_id
    )
    return ClientImages(
        client_id=client_id,
        images=own,
        train=train,
        heldout=heldout,
        indices=indices,
        majority=part.majority,
        minority=part.minority,
    )


def build_release_plan(config: RunConfig, schedule: NoiseSchedule, spec: ImageSpec) -> ReleasePlan:
    """t0 from the budget, or the budget from t0."""
    section = config.privacy
    if not config.has_release:
        t0 = schedule.num_steps
    elif section.t0 is not None:
        t0 = section.t0
    else:
        assert section.epsilon is not None
        t0 = calibrate_t0(
            schedule,
            clip_norm=section.clip_norm,
            epsilon=section.epsilon,
            delta=section.delta,
            accounting=section.accounting,
            max_t0=schedule.num_steps - (config.coarse.objective == "truncated"),
        )
    truncated = config.has_release and config.coarse.objective == "truncated"
    if truncated and t0 >= schedule.num_steps:
        raise ConfigError(
            f"coarse.objective: truncated needs t0 < T, got t0 = T = {t0}; lower "
            "privacy.clip_norm, raise privacy.epsilon, or use noise_to_noise"
        )
    event = release_event(schedule, t0=t0, clip_norm=section.clip_norm)
    return ReleasePlan(
        t0=t0,
        clip_norm=section.clip_norm,
        shift=spec.shift,
        epsilon_exact=epsilon_spent([event], delta=section.delta),
        epsilon_paper=epsilon_bound(event, delta=section.delta),
    )


def build_noise(config: RunConfig, *, client: int, release: int) -> NoiseSource:
    """Seeded noise in simulation, operating-system noise everywhere else.

    The seeded stream is the client's and the release's own: no two releases share noise.
    """
    if config.run.simulation:
        seed = config.run.seed
        return SeededNoise(seed_sequence(seed, Purpose.RELEASE_NOISE, client=client, chunk=release))
    return SystemNoise()


def build_release_request(
    config: RunConfig,
    schedule: NoiseSchedule,
    plan: ReleasePlan,
    *,
    client: int,
    allow_new_release: bool,
) -> ReleaseRequest:
    """What a client of this run asks of its release store."""
    return ReleaseRequest(
        client_id=client,
        parameters=release_parameters(
            schedule, t0=plan.t0, clip_norm=plan.clip_norm, shift=plan.shift
        ),
        delta=config.privacy.delta,
        noise=lambda release: build_noise(config, client=client, release=release),
        simulation=config.run.simulation,
        allow_new_release=allow_new_release,
    )


def build_denoiser(
    config: RunConfig, role: str, *, spec: ImageSpec, schedule: NoiseSchedule, client: int = 0
) -> Denoiser:
    """A freshly initialised coarse or fine denoiser, its weights drawn from the run's seed."""
    section: CoarseConfig | FineConfig = config.coarse if role == "coarse" else config.fine
    smallest = PRESETS[section.preset].stride
    if spec.resolution < smallest:
        raise ConfigError(
            f"data.resolution: {role}.preset {section.preset} needs images of at least "
            f"{smallest}x{smallest}, got {spec.resolution}x{spec.resolution}"
        )
    denoiser_spec = DenoiserSpec(
        preset=section.preset,
        resolution=spec.resolution,
        channels=spec.channels,
        num_classes=spec.num_classes,
        prediction=section.prediction or PRESETS[section.preset].prediction,
        knows_clipping=role == "fine",
    )
    purpose = Purpose.COARSE_INIT if role == "coarse" else Purpose.FINE_INIT
    seed = int(seed_sequence(config.run.seed, purpose, client=client).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(denoiser_spec, schedule)


def server_steps_per_round(config: RunConfig) -> int:
    """Coarse steps that the server takes per round in server training: as many as all clients
    together would."""
    chosen = config.aggregation.server_steps_per_round
    return chosen or config.coarse.steps_per_round * config.partition.num_clients


def build_optimizer_settings(
    config: RunConfig, role: str, *, at_server: bool = False
) -> OptimizerSettings:
    section: CoarseConfig | FineConfig = config.coarse if role == "coarse" else config.fine
    per_round = server_steps_per_round(config) if at_server else section.steps_per_round
    return OptimizerSettings(
        lr=section.lr,
        batch_size=section.batch_size,
        total_steps=max(1, per_round * config.run.rounds),
        warmup_steps=section.warmup_steps,
        decay=section.decay,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
        ema_decay=section.ema_decay,
        precision=config.run.precision,
    )


def build_dp_sgd(config: RunConfig, *, num_images: int) -> DpSgdSettings:
    """DP-SGD for one client's whole run at `privacy.epsilon`, of its `num_images` images."""
    section, privacy = config.coarse, config.privacy
    assert privacy.epsilon is not None  # RunConfig
    if section.batch_size > num_images:
        raise ConfigError(
            f"coarse.batch_size: DP-SGD needs at most the client's {num_images} images, "
            f"got {section.batch_size}"
        )
    steps = max(1, section.steps_per_round * config.run.rounds)
    return DpSgdSettings(
        noise_multiplier=dp_sgd_noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sample_rate=section.batch_size / num_images,
            num_steps=steps,
        ),
        max_grad_norm=section.grad_clip,
        multiplicity=section.noise_multiplicity,
        max_steps=steps,
    )


def sampler_options(
    config: RunConfig, schedule: NoiseSchedule, plan: ReleasePlan
) -> dict[str, Any]:
    """Keyword arguments of `sampling.sample` that the config decides."""
    return {
        "schedule": schedule,
        "t0": plan.t0,
        "scheduler": config.sampling.scheduler,
        "num_steps": config.sampling.num_steps,
        "guidance": config.sampling.guidance,
        "chain": config.coarse.objective if config.has_release else "truncated",
    }


def coarse_share(config: RunConfig, labels: np.ndarray, *, num_classes: int) -> torch.Tensor | None:
    """What a client trusts the coarse model above t0, float32 (K + 1,) by class; None: wholly.

    `labels` int64 (n,) are those of the client's training images. Two estimates of a class's mean,
    one worth w images (`sampling.coarse_worth`) and one of n_k images, are best weighed as w : n_k.
    The last entry is for no label.
    """
    worth = config.sampling.coarse_worth
    if worth is None:
        return None
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    shares = np.append(worth / (worth + counts), worth / (worth + counts.mean()))
    return torch.tensor(shares, dtype=torch.float32)
