"""TensorBoard event files; `tensorboard --logdir RUN/trackers/tensorboard` shows them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from fedpdm.reporting.trackers.interface import TrackedRun
from fedpdm.text import json_text

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker:
    """Scalars, pictures, and the config as text; a resumed run goes on in the same folder."""

    def __init__(self, run: TrackedRun) -> None:
        resumed = run.first_round > 1
        self._writer = SummaryWriter(str(run.folder), purge_step=run.first_round)
        if not resumed:
            text = json_text(dict(run.settings))
            self._writer.add_text("config", f"```\n{text}\n```", 0)
        self._writer.flush()

    def log(self, round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def show(self, round: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, round, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
