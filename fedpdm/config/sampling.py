"""The configuration's keys of sampling, with what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key

__all__ = ["SamplingConfig", "check_candidates", "check_sampling"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are drawn."""

    scheduler: str = key(
        "dpm_solver",
        "ddpm, ddim, dpm_solver or a diffusers scheduler class",
        form=(r"[A-Za-z_]\w{0,99}", "a name"),
    )
    num_steps: int = key(25, "denoiser calls per sample", low=1)
    guidance: float = key(1.0, "classifier-free guidance weight, 1: none", low=0.0)
    coarse_worth: float | None = key(
        None,
        "mix above t0: as many raw images of a class as the coarse model is worth; default: the "
        "coarse model alone",
        above=0.0,
    )
    handover: int | None = key(
        None,
        "class statistics: t at which the fine model takes over; default: each client chooses "
        "(docs/method.md section 5), with a network 0.15 T",
        low=1,
    )
    fine_labels: bool | None = key(
        None,
        "whether the fine model is told the class under the hand-over; default: with released "
        "images yes, with class statistics each client chooses, with a network no",
    )
    candidates: int | None = key(
        None,
        "class statistics: images drawn for each one that is kept, the one whose class the "
        "Gaussians find most likely; default: each client chooses, with a network 4, without class "
        "statistics 1",
        low=1,
        high=64,
    )
    own_classes: str = key(
        "auto",
        "class statistics: auto lets a client that chooses how to sample draw the classes of which "
        "it has many images from its own model alone, where that is better; never does not",
        choices=("auto", "never"),
    )
    batch_size: int = key(256, "images at a time", low=1)
    per_class: int = key(8, "images per class in the picture", low=1)


def check_sampling(section: SamplingConfig, *, num_steps: int, release: str) -> None:
    """Refuse a hand-over outside of the chain, and candidates that nothing can choose from."""
    if (section.handover or 0) > num_steps:
        raise ConfigError(
            f"sampling.handover: must be at most schedule.num_steps = {num_steps}, "
            f"got {section.handover}"
        )
    if release == "images":  # of a custom mechanism the set-up knows
        check_candidates(section, release=release)


def check_candidates(section: SamplingConfig, *, release: str) -> None:
    """Refuse candidates with a release of another kind."""
    if (section.candidates or 1) > 1:
        raise ConfigError(
            "sampling.candidates: must be 1 without privacy.release: statistics or network, whose "
            f"Gaussians choose between candidates, got {section.candidates} with {release}"
        )
