"""Experiments: a data set and its split, profiles of different size, and the methods compared.

`experiments/NAME.yaml` is a suite, `experiments/methods/NAME.yaml` a method. A suite's `common`, a
profile's `set` and a method's `set` are merged, in this order, into a run configuration, and the
profile's budget is divided between the shared and the clients' own models as the method says.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpdm.config.reading import build_section, config_from_mapping, read_mapping
from fedpdm.config.schema import ConfigError, RunConfig, check_name, key

__all__ = ["BATCH", "Method", "Profile", "Suite", "load_paper_values", "load_suite", "numbered"]

BATCH = 32
"""Images of a step of the budget; a step with a larger batch counts as several."""

PaperValues = dict[str, tuple[float, float, float]]
"""Method -> published FID of majority, minority and their average."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A size of the same experiment.

    `steps` are gradient steps of 32 images per client in a whole run, of all models together. With
    `shared_steps` they are those of the clients' own models alone, of which only the scored clients
    train one, for all methods: these then differ in the shared model alone, and a shared model that
    is trained takes `shared_steps`. `table` takes the place of the suite's. With more than one of
    `draws` an ablation is run on the first seed alone, once for each draw of the releases' noise.
    """

    rounds: int = key(5, "federated rounds", low=1)
    steps: int = key(100, "gradient steps of 32 images per client, all models together", low=1)
    seeds: int = key(1, "runs per method", low=1)
    first_seed: int = key(0, "the seeds count from here", low=0)
    draws: int = key(1, "of the noise, in ablations, on the first seed", low=1)
    clients: int = key(1, "clients evaluated, from client 0 on", low=1)
    shared_steps: int | None = key(
        None, "steps of the shared model; own models are then shared by all methods", low=1
    )
    table: tuple[str, ...] = key((), "methods; default: the suite's")
    description: str = key("", "one line for people")
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table: `shared` is the share of the budget that trains the shared model.

    Two kinds of rows need a profile with `shared_steps`: `stop: early` takes the own model as it
    was when its loss on the client's held-out images was lowest, `above: others` puts real images
    of other clients, noised to the hand-over, in the place of a perfect shared model.
    """

    name: str = key("", "file name")
    title: str = key("", "in tables")
    trust: str = key("", "who sees what, and the guarantee")
    paper: str | None = key(None, "row of the paper's table that it reproduces")
    shared: float = key(0.0, "share of the budget for the shared model", low=0.0, high=1.0)
    stop: str = key("last", "which of the own models: last, or early", choices=("last", "early"))
    above: str = key("model", "above the hand-over", choices=("model", "others"))
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Variants of some methods: name -> what is set."""

    title: str = key("", "in tables")
    methods: tuple[str, ...] = key((), "which")
    variants: dict[str, Any] = field(default_factory=dict)
    gaps: bool = key(False, "show gaps closed: variants change neither alone nor centralised")

    def variant(self, name: str) -> Mapping[str, Any]:
        """What the variant changes."""
        if name not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise ConfigError(f"variant: must be one of {known}, got {name!r}")
        changes: Mapping[str, Any] = self.variants[name]
        return changes


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An experiment; `table` names the methods in the order of their rows."""

    name: str
    title: str
    paper: str | None
    table: tuple[str, ...]
    methods: Mapping[str, Method]
    profiles: Mapping[str, Profile]
    common: Mapping[str, Any]
    ablations: Mapping[str, Ablation]
    folder: Path

    def ablation(self, name: str) -> Ablation:
        if name not in self.ablations:
            known = ", ".join(self.ablations) or "none"
            raise ConfigError(f"ablation: {self.name} has {known}, got {name!r}")
        return self.ablations[name]

    def method(self, name: str) -> Method:
        if name not in self.methods:
            known = ", ".join(self.methods)
            raise ConfigError(f"method: must be one of {known}, got {name!r}")
        return self.methods[name]

    def profile(self, name: str) -> Profile:
        if name not in self.profiles:
            known = ", ".join(self.profiles)
            raise ConfigError(f"profile: {self.name} has {known}, got {name!r}")
        return self.profiles[name]

    def methods_of(self, profile: str) -> tuple[str, ...]:
        """The rows of the table at this size."""
        return self.profile(profile).table or self.table

    def compose(
        self,
        profile: str,
        method: str,
        *,
        seed: int,
        draw: int = 0,
        overrides: Sequence[Mapping[str, Any]] = (),
        label: str = "",
    ) -> RunConfig:
        """The run of one cell. `overrides` come last; steps, seed and draw are the budget's, `seed`
        and `draw`.

        `label` tells variants apart in the run's name.
        """
        size, row = self.profile(profile), self.method(method)
        mapping: dict[str, Any] = copy.deepcopy(dict(self.common))
        for part in (size.set, row.set, *overrides):
            mapping = merge(mapping, part)
        kind = f"{method}-{label}" if label else method
        mapping["name"] = f"{self.name}-{profile}-{kind}-{numbered(seed, draw)}"
        config_from_mapping(mapping)  # refuses what the lines below could not read
        rounds = (mapping.get("run") or {}).get("rounds", size.rounds)
        mapping = merge(mapping, {"run": {"seed": seed, "rounds": rounds}})
        if draw:
            mapping = merge(mapping, {"privacy": {"noise_draw": draw}})
        budgets = {"coarse": row.shared * size.steps, "fine": (1.0 - row.shared) * size.steps}
        if size.shared_steps is not None:
            if row.shared == 1.0:
                raise ConfigError(
                    f"profiles.{profile}.shared_steps: {method} has no own models to share"
                )
            trained = row.shared > 0.0
            budgets = {"coarse": size.shared_steps if trained else 0, "fine": size.steps}
        for role, budget in budgets.items():
            section = mapping[role] = dict(mapping.get(role) or {})
            per_step = section.get("batch_size", BATCH) / BATCH
            steps = round(budget / per_step / rounds)
            if budget > 0 and steps == 0:
                raise ConfigError(
                    f"profiles.{profile}.steps: {size.steps} over {rounds} rounds leave no "
                    f"{role} step of {method}"
                )
            section["steps_per_round"] = steps
            section.setdefault("warmup_steps", min(50, max(1, steps * rounds // 10)))
        return config_from_mapping(mapping)


def numbered(seed: int, draw: int) -> str:
    """`seedK`, and for a draw of the noise but the first `seedK-drawD`: in names of runs, files."""
    return f"seed{seed}-draw{draw}" if draw else f"seed{seed}"


def merge(base: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """`part` over `base`, section by section."""
    merged = dict(base)
    for name, value in part.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = {**old, **value} if both else value  # type: ignore[dict-item]
    return merged


def load_suite(path: Path) -> Suite:
    """A suite with the methods beside it; `ConfigError`, one line, for what does not fit."""
    mapping = read_mapping(path)
    known = {"name", "title", "paper", "table", "profiles", "common", "methods", "ablations"}
    for name in mapping.keys() - known:
        raise ConfigError(f"{path}: {name}: unknown key")
    if not isinstance(mapping.get("profiles"), dict) or not mapping["profiles"]:
        raise ConfigError(f"{path}: profiles: must be a mapping with at least one profile")
    if not isinstance(mapping.get("table"), list) or not mapping["table"]:
        raise ConfigError(f"{path}: table: must be a list of methods")
    profiles = {
        str(name): build_section(Profile, value, f"profiles.{name}")
        for name, value in mapping["profiles"].items()
    }
    folder = path.parent / "methods"
    methods = {}
    for file in sorted(folder.glob("*.yaml")):
        methods[file.stem] = _method(file)
    for name, change in _section(mapping, "methods", path).items():
        if name not in methods:
            raise ConfigError(f"{path}: methods.{name}: there is no {folder / name}.yaml")
        own = _section({name: change}, name, path)
        methods[name] = dataclasses.replace(methods[name], set=merge(methods[name].set, own))
    table = tuple(str(name) for name in mapping["table"])
    for where, names in (
        ("table", table),
        *((f"profiles.{n}.table", p.table) for n, p in profiles.items()),
    ):
        for name in names:
            if name not in methods:
                raise ConfigError(f"{path}: {where}: there is no {folder / name}.yaml")
    name = str(mapping.get("name", path.stem))
    try:
        check_name(name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Suite(
        name=name,
        title=str(mapping.get("title", path.stem)),
        paper=mapping.get("paper"),
        table=table,
        methods=methods,
        profiles=profiles,
        common=_section(mapping, "common", path),
        ablations={
            name: _ablation(value, f"ablations.{name}", path)
            for name, value in _section(mapping, "ablations", path).items()
        },
        folder=path.parent,
    )


def _section(mapping: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The mapping at `name`, with text keys; empty where there is none."""
    value = mapping.get(name)
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{path}: {name}: must be a mapping, got {value!r}")
    return {str(key): each for key, each in (value or {}).items()}


def _ablation(value: Any, name: str, path: Path) -> Ablation:
    ablation: Ablation = build_section(Ablation, value, name)
    variants = _section({"variants": ablation.variants}, "variants", path)
    return dataclasses.replace(
        ablation, variants={key: _section(variants, key, path) for key in variants}
    )


def _method(path: Path) -> Method:
    method = build_section(Method, read_mapping(path), str(path))
    return dataclasses.replace(method, name=path.stem, title=method.title or path.stem)


def load_paper_values(path: Path, table: str | None) -> PaperValues:
    """Published values of one table of `expected/paper.yaml`: method -> three FIDs."""
    if table is None:
        return {}
    values = read_mapping(path).get(table)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: has no table {table}")
    return {str(name): (float(a), float(b), float(c)) for name, (a, b, c) in values.items()}
