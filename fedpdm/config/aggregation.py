"""How a server turns coarse updates into new weights: the keys, and which go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key
from fedpdm.config.names import ENCODINGS
from fedpdm.config.plugins import is_named

__all__ = ["METHODS", "ROBUST", "AggregationConfig", "check_aggregation", "check_counts"]

ROBUST = ("median", "trimmed_mean", "krum")
METHODS = ("fedavg", "fedavgm", "fedadam", "fedprox", *ROBUST)
LARGEST_SECURE_COUNT = 1_000_000  # images
LARGEST_SECURE_ROUND = 1000  # clients: beyond it little is left of 32 bits for a number


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """The server's side of federated coarse training (Flower's own strategies)."""

    method: str = key(
        "fedavg",
        "server optimiser, or a robust mean of equal votes (docs/aggregation.md)",
        choices=METHODS,
        own=True,
    )
    server_lr: float | None = key(
        None, "fedavgm (default 1) and fedadam (default 0.01, bias-corrected)", above=0.0
    )
    momentum: float = key(0.9, "fedavgm, and beta_1 of fedadam", low=0.0, below=1.0)
    proximal_mu: float = key(0.01, "fedprox", low=0.0)
    trimmed_share: float = key(
        0.2, "trimmed_mean: share of clients cut off at each end", above=0.0, below=0.5
    )
    num_malicious: int = key(1, "krum: clients that may lie", low=0)
    krum_keep: int = key(1, "krum: updates that are averaged; more than 1 is Multi-Krum", low=1)
    max_update_norm: float | None = key(
        None, "L2 bound on an update, w - w_received: a longer one is shortened to it", above=0.0
    )
    max_examples: int | None = key(
        None, "images that a client may say it has; an answer with more is refused", low=1
    )
    secure: bool = key(
        False, "the server sees the sum of updates, or of class statistics, alone (SecAgg+)"
    )
    secure_range: float = key(
        1.0,
        "secure: largest change of a weight in a round; a client with a larger one fails; class "
        "statistics need none",
        above=0.0,
    )
    secure_threshold: float = key(
        0.67, "secure: share of a round's clients that must stay to its end", above=0.5, high=1.0
    )
    encoding: str = key("float32", "numbers in messages; fewer bits are rounded", choices=ENCODINGS)
    ema_decay: float = key(0.5, "average of the coarse model over rounds", low=0.0, below=1.0)
    fraction_fit: float = key(1.0, "share of clients per round", above=0.0, high=1.0)
    min_clients: int | None = key(None, "clients that must be there; default: all", low=1)
    on_failure: str = key("raise", "a failed client", choices=("raise", "skip"))
    round_timeout: float | None = key(None, "seconds a round may take", above=0.0)
    server_steps_per_round: int | None = key(
        None, "server training: steps per round; default: coarse steps x clients", low=1
    )


def check_aggregation(
    section: AggregationConfig, *, training: str, num_clients: int, statistics: bool = False
) -> None:
    """`ConfigError` for keys that contradict each other or the number of clients.

    `training` is `coarse.training`; `num_clients` are connected, of which a share takes part in
    each round. `statistics`: clients release class statistics, whose sums can be added up securely.
    """
    needing = (
        ("secure", section.secure and not statistics),
        ("max_update_norm", section.max_update_norm is not None),
        (f"method: {section.method}", section.method in ROBUST or is_named(section.method)),
    )
    what = next((name for name, on in needing if on), None)
    if what is not None and statistics:
        raise ConfigError(
            f"aggregation.{what}: does not apply with privacy.release: statistics, whose sums are "
            "added up; each is held against the most that its images can give"
        )
    if what is not None and training != "federated":
        raise ConfigError(
            f"aggregation.{what}: needs coarse.training: federated, got {training}, which "
            "aggregates no updates"
        )
    num_asked = max(1, math.floor(section.fraction_fit * num_clients + 0.5))
    if training == "federated":
        check_counts(section, num_updates=num_asked)
    if section.secure:
        _check_secure(section, num_asked=num_asked)


def check_counts(section: AggregationConfig, *, num_updates: int) -> None:
    """`ConfigError` if a robust method protects nothing with so few updates in a round."""
    n = num_updates
    if section.method == "median" and n < 3:
        raise ConfigError(
            f"aggregation.method: median needs at least 3 updates in a round, got {n}"
        )
    if section.method == "trimmed_mean" and int(section.trimmed_share * n) < 1:
        raise ConfigError(
            f"aggregation.trimmed_share: {section.trimmed_share:g} of {n} updates in a round cuts "
            "off none; it must be at least 1 / updates and below 0.5"
        )
    if section.method == "krum":
        least = 2 * section.num_malicious + 3
        if n < least:
            raise ConfigError(
                f"aggregation.num_malicious: krum with {section.num_malicious} needs at least "
                f"{least} updates in a round, got {n}"
            )
        if section.krum_keep > n - section.num_malicious:
            raise ConfigError(
                f"aggregation.krum_keep: must be at most {n - section.num_malicious}, the updates "
                f"in a round less num_malicious, got {section.krum_keep}"
            )


def _check_secure(section: AggregationConfig, *, num_asked: int) -> None:
    if section.method in ROBUST or is_named(section.method) or section.max_update_norm is not None:
        key_name = "max_update_norm" if section.max_update_norm is not None else "method"
        raise ConfigError(
            f"aggregation.{key_name}: a server that sees only the sum cannot look at single "
            "updates; set secure: false or leave it out"
        )
    if section.max_examples is None or section.max_examples > LARGEST_SECURE_COUNT:
        got = "null" if section.max_examples is None else section.max_examples
        raise ConfigError(
            f"aggregation.max_examples: secure aggregation needs one of at most "
            f"{LARGEST_SECURE_COUNT}, got {got}"
        )
    if not 3 <= num_asked <= LARGEST_SECURE_ROUND:
        raise ConfigError(
            f"aggregation.secure: needs 3 to {LARGEST_SECURE_ROUND} clients in a round (of two, "
            f"each knows the other's update), got {num_asked}"
        )
    if 2 * max(2, round(section.secure_threshold * num_asked)) <= num_asked:
        raise ConfigError(
            f"aggregation.secure_threshold: {section.secure_threshold:g} of {num_asked} clients "
            "must be more than half of them"
        )
