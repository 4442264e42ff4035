"""Versions of the software that a run or a report was made with."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["software_versions"]

NAMES = ("fedpdm", "flwr", "torch", "torchvision", "diffusers", "numpy")


def software_versions() -> dict[str, str]:
    """Python's version and those of the libraries that results depend on, by name."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in NAMES},
    }
