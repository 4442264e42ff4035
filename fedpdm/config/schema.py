"""The configuration's keys: frozen dataclasses with type, default, bounds and meaning."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.aggregation import AggregationConfig, check_aggregation
from fedpdm.config.data import DataConfig, check_data
from fedpdm.config.keys import ConfigError, check_name, key
from fedpdm.config.kind import RunKind
from fedpdm.config.names import PARTITIONS
from fedpdm.config.network import NetworkConfig, check_network_run
from fedpdm.config.run import RunSection
from fedpdm.config.sampling import SamplingConfig, check_sampling
from fedpdm.config.statistics import StatisticsConfig, check_statistics
from fedpdm.diffusion.names import (
    DECAYS,
    OBJECTIVES,
    PREDICTIONS,
    SCHEDULE_KINDS,
    TIMESTEPS,
)
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.weightings import WEIGHTINGS

__all__ = [
    "AggregationConfig",
    "CoarseConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "FineConfig",
    "NetworkConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "RunSection",
    "SamplingConfig",
    "ScheduleConfig",
    "StatisticsConfig",
    "check_name",
    "key",
]


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How the data set is split over simulated clients."""

    kind: str = key(
        "majority_minority",
        "split",
        choices=PARTITIONS,
    )
    num_clients: int = key(4, "clients", low=1)
    alpha: float | None = key(None, "dirichlet concentration", above=0.0)
    majority_classes: int | None = key(None, "majority classes per client", low=1)
    majority_ratio: float | None = key(
        None, "images of a majority class for one of a minority class", low=1.0
    )
    balanced: bool = key(
        False, "equally many images of each class over all clients; the surplus is left out"
    )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The release. Give epsilon (t0 follows) or t0 (epsilon follows), not both."""

    epsilon: float | None = key(10.0, "local DP budget per image", above=0.0, high=1e4)
    delta: float = key(1e-5, "failure probability of the guarantee", above=0.0, below=1.0)
    clip_norm: float = key(
        10.0, "L2 bound C of a shifted image in [-1, 1] units", above=0.0, high=1e6
    )
    t0: int | None = key(None, "noising steps of the release; set epsilon: null to use it", low=1)
    shift: float | None = key(
        None, "public constant subtracted before clipping; default: the set's background",
        low=-1.0, high=1.0,
    )  # fmt: skip
    accounting: str = key("exact", "how epsilon is computed", choices=("exact", "paper"))
    release: str = key(
        "images",
        "what clients release: a registered mechanism, or package.module:NAME (docs/extending.md)",
        form=(r"[\w.]{1,200}(:[\w.]{1,200})?", "a name, or package.module:NAME"),
    )
    noise_draw: int = key(
        0, "simulation only: another number draws the release's seeded noise anew, all else alike",
        low=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The diffusion chain."""

    kind: str = key("linear", "noise schedule", choices=SCHEDULE_KINDS)
    num_steps: int = key(1000, "T", low=2)
    beta_start: float = key(1e-4, "first beta (linear)", above=0.0, below=1.0)
    beta_end: float = key(0.02, "last beta (linear)", above=0.0, below=1.0)


@dataclass(frozen=True, kw_only=True)
class _ModelConfig:
    """What coarse and fine training have in common."""

    preset: str = key("tiny", "U-Net", choices=tuple(PRESETS), own=True)
    prediction: str | None = key(None, "network output; default: the preset's", choices=PREDICTIONS)
    steps_per_round: int = key(100, "gradient steps per client and round", low=0)
    batch_size: int = key(32, "images per step", low=1)
    lr: float = key(2e-3, "peak learning rate", above=0.0)
    warmup_steps: int = key(100, "linear warm-up", low=0)
    decay: str = key("cosine", "learning rate after warm-up", choices=DECAYS)
    weight_decay: float = key(0.0, "AdamW", low=0.0)
    grad_clip: float = key(1.0, "L2 bound on the gradient", above=0.0)
    ema_decay: float = key(0.999, "limit of the weight average", low=0.0, below=1.0)
    class_balance: float = key(
        0.0, "0: images equally often; 1: classes equally often", low=0.0, high=1.0
    )
    label_dropout: float = key(
        0.1, "share of unlabelled examples (for guidance)", low=0.0, below=1.0
    )
    timesteps: str = key("uniform", "how often each t is trained at", choices=TIMESTEPS)


@dataclass(frozen=True, kw_only=True)
class CoarseConfig(_ModelConfig):
    """The shared model, trained on releases only, but for baselines in simulation."""

    training: str = key(
        "federated",
        "where: federated averaging, at the server on uploads (Algorithm 1), or not at all",
        choices=("federated", "server", "none"),
    )
    images: str = key(
        "released",
        "what it is trained on. Baselines, in simulation only: raw (no privacy), dp_sgd (raw, "
        "noisy gradients)",
        choices=("released", "raw", "dp_sgd"),
    )
    objective: str = key(
        "truncated", "docs/method.md section 3", choices=tuple(OBJECTIVES), own=True
    )
    weighting: str = key(
        "v", "loss weight (not for truncated)", choices=tuple(WEIGHTINGS), own=True
    )
    noise_multiplicity: int = key(4, "dp_sgd: draws of (t, noise) per image and step", low=1)


@dataclass(frozen=True, kw_only=True)
class FineConfig(_ModelConfig):
    """The private model of each client, trained on its raw images."""

    class_balance: float = key(
        1.0, "0: images equally often; 1: classes equally often", low=0.0, high=1.0
    )
    t_range: str = key(
        "all", "all: t in [1, T], which is also training alone; below_t0: t in [1, t0]",
        choices=("all", "below_t0"),
    )  # fmt: skip
    weighting: str = key("v", "loss weight", choices=tuple(WEIGHTINGS), own=True)
    clipped_fraction: float = key(
        0.1, "share of examples that are clipped and flagged so", low=0.0, below=1.0
    )
    augment: str = key(
        "none",
        "affine: train on turned, stretched, sheared and moved images",
        choices=("none", "affine"),
    )
    checkpoint_every: int = key(500, "steps between checkpoints inside a round", low=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What clients measure and report."""

    every: int = key(1, "rounds between coarse-loss evaluations", low=1)
    image_metrics: bool = key(
        True, "image metrics on raw data, in the last round; deployed clients decide themselves"
    )
    num_reference: int = key(2000, "test images that samples are compared with", low=2)
    num_images: int = key(500, "samples per group and method for image metrics", low=2)
    features: str = key(
        "pixels",
        "fedpdm evaluate: whose features. trained: a network trained on images that no client "
        "holds; inception: FID's",
        choices=("trained", "inception", "pixels"),
    )
    num_public: int = key(10_000, "images that no client holds, to train that network", low=20)
    classifier_steps: int = key(
        3000,
        "steps of the classifiers that show what samples are worth; of the one that is trained on "
        "samples alone at most 500",
        low=1,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `name` also names its directory."""

    name: str = "run"
    run: RunSection = RunSection()  # noqa: RUF009 (frozen)
    data: DataConfig = DataConfig()  # noqa: RUF009 (frozen)
    partition: PartitionConfig = PartitionConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    statistics: StatisticsConfig = StatisticsConfig()  # noqa: RUF009 (frozen)
    network: NetworkConfig = NetworkConfig()  # noqa: RUF009 (frozen)
    schedule: ScheduleConfig = ScheduleConfig()
    coarse: CoarseConfig = CoarseConfig()
    fine: FineConfig = FineConfig()
    aggregation: AggregationConfig = AggregationConfig()  # noqa: RUF009 (frozen)
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        privacy = self.privacy
        if (privacy.epsilon is None) == (privacy.t0 is None):
            raise ConfigError("privacy: give exactly one of epsilon and t0 (set the other to null)")
        if privacy.t0 is not None and privacy.t0 > self.schedule.num_steps:
            raise ConfigError(
                f"privacy.t0: must be at most schedule.num_steps = {self.schedule.num_steps}, "
                f"got {privacy.t0}"
            )
        if self.schedule.beta_start > self.schedule.beta_end:
            raise ConfigError(
                f"schedule.beta_start: must be at most beta_end = {self.schedule.beta_end}, "
                f"got {self.schedule.beta_start}"
            )
        if self.partition.kind == "own" and self.run.simulation and self.partition.num_clients > 1:
            raise ConfigError(
                "partition.kind: own has one client in simulation; set num_clients: 1"
            )
        if self.partition.kind == "given" and self.partition.balanced:
            raise ConfigError(
                "partition.balanced: given clients keep their images; set partition.kind to another"
            )
        check_data(self.data)
        if privacy.noise_draw and not self.run.simulation:
            raise ConfigError(
                "privacy.noise_draw: must be 0 outside simulation, where noise is drawn by the "
                f"operating system, got {privacy.noise_draw}"
            )
        self._check_shared_model()
        if self.has_statistics:
            check_statistics(
                self.statistics,
                training=self.coarse.training,
                rounds=self.run.rounds,
                release=self.privacy.release,
            )
        if self.has_network:
            check_network_run(
                self.network,
                secure=self.aggregation.secure,
                accounting=self.privacy.accounting,
                num_steps=self.schedule.num_steps,
                handover=self.sampling.handover,
            )
        check_sampling(
            self.sampling, num_steps=self.schedule.num_steps, release=self.privacy.release
        )
        section, clients = self.aggregation, self.partition.num_clients
        if not self.run.simulation:
            clients = section.min_clients or clients
        check_aggregation(
            section,
            training=self.coarse.training,
            num_clients=clients,
            statistics=self.has_statistics,
        )
        check_name(self.name)

    def _check_shared_model(self) -> None:
        """Refuse combinations of where and on what the shared model is trained."""
        coarse = self.coarse
        if (coarse.images != "released" or coarse.training == "none") and not self.run.simulation:
            what = "training: none" if coarse.images == "released" else f"images: {coarse.images}"
            raise ConfigError(f"coarse.{what} is a baseline for simulations (run.simulation: true)")
        if coarse.images != "released" and coarse.training == "none":
            raise ConfigError(f"coarse.images: {coarse.images} needs coarse.training, got none")
        if coarse.images == "dp_sgd" and coarse.training != "federated":
            raise ConfigError("coarse.images: dp_sgd needs coarse.training: federated")
        if coarse.images == "dp_sgd" and coarse.class_balance > 0:
            raise ConfigError(
                "coarse.class_balance: must be 0 with coarse.images: dp_sgd, which draws images "
                f"alike, got {coarse.class_balance:g}"
            )
        if coarse.images == "dp_sgd" and self.privacy.epsilon is None:
            raise ConfigError("privacy.epsilon: coarse.images: dp_sgd needs it, got null")
        if coarse.training == "none" and self.fine.t_range != "all":
            raise ConfigError("fine.t_range: must be all with coarse.training: none")
        if self.sampling.coarse_worth is not None and self.fine.t_range != "all":
            raise ConfigError("fine.t_range: must be all with sampling.coarse_worth")
        mixes = self.sampling.coarse_worth is not None and self.kind.releases
        if mixes and coarse.objective != "truncated":
            raise ConfigError(
                f"sampling.coarse_worth: needs coarse.objective: truncated, got {coarse.objective}"
            )

    @property
    def kind(self) -> RunKind:
        """Where and on what the shared model is trained."""
        return RunKind((self.coarse.training, self.coarse.images))

    @property
    def has_statistics(self) -> bool:
        """Whether clients release class statistics, of which the server computes Gaussians."""
        return self.privacy.release in ("statistics", "network") and self.kind.releases

    @property
    def least_rounds(self) -> int:
        """Rounds in which clients release: a run has at least so many."""
        sums = len(self.statistics.shares) if self.has_statistics else 1
        return sums + (self.network.rounds if self.has_network else 0)

    @property
    def has_network(self) -> bool:
        """Whether clients release noised gradients after them, of a network above the hand-over."""
        return self.privacy.release == "network" and self.kind.releases
