"""One cell of an experiment, in a process of its own: train, or go on; score; write the result."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.config import RunConfig, config_to_json
from fedpdm.config.suite import numbered
from fedpdm.evaluation.assessment import assess_run
from fedpdm.privacy.statement import baseline_statement
from fedpdm.reporting.provenance import describe_machine
from fedpdm.reporting.results import DRAWS
from fedpdm.setup.pair import shared_weights
from fedpdm.storage.files import StoreError, locked, read_json, write_atomic, write_json
from fedpdm.storage.holding import held
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.suites.shared_own import score_with_own_models, shared_config
from fedpdm.text import line

__all__ = ["Cell", "finished", "public_config", "run_cell", "run_in_own_process"]

PROMISED = ("guarantee", "epsilon", "delta")  # of a run's privacy statement


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What to run, and where its result goes.

    `draw` is that of the releases' noise; `own_models`: own models are shared by all methods;
    `stop` and `above` as in a suite's method.
    """

    suite: str
    profile: str
    method: str
    seed: int
    draw: int
    ablation: str | None
    variant: str | None
    clients: int
    own_models: bool
    stop: str
    above: str
    config: RunConfig
    runs: Path
    results: Path
    engine: str
    keep: bool

    @property
    def folder(self) -> Path:
        base = self.results / f"{self.suite}-{self.profile}"
        if self.ablation:
            return base / self.ablation / str(self.variant)
        return base / DRAWS if self.draw else base

    @property
    def result(self) -> Path:
        return self.folder / f"{self.method}-{numbered(self.seed, self.draw)}.json"

    @property
    def scored(self) -> range:
        """The clients whose samples are scored."""
        return range(min(self.clients, self.config.partition.num_clients))

    @property
    def title(self) -> str:
        variant = f" ({self.ablation} {self.variant})" if self.ablation else ""
        draw = f" draw {self.draw}" if self.draw else ""
        return f"{self.method}{variant} seed {self.seed}{draw}"

    @property
    def working(self) -> Path:
        """What a process holds while it runs this cell, and no other."""
        parts = (
            self.suite, self.profile, self.ablation, self.variant, self.method, self.seed,
            self.draw or None,
        )  # fmt: skip
        name = "-".join(str(part) for part in parts if part is not None)
        return self.runs / ".working" / name

    @property
    def run_directory(self) -> Path:
        config = shared_config(self.config) if self.own_models else self.config
        digest = hashlib.sha256(config_to_json(config).encode()).hexdigest()[:10]
        return self.runs / f"{self.config.name}-{digest}"


def public_config(config: RunConfig) -> dict[str, Any]:
    """The config as plain data, without the folders of this machine."""
    own: dict[str, Any] = json.loads(config_to_json(config))
    own["data"]["root"] = None
    own["run"] |= {"threads": None, "device": None}
    return own


def finished(cell: Cell) -> bool:
    """Whether exactly this cell has a result already."""
    try:
        known = read_json(cell.result)
    except StoreError:
        return False
    return bool(known.get("config") == public_config(cell.config))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train the cell, or go on with it; score it and write the result, which is returned.

    `ConfigError` if another process runs it.
    """
    with held(cell.working):
        return _run_cell(cell)


def _run_cell(cell: Cell) -> dict[str, Any]:
    trained, scores, pictures = (_with_own_models if cell.own_models else _whole_run)(cell)
    result = {
        "suite": cell.suite,
        "profile": cell.profile,
        "method": cell.method,
        "seed": cell.seed,
        "draw": cell.draw,
        "ablation": cell.ablation,
        "variant": cell.variant,
        **trained,
        **scores,
        "finished": time.strftime("%Y-%m-%d"),
        **describe_machine(),
        "config": public_config(cell.config),
    }
    cell.folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **pictures)
    write_atomic(cell.result.with_suffix(".npz"), stream.getvalue())
    write_json(cell.result, result)
    if not cell.keep:
        shutil.rmtree(cell.run_directory / "clients", ignore_errors=True)
        shutil.rmtree(cell.run_directory / "server", ignore_errors=True)
    return result


Scored = tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]
"""What training cost, the scores, and pictures by name."""


def _whole_run(cell: Cell) -> Scored:
    """The run as it is configured, every client with its own model."""
    run = RunDirectory(cell.run_directory)
    done = (run.root / "privacy.json").exists()
    if done and not (run.root / "clients").is_dir():
        shutil.rmtree(run.root)  # scored before, and its models are gone
        done = False
    if not done:
        _train(cell.config, run, engine=cell.engine)
    scores, pictures = assess_run(run, clients=cell.scored)
    cost = _cost(run)
    cost["seconds"]["scoring"] = scores.pop("seconds")
    scores.pop("method")
    return cost, scores, pictures


def _with_own_models(cell: Cell) -> Scored:
    """The shared model's run, if there is one, and the own models that all methods share."""
    weights = None
    cost: dict[str, Any] = {"megabytes_per_client": 0.0, "seconds": {"training": 0.0}}
    if cell.above == "others":
        guarantee = "none: real images of others are used"
        cost["privacy"] = {"guarantee": guarantee, "epsilon": None, "delta": None}
    elif cell.config.kind.has_shared_model:
        run = RunDirectory(cell.run_directory)
        with locked(run.root.with_name(f"{run.root.name}.lock")):  # other cells may share it
            if not (run.root / "privacy.json").exists():
                _train(shared_config(cell.config), run, engine=cell.engine)
        weights, cost = shared_weights(run), _cost(run)
    else:
        promised = baseline_statement(cell.config)
        cost["privacy"] = {key: promised[key] for key in PROMISED}
    scores, pictures = score_with_own_models(
        cell.config, weights=weights, clients=cell.scored, kept=cell.runs / "own-models",
        early=cell.stop == "early", others=cell.above == "others",
    )  # fmt: skip
    cost["seconds"] |= {"own": scores.pop("own_seconds"), "scoring": scores.pop("seconds")}
    return cost, scores, pictures


def _cost(run: RunDirectory) -> dict[str, Any]:
    """What a finished run promised, sent and took."""
    privacy, history = run.read_json("privacy.json"), run.read_json("metrics.json")
    up, down = (sum(r[k] for r in history["rounds"]) for k in ("bytes_up", "bytes_down"))
    return {
        "privacy": {key: privacy[key] for key in PROMISED},
        "megabytes_per_client": (up + down) / 1e6 / run.config().partition.num_clients,
        "seconds": {"training": sum(r["seconds"] for r in history["rounds"])},
    }


def _train(config: RunConfig, run: RunDirectory, *, engine: str) -> None:
    started = (run.root / "config.yaml").exists()
    if engine == "flower":
        from fedpdm.engines.flower import run_with_flower

        run_with_flower(config, run.root, resume=started)
    else:
        from fedpdm.engines.inprocess import run_in_process

        run_in_process(config, run.root, resume=started)


def run_in_own_process(cell: Cell) -> int:
    """The cell's exit code; one line on standard error if it fails."""
    try:
        if cell.engine == "inprocess":
            signal.signal(signal.SIGINT, _leave)
        run_cell(cell)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(line(error, limit=4000), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _leave(*_: object) -> None:
    """End at once: Flower's server waits for its worker threads, and every file is crash-safe."""
    os._exit(130)
