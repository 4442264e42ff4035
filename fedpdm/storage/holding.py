"""A folder that one process works in at a time, and others are told who does.

The lock is the system's (`flock`), so it ends with the process that has it, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from fedpdm.config import ConfigError
from fedpdm.text import json_text, line

__all__ = ["HOLD", "check_not_held", "held"]

HOLD: Final = ".held"  # in the folder, while somebody works there


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Work in a folder, which is made if it is not there.

    Raises:
        ConfigError: another living process works there; it is named.
        OSError: the folder cannot be written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / HOLD
    file = _lock(path)
    try:
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M")}
        file.truncate(0)
        file.write(json_text({**own, "command": " ".join(sys.argv)[:200]}))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if made:
            with contextlib.suppress(OSError):  # it is of use now
                folder.rmdir()


def check_not_held(folder: Path) -> None:
    """`ConfigError` if a living process works in the folder."""
    if (folder / HOLD).exists():
        with open(folder / HOLD) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(folder, file) from None


def _lock(path: Path) -> TextIO:
    """The open lock file, whose name is still that of the file that is locked."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise _refusal(path.parent, file) from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # its holder has just left, and removed it


def _refusal(folder: Path, file: TextIO) -> ConfigError:
    """Says who works there, as far as that is written yet."""
    file.seek(0)
    try:
        who: dict[str, Any] = json.loads(file.read())
        place = "" if who["host"] == socket.gethostname() else f" on {who['host']}"
        words = f"process {who['pid']}{place} since {who['since']} ({who['command']})"
    except (ValueError, KeyError, TypeError):
        words = "another process"
    return ConfigError(f"{folder}: is in use by {line(words)}; wait until it ends")
