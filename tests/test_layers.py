"""The architecture as a test: who may import, construct and print what, by the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedpdm", "clients", "strategies")

# A unit imports units of a lower rank only; inside a package its own modules may import each
# other. A module that is not listed has no place yet: give it one here.
RANKS: dict[str, int] = {
    "fedpdm": 0,  # the package itself, imported for its path; its shortcuts are those of fedpdm.api
    "fedpdm.types": 1,
    "fedpdm.rng": 1,
    "fedpdm.config": 1,
    "fedpdm.codedigest": 1,
    "fedpdm.certificates": 2,
    "fedpdm.schedule": 2,
    "fedpdm.accountant": 2,
    "fedpdm.gmm": 3,
    "fedpdm.data": 2,
    "fedpdm.partition": 2,
    "fedpdm.metrics": 2,
    "fedpdm.memory": 2,
    "fedpdm.versions": 2,
    "fedpdm.tensorfile": 2,  # bytes of named tensors, for wire and store
    "fedpdm.quantize": 2,  # fewer bits per number in messages
    "fedpdm.pipeline": 2,  # copied into exports, so it stands alone
    "fedpdm.denoisers": 3,
    "fedpdm.pictures": 3,
    "fedpdm.noise": 3,
    "fedpdm.files": 3,
    "fedpdm.objectives": 4,
    "fedpdm.sampling": 4,
    "fedpdm.mechanism": 4,
    "fedpdm.members": 4,  # which images trained a model
    "fedpdm.ledger": 4,
    "fedpdm.calibration": 5,
    "fedpdm.training": 5,
    "fedpdm.evaluation": 5,
    "fedpdm.attacks": 5,
    "fedpdm.features": 5,  # networks and other maps from images to vectors
    "fedpdm.downstream": 6,
    "fedpdm.judging": 6,
    "fedpdm.pretraining": 6,  # the attacker's own model, from public images
    "fedpdm.toy": 6,
    "fedpdm.dpsgd": 6,  # the DP-SGD baseline
    "fedpdm.wire": 6,
    "fedpdm.secure": 6,  # updates as summands of secure aggregation
    "fedpdm.releases": 6,
    "fedpdm.loading": 6,  # images and their split, by the config
    "fedpdm.build": 7,
    "fedpdm.batches": 8,  # the configured objectives on a client's data
    "fedpdm.store": 7,
    "fedpdm.statement": 8,
    "fedpdm.modelcard": 8,
    "fedpdm.policy": 8,  # a node's own bounds
    "fedpdm.acceptance": 8,
    "fedpdm.invitation": 8,
    "fedpdm.runs": 6,
    "fedpdm.trajectory": 8,  # states between noise and image
    "fedpdm.trackers": 9,  # TensorBoard and others
    "fedpdm.htmlreport": 10,
    "fedpdm.runtime": 9,
    "fedpdm.reporting": 9,
    "fedpdm.export": 9,
    "fedpdm.results": 9,  # of experiments, and tables
    "fedpdm.synthesis": 8,
    "fedpdm.assessment": 10,
    "fedpdm.node": 10,  # what a participant checks before it joins
    "clients": 10,
    "strategies": 10,
    "fedpdm.attacking": 11,  # attacks on a run's models, or on any U-Net
    "fedpdm.engines": 11,
    "fedpdm.commands": 12,
    "fedpdm.api": 12,  # the library's front door
    "fedpdm.cli": 13,
}
SCIENCE = frozenset(unit for unit, rank in RANKS.items() if rank <= 5) - {"fedpdm.config"}

# Libraries that are imported in these units alone.
ONLY_IN = {
    "flwr": ("clients", "strategies", "fedpdm.engines"),
    "ray": (),
    "yaml": ("fedpdm.config",),
}
# Modules that may not import a library.
NEVER = {"fedpdm.accountant": ("torch", "numpy")}
# Where a release may be copied with other rows; it is constructed in the mechanism alone.
MAY_REPLACE_IMAGES = {
    ("fedpdm.mechanism.records", "select"),
    ("strategies.server_training", "join_releases"),
}


def unit_of(module: str) -> str:
    """The row of `RANKS` that a module belongs to: the longest listed prefix, or itself."""
    parts = module.split(".")
    size = 2 if parts[0] == "fedpdm" else 1
    return ".".join(parts[:size])


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import anywhere in a module, TYPE_CHECKING included.

    `from fedpdm import wire` is an import of `fedpdm.wire`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package else -1]
                kept = above[: len(above) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            if base == "fedpdm":
                yield from ((node.lineno, f"fedpdm.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def check_imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    unit = unit_of(module)
    if unit not in RANKS:
        yield f"{module}: has no layer"
        return
    for line, target in imports(tree, module, is_package=is_package):
        where, library = f"{module}:{line}", target.split(".")[0]
        if library in ONLY_IN and unit not in ONLY_IN[library]:
            yield f"{where}: imports {library}"
        if library in NEVER.get(module, ()):
            yield f"{where}: may not import {library}"
        if library not in PACKAGES:
            continue
        other = unit_of(target)
        if other not in RANKS:
            yield f"{where}: imports {target}, which has no layer"
        elif module == "fedpdm" and target == "fedpdm.api":
            continue  # the shortcuts; tests/test_api.py holds that they are lazy
        elif other != unit and RANKS[other] >= RANKS[unit]:
            yield f"{where}: imports upwards, {target}"
        if unit in SCIENCE and other == "fedpdm.config":
            yield f"{where}: science does not see a run config"


def check_calls(tree: ast.AST, module: str) -> Iterator[str]:
    science = unit_of(module) in SCIENCE
    inside: dict[ast.AST, str] = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside |= dict.fromkeys(ast.walk(function), function.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
            yield f"{module}:{node.lineno}: assert of a constant"
        if not isinstance(node, ast.Call):
            continue
        where, name = f"{module}:{node.lineno}", called_name(node)
        if name == "ReleasedDataset" and unit_of(module) != "fedpdm.mechanism":
            yield f"{where}: constructs a ReleasedDataset"
        replaced = {keyword.arg for keyword in node.keywords} & {"x_tilde", None}
        if name == "replace" and replaced and (module, inside.get(node)) not in MAY_REPLACE_IMAGES:
            yield f"{where}: replaces the images of a release"
        if name in ("__import__", "import_module"):
            yield f"{where}: imports by a name that no test can read"
        if science and name == "print":
            yield f"{where}: prints"


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every rule that a module's source breaks."""
    tree = ast.parse(source)
    return [*check_imports(tree, module, is_package=is_package), *check_calls(tree, module)]


def modules() -> list[tuple[str, Path]]:
    """(name, file) of every module of the three packages."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((name, path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_module_keeps_the_layers(module: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert faults(source, module, is_package=path.name == "__init__.py") == []


def test_every_layer_has_its_modules() -> None:
    """A row of the table that nothing matches is a mistake in the table (or a lost module)."""
    assert {unit_of(name) for name, _ in modules()} == RANKS.keys()


def test_nobody_imports_what_is_on_top() -> None:
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for _, target in imports(tree, module, is_package=path.name == "__init__.py"):
            assert unit_of(target) != "fedpdm.cli", module
            if unit_of(target) == "fedpdm.engines":
                users = ("fedpdm.engines", "fedpdm.api", "fedpdm.commands", "fedpdm.cli")
                assert unit_of(module) in users


PLANTED = [
    ("fedpdm.schedule", "import fedpdm.wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.schedule", "from fedpdm import wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.schedule", "from . import wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.schedule", "def f():\n    from fedpdm.store import x", "imports upwards"),
    ("fedpdm.schedule", "if TYPE_CHECKING:\n    from fedpdm.build import x", "imports upwards"),
    ("fedpdm.data.own", "from ..mechanism import release", "imports upwards, fedpdm.mechanism"),
    ("fedpdm.objectives", "from fedpdm.sampling import sample", "imports upwards"),  # same layer
    ("fedpdm.accountant", "from fedpdm.partition import partition", "imports upwards"),
    ("clients.local", "from strategies.coarse import x", "imports upwards, strategies.coarse"),
    ("strategies.coarse", "import clients.local", "imports upwards, clients.local"),
    ("fedpdm.reporting", "from fedpdm.engines.flower import x", "imports upwards"),
    ("strategies.server_app", "from fedpdm.cli import main", "imports upwards"),
    ("fedpdm.pipeline", "from fedpdm.denoisers import x", "imports upwards"),
    ("fedpdm.newcomer", "import math", "has no layer"),
    ("fedpdm", "from fedpdm.build import x", "imports upwards, fedpdm.build"),
    ("fedpdm.build", "from fedpdm import release", "fedpdm.release, which has no layer"),
    ("fedpdm.build", "from fedpdm.api import release", "imports upwards, fedpdm.api"),
    ("fedpdm.build", "from fedpdm import newcomer", "fedpdm.newcomer, which has no layer"),
    ("fedpdm.training", "from fedpdm.config import RunConfig", "does not see a run config"),
    ("fedpdm.wire", "import flwr", "imports flwr"),
    ("fedpdm.wire", "from flwr.common import NDArrays", "imports flwr"),
    ("fedpdm.engines.flower", "import ray", "imports ray"),
    ("clients.local", "import yaml", "imports yaml"),
    ("fedpdm.accountant", "import torch", "may not import torch"),
    ("fedpdm.store", "y = ReleasedDataset(x_tilde=x)", "constructs a ReleasedDataset"),
    ("clients.local", "y = types.ReleasedDataset(x_tilde=x)", "constructs a ReleasedDataset"),
    ("clients.local", "y = dataclasses.replace(r, x_tilde=x)", "replaces the images"),
    ("clients.local", "y = replace(r, **changes)", "replaces the images"),
    ("fedpdm.mechanism", "def blur():\n    return replace(r, x_tilde=x)", "replaces the images"),
    ("fedpdm.sampling", "print(1)", "prints"),
    ("fedpdm.sampling", "assert False, 'no such chain'", "assert of a constant"),
    ("fedpdm.sampling", "importlib.import_module(name)", "by a name that no test can read"),
]


@pytest.mark.parametrize(("module", "source", "fault"), PLANTED)
def test_planted_faults_are_reported(module: str, source: str, fault: str) -> None:
    found = faults(source, module)
    assert len(found) == 1, found
    assert fault in found[0]


ALLOWED = [
    ("fedpdm.mechanism", "from fedpdm.schedule import NoiseSchedule\ny = ReleasedDataset(a=1)"),
    ("fedpdm.mechanism.records", "def select():\n    return replace(r, x_tilde=x)"),
    ("fedpdm.data.own", "from fedpdm.data.rawsplit import RawSplit"),
    ("fedpdm.engines.inprocess", "from flwr.server import Server\nfrom clients.local import x"),
    ("clients.local", "from fedpdm import wire\nprint(1)"),
    ("fedpdm.runtime", "import fedpdm\nassert x is not None"),
    ("fedpdm", "from fedpdm.api import release"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert faults(source, module) == []
