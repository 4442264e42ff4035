"""Configuration files: names, bases, overrides, and files that cannot be read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedpdm.config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    config_from_json,
    config_from_mapping,
    load_config,
)


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# --- Files ----------------------------------------------------------------------------------


def test_a_file_takes_its_name_from_its_stem(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "", "mnist.yaml")).name == "mnist"
    assert load_config(write(tmp_path, "name: this", "mnist.yaml")).name == "this"
    config = load_config(write(tmp_path, "run: {seed: 3}"))
    assert config == dataclasses.replace(
        RunConfig(), name="run", run=dataclasses.replace(RunConfig().run, seed=3)
    )


def test_base_files_are_merged_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "name: no\nrun: {seed: 1, rounds: 5}\nfine: {lr: 0.5}", "deep/root.yaml")
    write(tmp_path, "base: deep/root.yaml\nrun: {rounds: 7}\ndata: {name: mnist}", "middle.yaml")
    path = write(
        tmp_path, "base: middle.yaml\nrun: {threads: 2}\nfine:\ndata: {root: x}", "leaf.yaml"
    )
    config = load_config(path)
    assert config.name == "leaf"
    assert (config.run.seed, config.run.rounds, config.run.threads) == (1, 7, 2)
    assert (config.data.name, config.data.root) == ("mnist", "x")
    assert config.fine.lr == 0.5  # an empty section changes nothing
    assert load_config(path, ["fine.lr=0.25", "run.rounds=9"]).fine.lr == 0.25


def test_a_child_may_set_a_base_key_to_null(tmp_path: Path) -> None:
    write(tmp_path, "privacy: {epsilon: 3}", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nprivacy: {epsilon: null, t0: 500}")
    assert load_config(path).privacy.t0 == 500
    both = write(tmp_path, "base: base.yaml\nprivacy: {t0: 500}")
    with pytest.raises(ConfigError, match="exactly one of epsilon and t0"):
        load_config(both)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "run.yaml: must hold a mapping, got list"),
        ("3", "run.yaml: must hold a mapping, got int"),
        ("a: [", "run.yaml: not valid YAML: "),
        ("\t", "run.yaml: not valid YAML: "),
        ("a: !!python/object:os.system x", "run.yaml: not valid YAML: could not determine"),
        ("run: {seed: 2024-13-45}", "run.yaml: not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 4000, "run.yaml: line 1: nests deeper than 32 levels"),
        ("a: " + "9" * 5000, "run.yaml: line 1: a number of 5000 characters"),
        ("[]", "run.yaml: must hold a mapping, got list"),
        ("false", "run.yaml: must hold a mapping, got bool"),
        ("? [a]\n: 1", "run.yaml: not valid YAML: "),
        ("name: 2024-01-01", "name: must be str, got datetime.date(2024, 1, 1)"),
        ("a: &a [*a]", "run.yaml: line 1: aliases are not taken"),
        ("2024-01-01: 3", "2024-01-01: unknown key"),
        ("base: missing.yaml", "missing.yaml: cannot be read: No such file or directory"),
        ("base: run.yaml", "run.yaml: base files nest deeper than 8 levels"),
        ("base: [a]", "['a']: cannot be read: No such file or directory"),
        ("base: .", "cannot be read: Is a directory"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"run\.yaml: is not UTF-8 text"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["{", "", "nope", "[" * 9])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="config: not valid JSON: "):
        config_from_json(text)
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: must be finite, got nan"):
        config_from_json('{"privacy": {"epsilon": NaN}}')


# --- Overrides ------------------------------------------------------------------------------


def test_overrides_set_and_create_and_leave_the_original_alone() -> None:
    mapping = {"run": {"seed": 1}}
    result = apply_overrides(
        mapping,
        ["run.seed=2", "run.seed = 3", "fine.lr=1e-4", "name=a=b", "privacy.epsilon=null",
         "data.root=", "fine.t_range='all'", "run.simulation=false"],
    )  # fmt: skip
    assert mapping == {"run": {"seed": 1}}
    assert result == {
        "run": {"seed": 3, "simulation": False},
        "fine": {"lr": "1e-4", "t_range": "all"},
        "name": "a=b",
        "privacy": {"epsilon": None},
        "data": {"root": None},
    }
    result = apply_overrides({"privacy": None}, ["privacy.epsilon=4"])
    assert config_from_mapping(result).privacy.epsilon == 4.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "--set 'run.seed': must have the form section.key=value"),
        ("=3", "--set '=3': must have the form section.key=value"),
        ("run.seed.deep=3", "run.seed.deep: seed is not a section"),
        ("run.seed=[", "run.seed: not valid YAML: "),
        ("run.seeed=3", "run.seeed: unknown key; did you mean seed?"),
        ("run..seed=3", "run.: unknown key"),
        ("run.seed=2024-13-45", "run.seed: not valid YAML: month must be in 1..12"),
        ("run.seed=three", "run.seed: must be int, got 'three'"),
        ("run=3", "run: must be a mapping, got 3"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        config_from_mapping(apply_overrides({"run": {"seed": 1}}, [override]))
    assert "\n" not in str(caught.value)
