"""A node's warm process: it has imported what every message needs, and forks for each.

Flower starts a process per message. Importing PyTorch and Diffusers there takes longer than many a
round. This process imports the libraries once, and nothing that a coordinator ships or a config
chooses: that is found anew in the forked process, under the node's guard. It has one thread, has
opened no CUDA device, and ends with the process that holds the other end of its standard input.

`doorbell` is what asks, from Flower's side. If this process is gone, messages are worked on as
Flower would, more slowly.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib.metadata
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpdm.engines.doorbell import SOCKET

__all__ = ["serve", "warm_process", "write_command"]

COMMAND = "flwr-clientapp"
MODULE = "fedpdm.engines.warm"


def write_command(folder: Path, *, directory: Path, otherwise: Sequence[str]) -> None:
    """Write a `flwr-clientapp` that asks the warm process of `directory`, else runs `otherwise`."""
    folder.mkdir(parents=True, exist_ok=True)
    doorbell = Path(__file__).with_name("doorbell.py")
    start = [sys.executable, "-I", "-S", str(doorbell), str(directory)]
    quoted = [" ".join(map(shlex.quote, words)) for words in (start, otherwise)]
    path = folder / COMMAND
    path.write_text(f'#!/bin/sh\nexec {quoted[0]} "$@" -- {quoted[1]} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


@contextlib.contextmanager
def warm_process(
    directory: Path, *, environment: Mapping[str, str], guarded: bool = True
) -> Iterator[None]:
    """A warm process that serves `directory` until the block ends, or this process does."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # whoever can connect can run code as this user
    command = [sys.executable, "-P", "-m", MODULE, str(directory), str(int(guarded))]
    process = subprocess.Popen(command, env=dict(environment), cwd=directory, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class _Call:
    """A connection: what has been received of its request, and the process that works on it."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    files: list[int] = field(default_factory=list)
    child: int = 0


def serve(directory: Path, *, guarded: bool) -> None:
    """Fork for each request, until standard input is closed; then end what was forked."""
    from fedpdm.jobs import libraries  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the process that began this
    gc.freeze()
    os.chdir(directory)
    Path(SOCKET).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door, selectors.DefaultSelector() as waiting:
        door.bind(SOCKET)
        door.listen(64)
        ended, wake = socket.socketpair()
        ended.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        calls: dict[int, _Call] = {}
        for source in (door, ended, sys.stdin):
            waiting.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is sys.stdin:
                    _end(calls.values())
                    Path(SOCKET).unlink(missing_ok=True)
                    return
                if key.fileobj is ended:
                    with contextlib.suppress(BlockingIOError):
                        ended.recv(4096)
                    _report(calls, waiting)
                elif key.fileobj is door:
                    connection, _ = door.accept()
                    waiting.register(connection, selectors.EVENT_READ)
                    calls[connection.fileno()] = _Call(connection)
                else:
                    _hear(calls, key.fd, waiting, guarded=guarded)


def _hear(
    calls: dict[int, _Call], number: int, waiting: selectors.BaseSelector, *, guarded: bool
) -> None:
    """Read from a connection: a part of its request, a signal for its process, or its end."""
    call = calls.get(number)
    if call is None:
        return
    if call.child:
        told = call.connection.recv(16)
        with contextlib.suppress(ProcessLookupError):
            os.kill(call.child, told[0] if told else signal.SIGKILL)
        if not told:
            waiting.unregister(call.connection)
        return
    space = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    try:
        part, extra, _, _ = call.connection.recvmsg(1 << 16, space)
    except OSError:
        part, extra = b"", []
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            call.files += array.array("i", data[: len(data) // 4 * 4]).tolist()
    call.received += part
    if not part:
        _close(calls, number, waiting)
    elif len(call.received) >= 8:
        size = int.from_bytes(call.received[:8], "big")
        if len(call.received) >= 8 + size:
            call.child = _fork(call, json.loads(bytes(call.received[8:])), guarded=guarded)
            for file in call.files:
                os.close(file)
            call.files.clear()


def _fork(call: _Call, request: Mapping[str, Any], *, guarded: bool) -> int:
    """The number of a new process that works on this request."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, file in enumerate(call.files):
            os.dup2(file, target)
        os.closerange(3, 1024)  # the other side's connections
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        code = _work([COMMAND, *request["arguments"]], guarded=guarded)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _work(arguments: Sequence[str], *, guarded: bool) -> int:
    """Run Flower's command as its own process would; its exit code."""
    try:
        if guarded:
            from fedpdm.engines.deployed.guard import main

            main(arguments)
        else:
            (command,) = importlib.metadata.entry_points(group="console_scripts", name=COMMAND)
            sys.argv = list(arguments)
            command.load()()
    except SystemExit as end:
        import atexit

        atexit._run_exitfuncs()
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _report(calls: dict[int, _Call], waiting: selectors.BaseSelector) -> None:
    """Tell those who asked that their process has ended."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if child == 0:
            return
        for number, call in list(calls.items()):
            if call.child == child:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):
                    call.connection.sendall(code.to_bytes(4, "big", signed=True))
                _close(calls, number, waiting)


def _close(calls: dict[int, _Call], number: int, waiting: selectors.BaseSelector) -> None:
    call = calls.pop(number)
    with contextlib.suppress(KeyError):
        waiting.unregister(call.connection)
    call.connection.close()
    for file in call.files:
        os.close(file)


def _end(calls: Collection[_Call]) -> None:
    """End what is still at work."""
    for call in calls:
        if call.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(call.child, signal.SIGTERM)
    for call in calls:
        if call.child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(call.child, 0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), guarded=sys.argv[2] == "1")
