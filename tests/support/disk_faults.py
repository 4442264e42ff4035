"""Disks that fill up and processes that end in the middle, planted in the calls to the system."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    """The process ends here."""


class CrashAt:
    """Ends the process before the `at`-th call that changes the disk.

    Counted are `os.fsync`, `os.replace`, `os.unlink` and every write to a file opened for
    writing. `calls` are their names so far. A file's unwritten buffer is lost in the crash.
    """

    failure: type[BaseException] | Callable[[], BaseException] = Crash
    names = ("fsync", "replace", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, list[str]()
        for name in self.names:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        real = builtins.open

        def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if mode != "wb":
                return real(path, mode, *rest, **options)
            raw = io.FileIO(path, "w")
            file = io.BufferedWriter(raw, buffer_size=1)  # what is written is on the disk
            return _Writer(file, self._watched("write", file.write))

        monkeypatch.setattr(builtins, "open", opened)

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if len(self.calls) >= self.at:
                raise self.failure()
            self.calls.append(name)
            return real(*given, **options)

        return call


class FullAt(CrashAt):
    """The disk is full from the `at`-th of these calls on; files can still be removed."""

    names = ("fsync", "replace")

    @staticmethod
    def failure() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Writer:
    """A binary file whose writes are watched."""

    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self._file, self.write = file, write

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def crash_in(monkeypatch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """End the process in the call of `os.<name>` that comes after so many good ones."""
    real, calls = getattr(os, name), [0]

    def last(*given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise Crash
        return real(*given, **options)

    monkeypatch.setattr(os, name, last)


def full_disk(*_: object) -> None:
    """Stands for a call to the system on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files(root: Path) -> set[str]:
    """Relative paths of all files under a folder."""
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
