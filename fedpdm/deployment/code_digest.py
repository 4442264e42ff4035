"""The digest of this program's code: what a node compares with what a coordinator ships.

SHA-256 over the Python files of the three packages that make up the Flower app, in order of their
paths: for each its path from the root (POSIX, UTF-8), a zero byte, and the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["PACKAGES", "code_digest", "code_root"]

PACKAGES = ("clients", "fedpdm", "strategies")


def code_root() -> Path:
    """The directory that holds the packages which are running."""
    return Path(__file__).resolve().parents[2]


def code_digest(root: Path | None = None) -> str:
    """64 hexadecimal digits for the code under `root`, by default the code that is running.

    Files that Flower leaves out of an app bundle (`test_*.py`) do not count. `ValueError` if a
    package is missing.
    """
    root = code_root() if root is None else root
    total = hashlib.sha256()
    for package in PACKAGES:
        files = {
            path.relative_to(root).as_posix(): path
            for path in (root / package).rglob("*.py")
            if not path.name.startswith("test_")
        }
        if not files:
            raise ValueError(f"{root}: holds no Python file of {package}: not a fedpdm app")
        for name in sorted(files):
            total.update(name.encode() + b"\0" + hashlib.sha256(files[name].read_bytes()).digest())
    return total.hexdigest()
