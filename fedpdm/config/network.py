"""The configuration's keys of the private network, with what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key

__all__ = ["NetworkConfig", "check_network_run"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A private network above the hand-over (`privacy.release: network`); docs/method.md section 6.

    The network's form and its warm-up are those of the section `coarse`.
    """

    share: float = key(
        0.7,
        "share of the budget (of mu squared) that the network's rounds get; class statistics get "
        "the rest",
        above=0.0,
        below=1.0,
    )
    rounds: int = key(
        100, "rounds of noised gradients, after those of class statistics", low=1, high=100_000
    )
    sample_rate: float = key(
        0.1,
        "probability with which a client draws each of its images in such a round",
        above=0.0,
        high=1.0,
    )
    clip_norm: float = key(0.2, "L2 bound on an image's gradient", low=1e-6, high=1e6)
    draws: int = key(
        4, "draws of t and noise for each drawn image; its gradient is their mean", low=1, high=1024
    )
    lr: float = key(1e-3, "learning rate of these rounds, constant", above=0.0)
    warmup_steps: int = key(
        1000, "steps that the server takes before, on draws of the class Gaussians", low=0
    )
    lowest_t: int | None = key(
        None, "least t that the network is trained for; default: 0.1 T, or the hand-over", low=1
    )
    highest_t: int | None = key(
        None,
        "greatest t that it is trained for, above which the Gaussians answer; default: 0.3 T, or T "
        "where the hand-over is that high",
        low=1,
    )


def check_network_run(
    section: NetworkConfig,
    *,
    secure: bool,
    accounting: str,
    num_steps: int,
    handover: int | None,
) -> None:
    """Refuse what does not go with a network."""
    if secure:
        raise ConfigError(
            "aggregation.secure: must be false with privacy.release: network, whose gradients are "
            "not added up securely; got true"
        )
    if accounting != "exact":
        raise ConfigError(
            "privacy.accounting: must be exact with privacy.release: network, for Theorem 5.1 "
            f"knows no drawn images; got {accounting}"
        )
    lowest, highest = section.lowest_t or 1, section.highest_t or num_steps
    if highest > num_steps:
        raise ConfigError(
            f"network.highest_t: must be at most schedule.num_steps = {num_steps}, got {highest}"
        )
    if lowest > highest:
        raise ConfigError(f"network.lowest_t: must be at most highest_t = {highest}, got {lowest}")
    if handover is not None and not lowest <= handover <= highest:
        raise ConfigError(
            "sampling.handover: must be from network.lowest_t to network.highest_t, "
            f"{lowest} to {highest}, got {handover}"
        )
