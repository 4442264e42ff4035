"""Keep a SuperNode running until told to stop, one per store.

A SuperNode that ends (the coordinator was away for long, a crash, a killed process) is started
again; whatever a round needs is in the store, so nothing is lost and no image is noised twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpdm.config import ConfigError
from fedpdm.engines.flowercli import shown_line
from fedpdm.engines.warm import warm_process

__all__ = ["NodeCommand", "run_node"]

# Seconds before a new start. A node is known to be lost a minute after its last sign of life. A key
# that is let in just then, before Flower has looked (every 3 s), hides the loss: the message that
# the node was working on would be waited for without end.
PAUSE = 70.0


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """How Flower's SuperNode is to be started: command without port, environment, directory.

    `warm` is where the process is found that has imported what its messages need.
    """

    client_id: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: Path
    lock: Path
    warm: Path


def run_node(node: NodeCommand, *, port: int | None = None) -> int:
    """Run the SuperNode until this process is told to stop (SIGTERM, SIGINT); returns 0.

    `port` is that of its own interface on loopback, by default a free one. `ConfigError` if another
    node runs on the same store.
    """
    stop = threading.Event()
    with (
        _alone(node.lock),
        _signals(stop),
        warm_process(node.warm, environment=node.environment),
    ):
        while not stop.is_set():
            code = _run_once(node, port or _free_port(), stop)
            if stop.is_set():
                break
            print(
                f"node {node.client_id}: the SuperNode ended with exit code {code}; it is started "
                f"again in {PAUSE:.0f} s",
                flush=True,
            )
            stop.wait(PAUSE)
    print(f"node {node.client_id}: stopped", flush=True)
    return 0


def _run_once(node: NodeCommand, port: int, stop: threading.Event) -> int:
    command = [*node.command, "--host", "127.0.0.1", "--port", str(port)]
    with (
        _passed_on(lambda text: print(text, flush=True)) as out,
        _passed_on(lambda text: print(text, file=sys.stderr, flush=True)) as errors,
        subprocess.Popen(
            command, cwd=node.cwd, env=dict(node.environment), stdin=subprocess.DEVNULL,
            stdout=out, stderr=errors,
        ) as process,
    ):  # fmt: skip
        while process.poll() is None:
            if not stop.wait(0.5):
                continue
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.returncode


@contextlib.contextmanager
def _passed_on(show: Callable[[str], None]) -> Iterator[int]:
    """A pipe to write to; what comes is shown by the line: plain text, in colour on a terminal
    alone. At the end what was written is waited for, not what a process left behind may write."""
    reading, writing = os.pipe()

    def read() -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for each in lines:
                show(shown_line(each))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield writing
    finally:
        os.close(writing)
        reader.join(timeout=2.0)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the store's node lock, or refuse: two nodes of one identity would disturb each other."""
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{lock.parent}: another node runs on this store") from None
        yield


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask to stop."""
    kept = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
