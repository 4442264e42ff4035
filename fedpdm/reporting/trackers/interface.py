"""The interface of a tracker, and what it is told at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["TrackedRun", "Tracker"]


class Tracker(Protocol):
    """Takes numbers and pictures of a run by round; `close` comes last."""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Numbers of a round, by names with `/` between groups."""

    def show(self, round: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8 RGB (H, W, 3)."""

    def close(self) -> None:
        """Everything is written when this returns."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told at the start.

    `settings` is the config, flat; `folder` is this tracker's own; `first_round` is after 1 in a
    run that goes on.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    first_round: int
