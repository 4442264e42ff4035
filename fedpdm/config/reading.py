"""Reading and writing configurations, strictly; the only module that reads YAML."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedpdm.config.keys import LONGEST_NAME, NAME_MARKS
from fedpdm.config.plugins import check_form, is_named
from fedpdm.config.schema import ConfigError, NetworkConfig, RunConfig, StatisticsConfig
from fedpdm.config.strict import StrictError, parse_json, parse_yaml, read_text
from fedpdm.config.toy import ToyConfig

__all__ = [
    "apply_overrides",
    "build_section",
    "config_from_json",
    "config_from_mapping",
    "config_keys",
    "config_reference",
    "config_to_json",
    "config_to_yaml",
    "load_config",
    "load_toy_config",
    "own_code",
    "read_mapping",
    "read_policy",
    "toy_config_from_mapping",
]


NAME_ROW = (
    f"| `name` | file name | of the run: 1 to {LONGEST_NAME} letters, digits and `{NAME_MARKS}` or "
    "blanks |"
)
LONGEST_TEXT = 4096  # characters of a value; a path has no more
_UNSEEN = ("Cc", "Zl", "Zp")  # control characters and line separators
YOUNGER_KEYS = (
    ("run", "begun_with", None),
    ("privacy", "release", "images"),
    ("privacy", "noise_draw", 0),
    ("data", "channels", None),
    ("fine", "augment", "none"),
    ("data", "background", None),
    ("data", "black", None),
    ("data", "white", None),
    ("data", "frames", "refuse"),
    ("sampling", "handover", None),
    ("sampling", "fine_labels", None),
    ("evaluation", "classifier_steps", 3000),
    ("sampling", "candidates", None),
    ("sampling", "own_classes", "auto"),
    *(("statistics", each.name, each.default) for each in dataclasses.fields(StatisticsConfig)),
    *(("network", each.name, each.default) for each in dataclasses.fields(NetworkConfig)),
)


def _describe(annotation: Any) -> str:
    return str(getattr(annotation, "__name__", annotation)).replace("NoneType", "null")


def _coerce(annotation: Any, value: Any, path: str) -> Any:
    """`value` as `annotation`: int, float, str, bool, one of some of them or None, or a tuple."""
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(annotation)):
            return None
        if len(kinds) > 1 and type(value) not in kinds:
            raise ConfigError(
                f"{path}: must be {' or '.join(map(_describe, kinds))}, got {value!r}"
            )
        annotation = type(value) if len(kinds) > 1 else kinds[0]
    if typing.get_origin(annotation) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: must be a mapping, got {value!r}")
        return value
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: must be a list, got {value!r}")
        item = typing.get_args(annotation)[0]
        return tuple(_coerce(item, each, f"{path}[{index}]") for index, each in enumerate(value))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10**300 else math.inf
    if annotation is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-5 as text
            value = float(value)
    wrong_bool = isinstance(value, bool) and annotation is not bool
    if not isinstance(value, annotation) or wrong_bool:
        raise ConfigError(f"{path}: must be {_describe(annotation)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: must be finite, got {value}")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ConfigError(f"{path}: must have at most {LONGEST_TEXT} characters, got {len(value)}")
    if isinstance(value, str) and any(unicodedata.category(c) in _UNSEEN for c in value):
        raise ConfigError(f"{path}: must have no control characters, got {value!r}")
    return value


def _check(value: Any, checks: Mapping[str, Any], path: str) -> None:
    if value is None:
        return
    if (form := checks.get("form")) and not re.fullmatch(form[0], str(value), re.ASCII):
        raise ConfigError(f"{path}: must be {form[1]}, got {value!r}")
    if isinstance(value, tuple):
        for index, each in enumerate(value):
            _check(each, checks, f"{path}[{index}]")
        return
    if checks.get("own") and is_named(value):
        check_form(value, key=path)
    elif (choices := checks.get("choices")) and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: must be one of {', '.join(choices)}, got {value!r}{hint}")
    for name, holds, words in (
        ("low", lambda v, b: v >= b, "at least"),
        ("high", lambda v, b: v <= b, "at most"),
        ("above", lambda v, b: v > b, "greater than"),
        ("below", lambda v, b: v < b, "less than"),
    ):
        if name in checks and not holds(value, checks[name]):
            raise ConfigError(f"{path}: must be {words} {checks[name]:g}, got {value!r}")


def build_section(cls: type[Any], mapping: Any, path: str) -> Any:
    """A config dataclass from a nested mapping; every error names the key's path."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or 'config'}: must be a mapping, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in mapping.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{full}: unknown key{hint}")
        if dataclasses.is_dataclass(hints[key]):
            section = {} if value is None else value
            values[key] = build_section(typing.cast(type[Any], hints[key]), section, full)
        else:
            values[key] = _coerce(hints[key], value, full)
            _check(values[key], fields[key].metadata, full)
    return cls(**values)


def config_from_mapping(mapping: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain data. `ConfigError` as described in the module."""
    config = build_section(RunConfig, mapping, "")
    assert isinstance(config, RunConfig)
    return config


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except StrictError as error:
        raise ConfigError(f"{where}: {error}") from None


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`mapping` with `section.key=value` overrides applied; values are parsed as YAML."""
    result: dict[str, Any] = copy.deepcopy(dict(mapping))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"--set {override!r}: must have the form section.key=value")
        keys = path.strip().split(".")
        node = result
        for key in keys[:-1]:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{path}: {key} is not a section")
            node = child
        node[keys[-1]] = _parse_yaml(text, path)
    return result


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read an experiment file and apply overrides.

    A file may say `base: other.yaml` (relative to itself): sections are merged over the base's.
    The run's default name is the file's stem.
    """
    mapping = read_mapping(path)
    mapping.setdefault("name", path.stem)
    return config_from_mapping(apply_overrides(mapping, overrides))


def load_toy_config(path: Path, overrides: Iterable[str] = ()) -> ToyConfig:
    """Read the toy's experiment file and apply overrides, like `load_config`."""
    mapping = read_mapping(path)
    mapping.setdefault("name", path.stem)
    return toy_config_from_mapping(mapping, overrides)


def toy_config_from_mapping(mapping: Mapping[str, Any], overrides: Iterable[str] = ()) -> ToyConfig:
    """A `ToyConfig` from nested plain data. `ConfigError` as described in the module."""
    config = build_section(ToyConfig, apply_overrides(mapping, overrides), "")
    assert isinstance(config, ToyConfig)
    return config


def read_mapping(path: Path, depth: int = 0) -> dict[str, Any]:
    """A YAML file's mapping, merged over that of its `base` file; `ConfigError` names the file."""
    if depth > 8:
        raise ConfigError(f"{path}: base files nest deeper than 8 levels")
    try:
        mapping = parse_yaml(read_text(path))
    except StrictError as error:
        raise ConfigError(f"{path}: {error}") from None
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: must hold a mapping, got {type(mapping).__name__}")
    base = mapping.pop("base", None)
    if base is None:
        return mapping
    merged = read_mapping(path.parent / str(base), depth + 1)
    merged.pop("name", None)
    for key, value in mapping.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **value}
        elif value is None and isinstance(merged.get(key), dict):
            continue  # an empty section changes nothing
        else:
            merged[key] = value
    return merged


def read_policy(cls: type[Any], path: Path) -> Any:
    """A node's policy, an instance of the dataclass `cls`, from YAML; errors name file and key.

    A `stated` key that is missing or empty is refused: a file that was cut short bounds nothing.
    `none` says that there is no bound.
    """
    mapping = read_mapping(path)
    stated = [f.name for f in dataclasses.fields(cls) if f.metadata.get("stated")]
    bounds = {k: None if k in stated and v == "none" else v for k, v in mapping.items()}
    try:
        policy = build_section(cls, bounds, "")
        for name in stated:
            if mapping.get(name) is None:
                there = "is empty" if name in mapping else "is missing"
                raise ConfigError(f"{name}: {there}; give a bound, or none for no bound")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return policy


def config_to_json(config: RunConfig) -> str:
    """The resolved config as one line of JSON; `config_from_json` is its inverse.

    Keys that are younger than digests of configs are left out at their default, so that an
    acceptance or a result of the time before them is found.
    """
    plain = dataclasses.asdict(config)
    for section, key, default in YOUNGER_KEYS:
        if plain[section][key] == default:
            del plain[section][key]
    for section in ("statistics", "network"):
        if not plain[section]:
            del plain[section]
    return json.dumps(plain, sort_keys=True, allow_nan=False)


@functools.lru_cache(maxsize=16)  # every message of a run carries the same text
def config_from_json(text: str) -> RunConfig:
    """Inverse of `config_to_json`. `ConfigError` also for text that is not JSON."""
    try:
        mapping = parse_json(text, earlier=True)  # a key that is not finite is named below
    except StrictError as error:
        raise ConfigError(f"config: {error}") from None
    return config_from_mapping(mapping)


def config_to_yaml(config: RunConfig | ToyConfig) -> str:
    """The resolved config as YAML, every key written out."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False)


def own_code(config: RunConfig) -> dict[str, str]:
    """Key -> `package.module:NAME` for all custom code that a config names."""
    return {
        f"{section.name}.{key.name}": value
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, section.name))
        for key in dataclasses.fields(getattr(config, section.name))
        if key.metadata.get("own")
        and is_named(value := getattr(getattr(config, section.name), key.name))
    }


def config_keys(kind: type[RunConfig] | type[ToyConfig] = RunConfig) -> list[dict[str, Any]]:
    """Every key of a section in order: `key`, `default`, `meaning`, `choices` or None, and `own`:
    whether custom code may stand for a choice."""
    keys = []
    for section in dataclasses.fields(kind):
        default = section.default
        if not dataclasses.is_dataclass(default):
            continue
        for key in dataclasses.fields(default):
            choices = key.metadata.get("choices")
            keys.append(
                {
                    "key": f"{section.name}.{key.name}",
                    "default": getattr(default, key.name),
                    "meaning": key.metadata["doc"],
                    "choices": list(choices) if choices else None,
                    "own": bool(key.metadata.get("own")),
                }
            )
    return keys


def config_reference(kind: type[RunConfig] | type[ToyConfig] = RunConfig) -> str:
    """Every key with its default and meaning, as a Markdown table (docs are made from it)."""
    lines = ["| key | default | meaning |", "|---|---|---|", NAME_ROW]
    for key in config_keys(kind):
        own = ", or package.module:NAME" if key["own"] else ""
        choices = f" ({', '.join(key['choices'])}{own})" if key["choices"] else ""
        value = json.dumps(key["default"])
        lines.append(f"| `{key['key']}` | `{value}` | {key['meaning']}{choices} |")
    return "\n".join(lines)
