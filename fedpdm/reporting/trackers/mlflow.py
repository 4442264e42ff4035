"""MLflow: an SQLite file in the run directory, or the server that `MLFLOW_TRACKING_URI` names.

`mlflow ui --backend-store-uri sqlite:///RUN/trackers/mlflow/mlflow.db` shows the former.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from PIL import Image

from fedpdm.reporting.trackers.interface import TrackedRun
from fedpdm.storage.files import write_atomic

__all__ = ["MlflowTracker"]

_LONGEST_PARAM = 500
_PARAMS_AT_ONCE = 100


class MlflowTracker:
    """One MLflow run; its id is kept beside the store, and a resumed run goes on with it."""

    def __init__(self, run: TrackedRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        address = os.environ.get("MLFLOW_TRACKING_URI")
        database = f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=address or database)
        kept = run.folder / "run-id"
        if kept.exists():
            self._id = kept.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedpdm")
        known = self._client.get_experiment_by_name(title)
        place = None if address else (run.folder / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(title, place)
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in run.settings.items()]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])
        write_atomic(kept, f"{self._id}\n".encode())

    def log(self, round: int, values: Mapping[str, float]) -> None:
        metrics = [Metric(name, value, 0, round) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, round: int, name: str, pixels: np.ndarray) -> None:
        picture = Image.fromarray(pixels)
        self._client.log_image(self._id, picture, artifact_file=f"{name}-round{round}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)
