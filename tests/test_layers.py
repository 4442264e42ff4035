"""The architecture as a test: who may import, construct and print what, by the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cases import every

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedpdm", "clients", "strategies")

# A package imports packages of a lower rank only; inside a package modules may import each other,
# without circles. A package that is not listed has no place yet: give it one here.
RANKS: dict[str, int] = {
    "fedpdm": 0,  # the package itself; its shortcuts are those of fedpdm.api
    "fedpdm.rng": 1,
    "fedpdm.diffusion": 0,  # below the config, which reads the names of its choices there
    "fedpdm.processors": 0,
    "fedpdm.text": 0,  # below everything that prints or writes
    "fedpdm.config": 1,
    "fedpdm.storage": 2,
    "fedpdm.jobs": 3,
    "fedpdm.data": 3,
    "fedpdm.privacy": 4,
    "fedpdm.wire": 5,
    "fedpdm.setup": 6,
    "fedpdm.evaluation": 7,
    "fedpdm.deployment": 7,
    "fedpdm.reporting": 8,
    "fedpdm.publishing": 9,
    "fedpdm.toy": 9,
    "clients": 9,
    "strategies": 9,
    "fedpdm.attacks": 10,
    "fedpdm.engines": 11,
    "fedpdm.suites": 12,
    "fedpdm.commands": 13,
    "fedpdm.api": 13,  # the library's front door
    "fedpdm.cli": 14,
}
# Formulas, arrays and files: no run config, no output.
SCIENCE = (
    "fedpdm.diffusion",
    "fedpdm.text",
    "fedpdm.rng",
    "fedpdm.storage.files",
    "fedpdm.storage.tensorfile",
    "fedpdm.data.augment",
    "fedpdm.data.coloring",
    "fedpdm.data.imageset",
    "fedpdm.data.labelling",
    "fedpdm.data.members",
    "fedpdm.data.own",
    "fedpdm.data.partition",
    "fedpdm.data.public",
    "fedpdm.data.resizing",
    "fedpdm.data.sources",
    "fedpdm.privacy.accountant",
    "fedpdm.privacy.calibration",
    "fedpdm.privacy.composition",
    "fedpdm.privacy.dpsgd",
    "fedpdm.privacy.events",
    "fedpdm.privacy.ledger",
    "fedpdm.privacy.mechanism.basis",
    "fedpdm.privacy.mechanism.gaussian",
    "fedpdm.privacy.mechanism.records",
    "fedpdm.privacy.mechanism.sums",
    "fedpdm.privacy.mechanism.whole",
    "fedpdm.privacy.noise",
    "fedpdm.privacy.subsampled",
    "fedpdm.privacy.types",
    "fedpdm.wire.quantize",
    "fedpdm.evaluation.metrics",
    "fedpdm.evaluation.features",
    "fedpdm.evaluation.measures",
    "fedpdm.reporting.pictures",
    "fedpdm.publishing.class_gaussians",
    "fedpdm.publishing.pfdm_sampling",
    "fedpdm.publishing.pipeline",
    "fedpdm.deployment.certificates",
    "fedpdm.attacks.membership",
    "fedpdm.attacks.auditing",
    "fedpdm.attacks.bounds",
    "fedpdm.attacks.canaries",
    "fedpdm.attacks.collusion",
    "fedpdm.attacks.denoising",
    "fedpdm.attacks.likelihood",
    "fedpdm.attacks.linkage",
    "fedpdm.attacks.memorisation",
    "fedpdm.attacks.noisechecks",
    "fedpdm.attacks.optimal",
    "fedpdm.attacks.reconstruction",
    "fedpdm.attacks.recovery",
    "fedpdm.attacks.roc",
    "fedpdm.attacks.sum_auditing",
    "fedpdm.attacks.sum_canaries",
    "fedpdm.attacks.sum_linkage",
)
# Copied into exports, so they stand alone; what lies in the same folder there is imported by `.`.
ALONE = (
    "fedpdm.publishing.class_gaussians",
    "fedpdm.publishing.pfdm_sampling",
    "fedpdm.publishing.pipeline",
)

# Libraries that are imported in these units and modules alone.
ONLY_IN = {
    "flwr": ("clients", "strategies", "fedpdm.engines", "fedpdm.jobs.libraries"),
    "ray": (),
    "yaml": ("fedpdm.config",),
}
# Names that a config may say are no run config, and how files of strangers are read is none.
NAMES = ("fedpdm.config.names", "fedpdm.config.strict")
# Modules that may not import a library: reading a config is light.
LIGHT = ("torch", "numpy", "flwr")
NEVER = {
    "fedpdm.privacy.accountant": ("torch", "numpy"),
    "fedpdm.privacy.composition": ("torch", "numpy"),
    "fedpdm.diffusion.names": LIGHT,
    "fedpdm.diffusion.presets": LIGHT,
}
# Where JSON is made by itself: digests, headers of strings, and text for other programs. What
# people and programs read is made by `fedpdm.text.json_text`, which has no NaN.
OWN_JSON = (
    "fedpdm.engines.doorbell",
    "fedpdm.storage.files",
    "fedpdm.text",
    "fedpdm.attacks.jobs.controls",
    "fedpdm.config.reading",
    "fedpdm.deployment.acceptance",
    "fedpdm.engines.deployed.node",
    "fedpdm.engines.flowercli",
    "fedpdm.engines.superlink_settings",
    "fedpdm.jobs.files",
    "fedpdm.privacy.ledger",
    "fedpdm.storage.tensorfile",
    "fedpdm.suites.cell",
)
# What a config names (`package.module:NAME`), and modules by the paths that they once had.
IMPORTS_BY_NAME = ("fedpdm.config.plugins", "fedpdm")
# Where a release may be copied with other rows; it is constructed in the mechanism alone.
MAY_REPLACE_IMAGES = {
    ("fedpdm.privacy.mechanism.records", "select"),
    ("fedpdm.privacy.mechanism.records", "join"),
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


def is_science(module: str) -> bool:
    return any(f"{module}.".startswith(f"{prefix}.") for prefix in SCIENCE)


def called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def check_imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    unit = unit_of(module)
    if unit not in RANKS:
        yield f"{module}: has no layer"
        return
    by_dot = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    for line, target in imports(tree, module, is_package=is_package):
        where, library = f"{module}:{line}", target.split(".")[0]
        if library in ONLY_IN and not {unit, module} & {*ONLY_IN[library]}:
            yield f"{where}: imports {library}"
        if library in NEVER.get(module, ()):
            yield f"{where}: may not import {library}"
        if library not in PACKAGES:
            continue
        other = unit_of(target)
        if other not in RANKS:
            yield f"{where}: imports {target}, which has no layer"
        elif module == "fedpdm" and target in ("fedpdm.api", "fedpdm.processors"):
            continue  # the shortcuts; tests/test_api.py holds that they are lazy
        elif other != unit and RANKS[other] >= RANKS[unit]:
            yield f"{where}: imports upwards, {target}"
        if module in ALONE and not (target in ALONE and line in by_dot):
            yield f"{where}: stands alone, imports {target}"
            continue
        if is_science(module) and other == "fedpdm.config" and target not in NAMES:
            yield f"{where}: science does not see a run config"


def check_calls(tree: ast.AST, module: str) -> Iterator[str]:
    science = is_science(module)
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
        released = name in ("ReleasedDataset", "ReleasedStatistics")
        if released and not module.startswith("fedpdm.privacy.mechanism"):
            yield f"{where}: constructs a {name}"
        replaced = {keyword.arg for keyword in node.keywords} & {"x_tilde", None}
        if name == "replace" and replaced and (module, inside.get(node)) not in MAY_REPLACE_IMAGES:
            yield f"{where}: replaces the images of a release"
        if name in ("__import__", "import_module") and module not in IMPORTS_BY_NAME:
            yield f"{where}: imports by a name that no test can read"
        if name in ("dumps", "dump") and module not in OWN_JSON:
            yield f"{where}: makes JSON by itself"
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


@pytest.mark.slow
@every("module, path", modules())
def test_module_keeps_the_layers(module: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert faults(source, module, is_package=path.name == "__init__.py") == []


def test_every_layer_has_its_modules() -> None:
    """A row of the table that nothing matches is a mistake in the table (or a lost module)."""
    assert {unit_of(name) for name, _ in modules()} == RANKS.keys()


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges.get(module, ()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


@pytest.mark.slow
def test_no_two_modules_import_each_other() -> None:
    names = {name for name, _ in modules()}
    edges: dict[str, set[str]] = {}
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_package = path.name == "__init__.py"
        targets = {target for _, target in imports(tree, module, is_package=is_package)}
        edges[module] = (targets & names) - {module}
    edges["fedpdm"] = set()  # its shortcuts are lazy
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.slow
def test_nobody_imports_what_is_on_top() -> None:
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for _, target in imports(tree, module, is_package=path.name == "__init__.py"):
            assert unit_of(target) != "fedpdm.cli", module
            if unit_of(target) == "fedpdm.engines":
                users = ("engines", "suites", "api", "commands", "cli")
                assert unit_of(module) in {f"fedpdm.{user}" for user in users}


PLANTED = [
    ("fedpdm.diffusion.schedule", "import fedpdm.wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.diffusion.schedule", "from fedpdm import wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.diffusion.schedule", "from .. import wire", "imports upwards, fedpdm.wire"),
    ("fedpdm.diffusion.gmm", "def f():\n    from fedpdm.storage import x", "imports upwards"),
    (
        "fedpdm.diffusion.gmm",
        "if TYPE_CHECKING:\n    from fedpdm.setup import x",
        "imports upwards",
    ),
    ("fedpdm.data.own", "from ..privacy import noise", "imports upwards, fedpdm.privacy"),
    ("fedpdm.reporting.results", "from fedpdm.toy import x", "imports upwards"),
    ("fedpdm.toy.cells", "from fedpdm.publishing import x", "imports upwards"),  # same rank
    ("fedpdm.data.partition", "from fedpdm.privacy.accountant import x", "imports upwards"),
    ("clients.local", "from strategies.coarse import x", "imports upwards, strategies.coarse"),
    ("strategies.coarse", "import clients.local", "imports upwards, clients.local"),
    ("fedpdm.reporting.run_files", "from fedpdm.engines.flower import x", "imports upwards"),
    ("strategies.server_app", "from fedpdm.cli import main", "imports upwards"),
    ("fedpdm.publishing.pipeline", "from fedpdm.diffusion.denoisers import x", "stands alone"),
    ("fedpdm.publishing.pipeline", "from .model_card import x", "stands alone"),
    ("fedpdm.publishing.pipeline", "import fedpdm.publishing.pfdm_sampling", "stands alone"),
    ("fedpdm.newcomer", "import math", "has no layer"),
    ("fedpdm", "from fedpdm.setup.build import x", "imports upwards, fedpdm.setup.build"),
    ("fedpdm.setup.build", "from fedpdm import release", "fedpdm.release, which has no layer"),
    ("fedpdm.setup.build", "from fedpdm.api import release", "imports upwards, fedpdm.api"),
    ("fedpdm.setup.build", "from fedpdm import newcomer", "fedpdm.newcomer, which has no layer"),
    ("fedpdm.privacy.noise", "from fedpdm.config import RunConfig", "does not see a run config"),
    ("fedpdm.diffusion.presets", "import torch", "may not import torch"),
    ("fedpdm.diffusion.schedule", "from fedpdm.config.names import x", "imports upwards"),
    ("fedpdm.wire", "import flwr", "imports flwr"),
    ("fedpdm.wire", "from flwr.common import NDArrays", "imports flwr"),
    ("fedpdm.engines.flower", "import ray", "imports ray"),
    ("clients.local", "import yaml", "imports yaml"),
    ("fedpdm.privacy.accountant", "import torch", "may not import torch"),
    ("fedpdm.storage.files", "y = ReleasedDataset(x_tilde=x)", "constructs a ReleasedDataset"),
    ("clients.local", "y = types.ReleasedDataset(x_tilde=x)", "constructs a ReleasedDataset"),
    ("clients.local", "y = ReleasedStatistics(sums=x)", "constructs a ReleasedStatistics"),
    ("clients.local", "y = dataclasses.replace(r, x_tilde=x)", "replaces the images"),
    ("clients.local", "y = replace(r, **changes)", "replaces the images"),
    (
        "fedpdm.privacy.mechanism",
        "def blur():\n    return replace(r, x_tilde=x)",
        "replaces the images",
    ),
    ("fedpdm.diffusion.sampling", "print(1)", "prints"),
    ("fedpdm.reporting.results", "json.dumps(x)", "makes JSON by itself"),
    ("fedpdm.diffusion.sampling", "assert False, 'no such chain'", "assert of a constant"),
    (
        "fedpdm.diffusion.sampling",
        "importlib.import_module(name)",
        "by a name that no test can read",
    ),
]


@every("module, source, fault", PLANTED)
def test_planted_faults_are_reported(module: str, source: str, fault: str) -> None:
    found = faults(source, module)
    assert len(found) == 1, found
    assert fault in found[0]


ALLOWED = [
    (
        "fedpdm.privacy.mechanism",
        "from fedpdm.diffusion.schedule import NoiseSchedule\ny = ReleasedDataset(a=1)",
    ),
    ("fedpdm.privacy.mechanism.records", "def select():\n    return replace(r, x_tilde=x)"),
    ("fedpdm.data.own", "from fedpdm.data.rawsplit import RawSplit"),
    ("fedpdm.data.coloring", "from fedpdm.config.names import COLORINGS"),
    ("fedpdm.config.schema", "from fedpdm.diffusion.presets import PRESETS"),
    ("fedpdm.engines.inprocess", "from flwr.server import Server\nfrom clients.local import x"),
    ("clients.local", "from fedpdm import wire\nprint(1)"),
    ("fedpdm.setup.flower_config", "import fedpdm\nassert x is not None"),
    ("fedpdm", "from fedpdm.api import release"),
    ("fedpdm.config.plugins", "importlib.import_module(name)"),
]


@every("module, source", ALLOWED)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert faults(source, module) == []
