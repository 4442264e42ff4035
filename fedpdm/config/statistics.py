"""The configuration's keys of class statistics, with what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key

__all__ = ["StatisticsConfig", "check_statistics"]


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Class statistics (`privacy.release: statistics`); docs/method.md section 5."""

    means_share: float = key(
        0.12, "share of the budget (of mu squared) that class means get", above=0.0, below=1.0
    )
    pooled_share: float = key(
        0.28,
        "share of the pooled second moment; the class second moments get the rest",
        above=0.0,
        below=1.0,
    )
    dimensions: int = key(
        768, "of the public basis (cosines by rising frequency) that images are read in", low=1
    )
    directions: int = key(48, "leading pooled directions with second moments by class", low=1)
    residual_norm: float | None = key(
        None,
        "L2 bound on an image's distance from its class's mean; default: 0.72 clip_norm",
        above=0.0,
        high=1e6,
    )
    components: int = key(
        1,
        "Gaussians that a class is a mixture of; with more than 1 there are further rounds, and "
        "the shared model is as many times as large",
        low=1,
        high=100,
    )
    component_rounds: int = key(
        3, "rounds in which a class's Gaussians find their places, with components", low=1, high=20
    )
    components_share: float = key(
        0.2,
        "share of the budget that these rounds get together, with components",
        above=0.0,
        below=1.0,
    )

    def __post_init__(self) -> None:
        if self.means_share + self.pooled_share >= 1.0 - 1e-6:
            raise ConfigError(
                "statistics: means_share and pooled_share must sum to less than 1, got "
                f"{self.means_share:g} and {self.pooled_share:g}"
            )
        if self.moves and self.shares[2] < 1e-6:
            raise ConfigError(
                "statistics: means_share, pooled_share and components_share must sum to less than "
                f"1, got {self.means_share:g}, {self.pooled_share:g} and {self.components_share:g}"
            )

    @property
    def moves(self) -> int:
        """Rounds in which components find their places: none where a class is one Gaussian."""
        return self.component_rounds if self.components > 1 else 0

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all rounds in their order; they sum to 1."""
        rest = 1.0 - self.means_share - self.pooled_share
        if not self.moves:
            return self.means_share, self.pooled_share, rest
        each = self.components_share / self.moves
        rest -= self.components_share
        return self.means_share, self.pooled_share, rest, *[each] * self.moves


def check_statistics(
    section: StatisticsConfig, *, training: str, rounds: int, release: str
) -> None:
    """Refuse a run of class statistics with a trained shared model, or with too few rounds."""
    if training != "server":
        raise ConfigError(
            f"coarse.training: must be server with privacy.release: {release}, whose coarse model "
            f"the server computes, got {training}"
        )
    if rounds < (least := len(section.shares)):
        more = f" (3 and statistics.component_rounds = {section.moves})" if section.moves else ""
        raise ConfigError(
            f"run.rounds: must be at least {least} with privacy.release: {release}, one for each "
            f"of its sums{more}, got {rounds}"
        )
