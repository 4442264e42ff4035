"""Personalised federated diffusion models with local differential privacy.

The names below are those of `fedpdm.api`. They are looked up when they are first asked for, so that
`import fedpdm` and the modules that need no network start quickly.
"""

# The star is read by type checkers alone; a test holds the names below to those of fedpdm.api.
# ruff: noqa: F403, F405
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpdm.api import *

__all__ = [
    "account",
    "attack_model",
    "attack_uploads",
    "calibrate",
    "configure",
    "export_client",
    "load_images",
    "load_pipeline",
    "make_schedule",
    "release",
    "run",
    "sample",
    "share_out",
    "train_coarse",
    "train_fine",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedpdm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
