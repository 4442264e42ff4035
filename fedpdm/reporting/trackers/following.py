"""Trackers that follow a run: checked before it starts, fed by the server, never in its way.

They get what the server knows: each round's record of `metrics.json`, samples of the models
after each evaluated round and, in simulation, the picture of samples that was drawn at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig, config_to_json
from fedpdm.reporting.trackers.interface import TrackedRun, Tracker
from fedpdm.reporting.trackers.pictures import final_pictures, round_pictures
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["RunTrackers", "check_trackers", "flat_record", "open_trackers"]

# What must be installed, by name of the tracker and of the extra that brings it.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(config: RunConfig) -> None:
    """`ConfigError`, one line, for a tracker whose package is not installed, or named twice."""
    names = config.run.trackers
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"run.trackers: {name} is named twice")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            extra = "fedpdm" if name == "tensorboard" else f"fedpdm[{name}]"
            raise ConfigError(
                f"run.trackers: {name} needs the package {PACKAGES[name]}, which is not installed; "
                f"pip install '{extra}'"
            )


def open_trackers(
    config: RunConfig, root: Path, *, first_round: int, say: Callable[[str], None]
) -> RunTrackers:
    """The config's trackers, with their files in `root/trackers/NAME`.

    `ConfigError`, one line, if one cannot be opened.
    """
    check_trackers(config)
    opened: dict[str, Tracker] = {}
    for name in config.run.trackers:
        run = TrackedRun(
            name=config.name,
            folder=(root / "trackers" / name).absolute(),
            settings=_settings(config),
            first_round=first_round,
        )
        try:
            opened[name] = _open(name, run)
        except Exception as error:  # these libraries raise anything
            line = " ".join(str(error).split())[:200]
            raise ConfigError(f"run.trackers: {name} cannot be opened: {line}") from None
    return RunTrackers(opened, config=config, root=root, say=say)


def _open(name: str, run: TrackedRun) -> Tracker:
    if name == "tensorboard":
        from fedpdm.reporting.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker(run)
    if name == "wandb":
        from fedpdm.reporting.trackers.wandb import WandbTracker

        return WandbTracker(run)
    from fedpdm.reporting.trackers.mlflow import MlflowTracker

    return MlflowTracker(run)


class RunTrackers:
    """All trackers of a run. One that fails is left behind, with a line; the run goes on."""

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        *,
        config: RunConfig,
        root: Path,
        say: Callable[[str], None],
    ) -> None:
        self._trackers, self._config, self._say = dict(trackers), config, say
        self._run = RunDirectory(root)
        self._draws = True

    def round(self, record: Mapping[str, Any]) -> None:
        """A round's record, as in `metrics.json`; samples, if it was one of evaluation.

        The run's checkpoint is that of the round.
        """
        round, values = int(record["round"]), flat_record(record)
        self._each(lambda tracker: tracker.log(round, values))
        last, every = self._config.run.rounds, self._config.evaluation.every
        if round == last or round % every == 0:
            self._show(round, lambda: round_pictures(self._run, self._config, round))

    def finish(self, weights: Mapping[str, torch.Tensor], history: Mapping[str, Any]) -> None:
        """The closing evaluation and the last picture; every tracker is closed.

        `weights` are the shared model's, averaged.
        """
        last = int(history["rounds"][-1]["round"])
        final = {f"final/{k}": v for k, v in flat_record(history["final"]).items()}
        self._each(lambda tracker: tracker.log(last, final))
        self._show(last, lambda: final_pictures(self._config, self._run, weights))
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _show(self, round: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Pictures to all trackers; once they could not be drawn, no more are."""
        if not (self._draws and self._trackers):
            return
        try:
            pictures = draw()
        except (ValueError, OSError, RuntimeError) as error:
            self._draws = False
            self._say(f"trackers get no pictures: {' '.join(str(error).split())[:200]}")
            return
        for name, pixels in pictures.items():
            self._each(functools.partial(_show, round, name, pixels))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # these libraries raise anything
                del self._trackers[name]
                line = " ".join(str(error).split())[:200]
                self._say(f"tracker {name} failed, the run goes on without it: {line}")


def _show(round: int, name: str, pixels: np.ndarray, tracker: Tracker) -> None:
    tracker.show(round, name, pixels)


def flat_record(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record; a client's are named `client_3/...`, failures are counted."""
    values = _numbers(record)
    values.pop("round", None)
    for metrics in record.get("clients", ()):
        own = _numbers(metrics)
        who = int(own.pop("client_id", -1))
        values |= {f"client_{who}/{name}": value for name, value in own.items()}
    if "failed" in record:
        values["failed_clients"] = float(len(record["failed"]))
    return values


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """`section.key` of the whole config; no folder of this machine."""
    data = dataclasses.replace(config.data, root=None)
    nested = json.loads(config_to_json(dataclasses.replace(config, data=data)))
    flat: dict[str, Any] = {}
    for section, values in nested.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": _plain(value) for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value
