"""A node runs the code that its operator installed, whatever the coordinator ships.

Flower sends every run as a bundle of Python files and executes it on the nodes. `fedpdm node start`
puts the commands of this module before Flower's own on PATH. Here the app's packages are imported
from the installation alone; the bundle is compared with it by digest and refused if it is neither
the same nor one that the node's policy names; nothing else in a bundle can be imported. Other kinds
of Flower app (agents, models, connectors) are refused altogether.

Imports here are light: Flower gives a client app up if it does not report within seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from fedpdm.deployment.code_digest import PACKAGES, code_digest, code_root
from fedpdm.text import line

__all__ = [
    "ALLOWED_VARIABLE",
    "BundleRefused",
    "InstalledCode",
    "guarded_command",
    "main",
    "write_commands",
]

ALLOWED_VARIABLE = "FEDPDM_ALLOWED_CODE"  # digests, separated by blanks
GUARDED = "flwr-clientapp"
REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


class BundleRefused(ImportError):
    """The coordinator ships code that this node does not allow; one line."""


class InstalledCode(MetaPathFinder):
    """Finds the app's packages under `root`, and nothing under `bundles`.

    Args:
        bundles: where Flower unpacks what coordinators ship.
        allowed: digests of bundles that may ask, besides that of `root`.
        root: the installed code; default: that which is running.
    """

    def __init__(
        self, bundles: Path, *, allowed: Sequence[str] = (), root: Path | None = None
    ) -> None:
        self.bundles = bundles.resolve()
        self.root = code_root() if root is None else root
        self.allowed = frozenset(allowed)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """`BundleRefused` for a bundle that may not ask, or a module that only a bundle has."""
        top = fullname.partition(".")[0]
        if top in PACKAGES and path is None:
            self._check_shipped()
            return PathFinder.find_spec(fullname, [str(self.root)], target)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return None
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        if any(place and self._shipped(place) for place in places):
            raise BundleRefused(
                f"code: {line(fullname)} is in the shipped bundle and not installed here"
            )
        return None

    def _shipped(self, place: str) -> bool:
        return Path(place).resolve().is_relative_to(self.bundles)

    def _check_shipped(self) -> None:
        """Compare every bundle on the module path with the installed code."""
        found = [Path(entry) for entry in sys.path if entry and self._shipped(entry)]
        if not found:
            raise BundleRefused("code: no bundle of a coordinator is on the module path")
        installed = code_digest(self.root)
        for bundle in found:
            try:
                shipped = code_digest(bundle)
            except ValueError:
                shipped = "none: it is no fedpdm app"
            if shipped != installed and shipped not in self.allowed:
                raise BundleRefused(
                    f"code: the shipped bundle's digest is {shipped[:64]}, installed here is "
                    f"{installed}; this node's policy does not name it"
                )


def guarded_command(name: str = GUARDED) -> list[str]:
    """The words that run one of Flower's commands under the guard."""
    return [sys.executable, "-P", "-m", "fedpdm.engines.deployed.guard", name]


def write_commands(folder: Path) -> None:
    """Write the guarded commands to a folder that is to come first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (GUARDED, *REFUSED):
        path = folder / name
        words = " ".join(map(shlex.quote, guarded_command(name)))
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        path.chmod(0o700)


def main(arguments: Sequence[str]) -> None:
    """Run the command that Flower asked for, `arguments[0]`, under the guard."""
    name = arguments[0]
    if name != GUARDED:
        why = f"{line(name)} is refused: a node runs client apps only"
        print(f"fedpdm node: {why}", file=sys.stderr)
        sys.exit(1)
    allowed = os.environ.get(ALLOWED_VARIABLE, "").split()
    sys.meta_path.insert(0, InstalledCode(Path(os.environ["FLWR_HOME"]), allowed=allowed))
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=GUARDED)
    sys.argv = [GUARDED, *arguments[1:]]
    command.load()()


if __name__ == "__main__":
    main(sys.argv[1:])
