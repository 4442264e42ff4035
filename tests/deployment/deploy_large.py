"""A large model over gRPC with TLS: bytes per message, peak memory of each process, seconds.

`python -m tests.deployment.deploy_large` runs a federation of real processes (one coordinator,
three nodes, registered keys) in which the coarse model is the `paper` U-Net, once with each
encoding of messages. Gradient steps and images are as few as they can be: what is measured is the
transport. Prints a JSON line per encoding and a table; exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.privacy.releases import ReleaseStore
from tests.support.real_nodes import MARK, deployed, real_federation, share_out, wait_until

CLIENTS = 3
PROCESSES = {  # a part of its command line, and what it is
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
}


def large_config(encoding: str, rounds: int) -> RunConfig:
    """Three clients with 16 images of 32x32 each; one step per round of either model."""
    step = {"steps_per_round": 1, "batch_size": 1, "warmup_steps": 0}
    return config_from_mapping(
        {
            "name": f"large-{encoding}",
            "run": {"rounds": rounds, "seed": 0},
            "data": {"name": "cifar10", "max_images": 16 * CLIENTS},
            "partition": {"kind": "iid", "num_clients": CLIENTS},
            "privacy": {"epsilon": 10.0, "clip_norm": 8.0},
            "coarse": {"preset": "paper", **step},
            "fine": {"preset": "micro", **step},
            "aggregation": {"encoding": encoding},
            "sampling": {"num_steps": 1, "per_class": 1},
            "evaluation": {"every": rounds, "image_metrics": False},
        }
    )


class Peaks:
    """Peak resident bytes (VmHWM) of a federation's processes by kind, looked at while it runs.

    The kernel keeps a process's peak, so that one is missed only for what a process adds in the
    last quarter of a second before it ends.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.bytes: dict[str, int] = {}
        self._mine: dict[int, str | None] = {}  # pid: kind, of processes seen so far
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            pids = set(psutil.pids())
            self._mine = {pid: kind for pid, kind in self._mine.items() if pid in pids}
            for pid in pids:
                if (kind := self._kind(pid)) is not None:
                    self.bytes[kind] = max(self.bytes.get(kind, 0), _peak(pid))

    def _kind(self, pid: int) -> str | None:
        """What a process is; None for one that is not of this federation, or something else."""
        if self._mine.get(pid) is None:  # it may have become something by exec(2)
            self._mine[pid] = None
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                if process.environ().get(MARK) == self._root:
                    words = [Path(word).name for word in process.cmdline()[:3]]
                    self._mine[pid] = next((PROCESSES[w] for w in words if w in PROCESSES), None)
        return self._mine[pid]


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def measure(root: Path, encoding: str, rounds: int) -> dict[str, Any]:
    """One run; `AssertionError` if it did not end well."""
    simulated = large_config(encoding, rounds)
    with real_federation(root) as federation, Peaks(root) as peaks:
        parts = share_out(simulated, root / "data")
        config = deployed(simulated, root / "data")
        nodes = [federation.node(f"node-{k}", k, part) for k, part in enumerate(parts)]
        federation.start()
        for node in nodes:
            node.start()
        wait_until(lambda: all(node.joined() for node in nodes), "all nodes are online")
        load, begun = os.getloadavg()[0], time.monotonic()
        run = federation.run(config, root / "run")
        code = run.code(3600.0)
        seconds = time.monotonic() - begun
        assert code == 0, run.output()
        for node in nodes:
            assert ReleaseStore(node.store).spent(delta=1e-5).releases_per_image == 1
    records = json.loads((root / "run" / "metrics.json").read_text())["rounds"]
    assert [len(record["clients"]) for record in records] == [CLIENTS] * rounds
    return {
        "encoding": encoding,
        "bytes_up": records[0]["bytes_up"] // CLIENTS,
        "bytes_down": records[0]["bytes_down"] // CLIENTS,
        "seconds_per_round": [round(record["seconds"], 1) for record in records],
        "seconds": round(seconds, 1),
        "peak_mb": {kind: round(size / 1e6) for kind, size in sorted(peaks.bytes.items())},
        "load_before": round(load, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoding", action="append", choices=("float32", "bfloat16", "int8"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = []
    for encoding in options.encoding or ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory(prefix="fedpdm-large-") as folder:
            try:
                results.append(measure(Path(folder), encoding, options.rounds))
            except AssertionError as error:
                print(f"{encoding}: FAILED: {error}", file=sys.stderr)
                return 1
        print(json.dumps(results[-1]), flush=True)
    kinds = list(PROCESSES.values())
    print(
        "encoding  MB up  MB down  s per round    " + "  ".join(f"{k:>9}" for k in kinds) + "  MB"
    )
    for found in results:
        pace = "/".join(f"{seconds:.0f}" for seconds in found["seconds_per_round"])
        peak = "  ".join(f"{found['peak_mb'].get(kind, 0):>9}" for kind in kinds)
        up, down = found["bytes_up"] / 1e6, found["bytes_down"] / 1e6
        print(f"{found['encoding']:<8} {up:>6.1f} {down:>8.1f}  {pace:<13}  {peak}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
