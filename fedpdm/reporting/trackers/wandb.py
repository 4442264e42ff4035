"""Weights & Biases, offline: files in the run directory, and `wandb sync` sends them.

Only where `WANDB_MODE` says `online` does anything leave this machine during the run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import wandb

from fedpdm.reporting.trackers.interface import TrackedRun

__all__ = ["WandbTracker"]


class WandbTracker:
    """One wandb run; a resumed run has the same id, so that they are one when synced."""

    def __init__(self, run: TrackedRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(str(run.folder).encode()).hexdigest()[:16]
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedpdm"),
            name=run.name,
            id=identity,
            resume="allow" if mode == "online" else None,
            dir=str(run.folder),
            config=dict(run.settings),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=round)

    def show(self, round: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: wandb.Image(pixels)}, step=round)

    def close(self) -> None:
        self._run.finish()
