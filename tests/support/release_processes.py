"""Releases in processes of their own, which can be killed, limited and raced.

Run as a script it imports what a release needs once and forks a process for every line it reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ReleaseProcesses:
    """Starts processes that ask for a release of the same images, and hears what they got."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._results: dict[int, dict[str, Any]] = {}

    def start(self, root: Path, **options: Any) -> int:
        """Process number of one more process; see `_work` for the options."""
        return int(self._ask({"root": str(root), **options})["pid"])

    def results(self) -> dict[int, dict[str, Any]]:
        """What every process since the last call has told, once all have ended; by number."""
        self._ask({"wait": True})
        told, self._results = self._results, {}
        return told

    def obtain(self, root: Path, **options: Any) -> dict[str, Any]:
        """What one process tells."""
        pid = self.start(root, **options)
        return self.results()[pid]

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            if "from" not in told:
                return told
            self._results[told["from"]] = told
        raise AssertionError("the process that starts the others has ended")


@contextmanager
def release_processes() -> Iterator[ReleaseProcesses]:
    """One `ReleaseProcesses`; everything it started has ended afterwards."""
    command = [sys.executable, "-m", "tests.support.release_processes"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield ReleaseProcesses(process)
        assert process.stdin is not None
        process.stdin.close()


# In the other processes.


def _work(options: dict[str, Any]) -> dict[str, Any]:
    """One release of `count` images, 3 x `side` x `side`.

    `at` is the time at which all begin; `uid` who the process is; `file_size` the largest file
    that it may write; `all_at_once` plants the fault of holding the whole release in memory.
    """
    from fedpdm.privacy.mechanism import ImageMechanism
    from fedpdm.privacy.releases import ReleaseStore
    from fedpdm.storage.files import StoreError
    from tests.support.release_toys import request

    images = _images(options.get("count", 3000), options.get("side", 32))
    asked = request(simulation=False, **options.get("settings", {}))
    if uid := options.get("uid"):
        os.setuid(uid)
    if size := options.get("file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if options.get("all_at_once"):
        real = ImageMechanism.make
        ImageMechanism.make = lambda *given: iter(  # type: ignore[method-assign]
            [chunk.copy() for chunk in real(*given)]
        )
    time.sleep(max(0.0, options.get("at", 0.0) - time.time()))
    with _peak() as memory:
        try:
            released = ReleaseStore(Path(options["root"])).obtain(images, asked)
        except StoreError as error:
            return {"error": str(error)}
    values = released.x_tilde.numpy()
    return {
        "error": None,
        "rows": len(released),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "anonymous": memory[0],
    }


def _images(count: int, side: int) -> Any:
    import numpy as np

    from fedpdm.data import ImageSet

    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    labels = np.zeros(count, dtype=np.int64)
    return ImageSet(images=pixels, labels=labels, class_names=("a",), background=0.0)


def _anonymous() -> int:
    """Bytes of memory in use now that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("this system does not tell")


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Bytes by which anonymous memory rises at most, looked at every 2 ms."""
    start, peak, done = _anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous() - start)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _serve() -> None:
    import dp_accounting  # noqa: F401 (who may not read it gets it from here)
    import torch

    from fedpdm.privacy.noise import SystemNoise
    from fedpdm.privacy.releases import ReleaseStore  # noqa: F401
    from tests.support.release_toys import request  # noqa: F401

    torch.set_num_threads(1)
    SystemNoise()  # makes the table that all share
    children = []
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("wait"):
            for child in children:
                os.waitpid(child, 0)
            children = []
            os.write(1, b'{"waited": true}\n')
            continue
        if (child := os.fork()) == 0:
            status = 1
            try:
                told = {"from": os.getpid(), **_work(command)}
                os.write(1, json.dumps(told).encode() + b"\n")
                status = 0
            finally:
                os._exit(status)
        children.append(child)
        os.write(1, json.dumps({"pid": child}).encode() + b"\n")


if __name__ == "__main__":
    _serve()
