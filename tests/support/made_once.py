"""What takes long to make, and is only read, is made once for all workers side by side."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled, by whichever worker came first; the others wait for it.

    Whoever wants to write copies it.
    """
    own = factory.getbasetemp()  # of one worker, in that of the whole test run
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    root.mkdir(exist_ok=True)
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one who failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
