"""One cell of an experiment, in a process of its own: train, or go on; score; write the result."""

from __future__ import annotations

import dataclasses
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

from fedpdm.config import RunConfig, config_from_mapping, config_to_json
from fedpdm.evaluation.assessment import assess_run
from fedpdm.reporting.provenance import describe_machine
from fedpdm.storage.files import StoreError, read_json, write_atomic, write_json
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import line

__all__ = ["Cell", "finished", "public_config", "run_cell"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What to run, and where its result goes."""

    suite: str
    profile: str
    method: str
    seed: int
    ablation: str | None
    variant: str | None
    clients: int
    config: RunConfig
    runs: Path
    results: Path
    engine: str
    keep: bool

    @property
    def folder(self) -> Path:
        base = self.results / f"{self.suite}-{self.profile}"
        return base / self.ablation / str(self.variant) if self.ablation else base

    @property
    def result(self) -> Path:
        return self.folder / f"{self.method}-seed{self.seed}.json"

    @property
    def title(self) -> str:
        variant = f" ({self.ablation} {self.variant})" if self.ablation else ""
        return f"{self.method}{variant} seed {self.seed}"

    @property
    def run_directory(self) -> Path:
        digest = hashlib.sha256(config_to_json(self.config).encode()).hexdigest()[:10]
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
    """Train the cell, or go on with it; score it and write the result, which is returned."""
    run = RunDirectory(cell.run_directory)
    done = (run.root / "privacy.json").exists()
    if done and not (run.root / "clients").is_dir():
        shutil.rmtree(run.root)  # scored before, and its models are gone
        done = False
    clients = range(min(cell.clients, cell.config.partition.num_clients))
    if not done:
        _train(cell, run)
    history = run.read_json("metrics.json")
    scores, pictures = assess_run(run, clients=clients)
    privacy = run.read_json("privacy.json")
    up, down = (sum(r[k] for r in history["rounds"]) for k in ("bytes_up", "bytes_down"))
    result = {
        "suite": cell.suite,
        "profile": cell.profile,
        "method": cell.method,
        "seed": cell.seed,
        "ablation": cell.ablation,
        "variant": cell.variant,
        "privacy": {key: privacy[key] for key in ("guarantee", "epsilon", "delta")},
        "megabytes_per_client": (up + down) / 1e6 / cell.config.partition.num_clients,
        "seconds": {
            "training": sum(r["seconds"] for r in history["rounds"]),
            "scoring": scores.pop("seconds"),
        },
        **{name: value for name, value in scores.items() if name != "method"},
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
        shutil.rmtree(run.root / "clients", ignore_errors=True)
        shutil.rmtree(run.root / "server", ignore_errors=True)
    return result


def _train(cell: Cell, run: RunDirectory) -> None:
    started = (run.root / "config.yaml").exists()
    if cell.engine == "flower":
        from fedpdm.engines.flower import run_with_flower

        run_with_flower(cell.config, run.root, resume=started)
    else:
        from fedpdm.engines.inprocess import run_in_process

        run_in_process(cell.config, run.root, resume=started)


def to_text(cell: Cell) -> str:
    """A cell as JSON; `from_text` is its inverse."""
    plain = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}
    plain |= {"config": json.loads(config_to_json(cell.config))}
    return json.dumps(plain, default=str, allow_nan=False)


def from_text(text: str) -> Cell:
    plain = json.loads(text)
    return Cell(
        **{
            **plain,
            "config": config_from_mapping(plain["config"]),
            "runs": Path(plain["runs"]),
            "results": Path(plain["results"]),
        }
    )


def main() -> int:
    """Run the cell that standard input describes; one line on standard error if it fails."""
    try:
        cell = from_text(sys.stdin.read())
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


if __name__ == "__main__":
    sys.exit(main())
