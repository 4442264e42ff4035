"""The configuration's keys of the run itself, with what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key
from fedpdm.diffusion.names import PRECISIONS

__all__ = ["RunSection"]


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Who, how long, where."""

    seed: int = key(0, "everything but deployed privacy noise derives from it", low=0)
    rounds: int = key(10, "federated rounds", low=1)
    begun_with: int | None = key(
        None, "rounds of a run that goes on for more; written by --resume --set run.rounds", low=1
    )
    simulation: bool = key(True, "one party holds all data; allows seeded noise and raw metrics")
    device: str = key(
        "auto",
        "auto, cpu, cuda, cuda:1, ...",
        form=(r"[a-z]{1,16}(:\d{1,4})?", "a device of torch"),
    )
    precision: str = key("auto", "number format", choices=PRECISIONS)
    threads: int = key(1, "torch threads per client process; 0 leaves torch's default", low=0)
    trackers: tuple[str, ...] = key(
        (),
        "also show rounds and samples in (docs/report.md)",
        choices=("tensorboard", "wandb", "mlflow"),
    )

    def __post_init__(self) -> None:
        if self.begun_with is not None and not self.simulation:
            raise ConfigError(
                f"run.begun_with: must be null outside simulation, got {self.begun_with}"
            )
        if self.begun_with is not None and self.begun_with >= self.rounds:
            raise ConfigError(
                f"run.begun_with: must be less than run.rounds = {self.rounds}, "
                f"got {self.begun_with}"
            )
