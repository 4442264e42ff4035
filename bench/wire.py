"""Bytes between server and clients, for the same coarse model."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["wire"]


def wire() -> dict[str, Any]:
    """Bytes per client of a whole run in plain float32 FedAvg over the fewest for its result.

    Both ways, evaluation included. The result is the held-out coarse loss beyond its floor of 1,
    within 5%; server training takes as many coarse steps as all clients together.
    """
    runs = {}
    for training in ("federated", "server"):
        for encoding in ("float32", "bfloat16", "int8"):
            runs[f"{training} {encoding}"] = _run(training, encoding)
    plain = runs["federated float32"]
    same = [
        run["bytes_per_client"]
        for run in runs.values()
        if run["loss"] - 1.0 <= 1.05 * (plain["loss"] - 1.0)
    ]
    return {"ratio": plain["bytes_per_client"] / min(same), "runs": runs}


def _run(training: str, encoding: str) -> dict[str, float]:
    from fedpdm.config import config_from_mapping
    from fedpdm.engines.inprocess import run_in_process

    clients, rounds = 4, 10
    steps = {"preset": "micro", "batch_size": 8}
    config = config_from_mapping(
        {
            "name": "wire",
            "run": {"rounds": rounds, "device": "cpu"},
            "data": {"name": "digits"},
            "partition": {"kind": "iid", "num_clients": clients},
            "privacy": {"epsilon": 10, "clip_norm": 8},
            "coarse": {**steps, "training": training, "steps_per_round": 4},
            "fine": {**steps, "steps_per_round": 0},
            "aggregation": {"encoding": encoding},
            "evaluation": {"every": rounds, "image_metrics": False},
            "sampling": {"num_steps": 2, "per_class": 1},
        }
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run_in_process(config, Path(folder) / "run")
        history = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    sent = sum(record["bytes_up"] + record["bytes_down"] for record in history["rounds"])
    return {
        "bytes_per_client": sent / clients,
        "loss": history["final"]["heldout_coarse_loss"],
    }
