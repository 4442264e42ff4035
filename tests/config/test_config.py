"""Configuration: strict keys, types and ranges, base files, overrides, round trips."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpdm.config import (
    ConfigError,
    RunConfig,
    config_from_json,
    config_from_mapping,
    config_reference,
    config_to_json,
    config_to_yaml,
    load_config,
)
from tests.support.cases import every

NAME = (
    "name: must be 1 to 128 letters, digits and ._-+=,@() or blanks, beginning with a letter, a "
    "digit or _"
)
SECTIONS = [f for f in dataclasses.fields(RunConfig) if f.name != "name"]
KEYS = [
    (section.name, key)
    for section in SECTIONS
    for key in dataclasses.fields(section.default)  # type: ignore[arg-type]
]


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# --- Defaults and round trips ---------------------------------------------------------------


def test_the_defaults_pass_their_own_checks() -> None:
    mapping = dataclasses.asdict(RunConfig())
    assert config_from_mapping(mapping) == config_from_mapping({}) == RunConfig()


def plausible(section: str, key: Any) -> Any:
    """A value other than the default that the key's own checks allow."""
    checks, value = key.metadata, getattr(getattr(RunConfig(), section), key.name)
    kind = str(key.type).split(" ")[0]
    if choices := checks.get("choices"):
        return choices[:2] if kind.startswith("tuple[") else next(c for c in choices if c != value)
    if kind.startswith("tuple["):
        return ("other", "more")
    if kind == "bool":
        return not value
    if kind == "str":
        return "other"
    if kind == "int":
        return max(int(value or 0), checks.get("low", 0)) + 1
    low = checks.get("low", checks.get("above", 0.0))
    high = checks.get("high", checks.get("below", low + 2.0))
    return next(v for v in (low + (high - low) * 0.4, low + (high - low) * 0.6) if v != value)


def test_every_key_survives_every_round_trip() -> None:
    mapping: dict[str, Any] = {"name": "other"}
    for section, key in KEYS:
        mapping.setdefault(section, {})[key.name] = plausible(section, key)
    mapping["privacy"] |= {"t0": None, "noise_draw": 0}  # not with run.simulation: false
    mapping["run"]["begun_with"] = None  # nor this
    mapping["partition"] |= {"kind": "iid"}
    mapping["data"] |= {"white": 4095.0, "channels": 3}  # not what is black, and not 2
    mapping["evaluation"]["image_metrics"] = False
    mapping["schedule"] |= {"beta_start": 0.001, "beta_end": 0.3}
    mapping["statistics"]["components_share"] = 0.1  # shares sum to less than 1
    mapping["coarse"]["images"] = "released"  # all else is for simulations
    mapping["sampling"]["coarse_worth"] = None  # not with fine.t_range: below_t0
    mapping["aggregation"] |= {"secure": False, "max_update_norm": None}  # not with server training
    config = config_from_mapping(mapping)
    assert dataclasses.asdict(config) == mapping
    for section, key in KEYS:
        changed = getattr(getattr(config, section), key.name)
        exempt = (section, key.name) in {
            ("privacy", "t0"), ("coarse", "images"), ("sampling", "coarse_worth"),
            ("aggregation", "secure"), ("aggregation", "max_update_norm"),
            ("privacy", "noise_draw"), ("run", "begun_with"),
        }  # fmt: skip
        assert exempt or changed != getattr(getattr(RunConfig(), section), key.name)
    assert config_from_json(config_to_json(config)) == config
    assert "\n" not in config_to_json(config)
    assert config_from_mapping(yaml.safe_load(config_to_yaml(config))) == config


def test_floats_round_trip_exactly_and_yaml_exponents_are_numbers(tmp_path: Path) -> None:
    config = config_from_mapping({"privacy": {"delta": 1e-5 / 3, "clip_norm": 0.1 + 0.2}})
    assert config_from_json(config_to_json(config)).privacy == config.privacy
    assert config_from_mapping(yaml.safe_load(config_to_yaml(config))).privacy == config.privacy
    path = write(tmp_path, "privacy: {delta: 1e-6, epsilon: 3}")
    privacy = load_config(path).privacy
    assert (privacy.delta, privacy.epsilon) == (1e-6, 3.0)
    assert type(privacy.epsilon) is float


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().run.seed = 3  # type: ignore[misc]


def test_the_reference_lists_every_key() -> None:
    table = config_reference()
    for section, key in KEYS:
        default = json.dumps(getattr(getattr(RunConfig(), section), key.name))
        assert f"| `{section}.{key.name}` | `{default}` | {key.metadata['doc']}" in table
        assert key.metadata["doc"]
    assert table.count("\n") == len(KEYS) + 2
    assert all(line.count("|") == 4 for line in table.splitlines())


# --- What is refused ------------------------------------------------------------------------


@every("section, key", KEYS)
def test_every_key_refuses_wrong_types_and_values_beyond_its_bounds(section: str, key: Any) -> None:
    kind = str(key.type).split(" ")[0]
    path = re.escape(f"{section}.{key.name}: ")
    wrong: dict[str, list[Any]] = {
        "bool": [1, "yes", 0.0],
        "int": [1.5, "3", True, [1]],
        "float": ["much", True, [1.0], float("nan"), float("inf"), 10**400],
        "str": [3, True, ["a"]],
    }
    wrong |= {"tuple[str,": ["a", 3, True], "tuple[int": ["a", 3, True]}
    said = "a list" if kind.startswith("tuple[") else f"({kind}|finite)"
    for value in [*wrong[kind], {"a": 1}]:
        with pytest.raises(ConfigError, match=f"^{path}must be {said}"):
            config_from_mapping({section: {key.name: value}})
    if "None" not in str(key.type):
        named = "a list" if kind.startswith("tuple[") else kind
        with pytest.raises(ConfigError, match=f"^{path}must be {named}, got None$"):
            config_from_mapping({section: {key.name: None}})
    checks, beyond = key.metadata, []
    step = 1 if kind == "int" else 1e-9
    if "low" in checks:
        beyond.append((checks["low"] - step, f"must be at least {checks['low']:g}, got"))
    if "high" in checks:
        beyond.append((checks["high"] + step, f"must be at most {checks['high']:g}, got"))
    if "above" in checks:
        beyond.append((checks["above"], f"must be greater than {checks['above']:g}, got"))
    if "below" in checks:
        beyond.append((checks["below"], f"must be less than {checks['below']:g}, got"))
    if "choices" in checks:
        near = checks["choices"][0] + "x"
        beyond.append((near, f"got '{near}'; did you mean "))
        beyond.append(("?", f"must be one of {', '.join(checks['choices'])}, got '?'"))
    for value, message in beyond:
        given = [value] if kind.startswith("tuple[") else value
        start = re.escape(f"{section}.{key.name}")
        with pytest.raises(ConfigError, match=start + ".*" + re.escape(message)):
            config_from_mapping({section: {key.name: given}})


def test_every_number_has_a_bound() -> None:
    for section, key in KEYS:
        if str(key.type).split(" ")[0] in ("int", "float"):
            assert {"low", "above"} & key.metadata.keys(), f"{section}.{key.name}"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"privacy": {"clipnorm": 3}}, "privacy.clipnorm: unknown key; did you mean clip_norm?"),
        ({"privcy": {}}, "privcy: unknown key; did you mean privacy?"),
        ({"qqq": 1}, "qqq: unknown key"),
        ({3: 4}, "3: unknown key"),
        ({"run": {"seed ": 3}}, "run.seed : unknown key; did you mean seed?"),
        ({"privacy": 3}, "privacy: must be a mapping, got 3"),
        ({"privacy": []}, "privacy: must be a mapping, got []"),
        ({"run": False}, "run: must be a mapping, got False"),
        ({"run": ""}, "run: must be a mapping, got ''"),
        ([], "config: must be a mapping, got []"),
        (None, "config: must be a mapping, got None"),
        ({"privacy": {"t0": 5}}, "privacy: give exactly one of epsilon and t0"),
        ({"privacy": {"epsilon": None}}, "privacy: give exactly one of epsilon and t0"),
        (
            {"privacy": {"epsilon": None, "t0": 101}, "schedule": {"num_steps": 100}},
            "privacy.t0: must be at most schedule.num_steps = 100, got 101",
        ),
        (
            {"schedule": {"beta_start": 0.3, "beta_end": 0.2}},
            "schedule.beta_start: must be at most beta_end = 0.2, got 0.3",
        ),
        (
            {"partition": {"kind": "own", "num_clients": 2}},
            "partition.kind: own has one client in simulation; set num_clients: 1",
        ),
        ({"data": {"classes": [1.5]}}, "data.classes[0]: must be int or str, got 1.5"),
        ({"data": {"classes": ["a", True]}}, "data.classes[1]: must be int or str, got True"),
        ({"data": {"classes": [None]}}, "data.classes[0]: must be int or str, got None"),
        ({"data": {"attributes": ["Male", 3]}}, "data.attributes[1]: must be str, got 3"),
        ({"name": ""}, f"{NAME}, got ''"),
        ({"name": "a/b"}, f"{NAME}, got 'a/b'"),
        ({"name": ".."}, f"{NAME}, got '..'"),
        ({"name": "-x"}, f"{NAME}, got '-x'"),
        ({"name": "a\0"}, "name: must have no control characters, got 'a\\x00'"),
        (
            {"name": "ok\n## Privacy"},
            "name: must have no control characters, got 'ok\\n## Privacy'",
        ),
        ({"name": "a\u202eb"}, f"{NAME}, got 'a\\u202eb'"),
        ({"name": "a\u200bb"}, f"{NAME}, got 'a\\u200bb'"),
        ({"name": "<b>a</b>"}, f"{NAME}, got '<b>a</b>'"),
        ({"name": "a|b"}, f"{NAME}, got 'a|b'"),
        ({"name": 129 * "x"}, f"{NAME}, got '{128 * 'x'}'"),
        ({"data": {"root": "a\u2028b"}}, "data.root: must have no control characters, got"),
        ({"data": {"root": 5000 * "x"}}, "data.root: must have at most 4096 characters, got 5000"),
        ({"data": {"classes": ["a\x1b[2J"]}}, "data.classes[0]: must have no control characters"),
        (
            {"run": {"device": "cuda\u202e"}},
            "run.device: must be a device of torch, got 'cuda",
        ),
        ({"sampling": {"scheduler": "a b"}}, "sampling.scheduler: must be a name, got 'a b'"),
        (
            {"privacy": {"release": "a b"}},
            "privacy.release: must be a name, or package.",
        ),
        ({"name": 3}, "name: must be str, got 3"),
        ({"name": None}, "name: must be str, got None"),
    ],
)
def test_bad_configs_are_refused_in_one_line(mapping: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        config_from_mapping(mapping)
    assert "\n" not in str(caught.value)


@every(
    "name",
    ["digits", "mein Lauf (2)", "Röntgen_2+eps=3,5@k", "数字", "ह‍िंदी".replace("\u200d", ""), "_x"],
)
def test_names_of_letters_of_any_script_are_taken(name: str) -> None:
    assert config_from_mapping({"name": name}).name == name


def test_classes_are_names_or_numbers() -> None:
    config = config_from_mapping({"data": {"classes": [3, "5"]}})
    assert config.data.classes == (3, "5")
    assert config_from_json(config_to_json(config)).data.classes == (3, "5")


def test_a_draw_of_the_noise_is_for_simulations_and_no_draw_leaves_digests() -> None:
    drawn = config_from_mapping({"privacy": {"noise_draw": 2}})
    assert drawn.privacy.noise_draw == 2
    assert config_from_json(config_to_json(drawn)) == drawn
    assert "noise_draw" not in config_to_json(RunConfig())
    assert config_from_mapping({"privacy": {"noise_draw": 0}}) == RunConfig()
    outside = {"run": {"simulation": False}, "privacy": {"noise_draw": 2}}
    with pytest.raises(ConfigError, match=r"^privacy\.noise_draw: must be 0 outside .* got 2$"):
        config_from_mapping(outside)
    with pytest.raises(ConfigError, match=r"^privacy\.noise_draw: must be at least 0, got -1$"):
        config_from_mapping({"privacy": {"noise_draw": -1}})


def test_valid_neighbours_of_the_refused() -> None:
    assert config_from_mapping({"privacy": {"epsilon": None, "t0": 1000}}).privacy.t0 == 1000
    assert config_from_mapping({"privacy": None}) == RunConfig()
    own = {"partition": {"kind": "own", "num_clients": 1}}
    assert config_from_mapping(own).partition.kind == "own"
    deployed = config_from_mapping({"run": {"simulation": False}})
    assert not deployed.run.simulation
    assert deployed.evaluation.image_metrics  # asked for; each client decides itself
