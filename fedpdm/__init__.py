"""Personalised federated diffusion models with local differential privacy.

The names below are those of `fedpdm.api`. They are looked up when they are first asked for, so that
`import fedpdm` and the modules that need no network start quickly. Modules that the documentation
and the examples named before they moved are still found at the old path (`MOVED`).
"""

# The star is read by type checkers alone; a test holds the names below to those of fedpdm.api.
# ruff: noqa: F403, F405
from __future__ import annotations

import importlib
import importlib.machinery
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedpdm.processors import set_thread_defaults

if TYPE_CHECKING:
    from fedpdm.api import *

set_thread_defaults()  # before anything imports torch

__all__ = [
    "account",
    "attack_model",
    "attack_uploads",
    "calibrate",
    "configure",
    "export_client",
    "gaussian_classifier",
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

# Old path to new; a module that was split has several. CHANGELOG.md lists every move.
MOVED: dict[str, tuple[str, ...]] = {
    "fedpdm.accountant": ("fedpdm.privacy.accountant",),
    "fedpdm.build": ("fedpdm.setup.build", "fedpdm.setup.run_setup", "fedpdm.data.loading"),
    "fedpdm.calibration": ("fedpdm.privacy.calibration",),
    "fedpdm.denoisers": ("fedpdm.diffusion.denoisers",),
    "fedpdm.export": ("fedpdm.publishing.export",),
    "fedpdm.ledger": ("fedpdm.privacy.ledger",),
    "fedpdm.mechanism": ("fedpdm.privacy.mechanism",),
    "fedpdm.mechanism.events": ("fedpdm.privacy.events",),
    "fedpdm.noise": ("fedpdm.privacy.noise",),
    "fedpdm.objectives": ("fedpdm.diffusion.objectives",),
    "fedpdm.pictures": ("fedpdm.reporting.pictures",),
    "fedpdm.pipeline": ("fedpdm.publishing.pipeline",),
    # What `from fedpdm.mechanism import events` asks for.
    "fedpdm.privacy.mechanism.events": ("fedpdm.privacy.events",),
    "fedpdm.releases": ("fedpdm.privacy.releases",),
    "fedpdm.sampling": ("fedpdm.diffusion.sampling", "fedpdm.diffusion.twostage"),
    "fedpdm.schedule": ("fedpdm.diffusion.schedule",),
    "fedpdm.training": ("fedpdm.diffusion.training",),
    "fedpdm.types": (
        "fedpdm.privacy.types",
        "fedpdm.wire.types",
        "fedpdm.diffusion.twostage",
        "fedpdm.diffusion.training",
    ),
}


def _old_path(name: str) -> str:
    """The longest path of `MOVED` that is `name` or holds it, or nothing."""
    return max((old for old in MOVED if f"{name}.".startswith(f"{old}.")), key=len, default="")


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module of `MOVED`, or one inside it, as the very module that it is now."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if _old_path(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        old = _old_path(name)
        now = [importlib.import_module(new + name.removeprefix(old)) for new in MOVED[old]]
        if len(now) == 1:
            sys.modules[name] = now[0]
            return
        for part in now:
            vars(module).update({key: getattr(part, key) for key in part.__all__})


sys.meta_path.insert(0, _MovedModules())  # before the finder of files, which would load a copy


def __getattr__(name: str) -> Any:
    if f"{__name__}.{name}" in MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedpdm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
