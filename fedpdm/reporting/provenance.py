"""What a run, a result or a report was made with: versions and hardware."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "software_versions"]

LIBRARIES = ("fedpdm", "flwr", "torch", "torchvision", "diffusers", "numpy")


def software_versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Python's version and those of the libraries that results depend on, by name."""
    return {"python": platform.python_version(), **_versions(libraries)}


def describe_machine() -> dict[str, Any]:
    """Versions and hardware that a result was made with."""
    import torch

    return {
        "versions": _versions(LIBRARIES),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    return {name: metadata.version(name) for name in libraries}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
