"""`package.module:NAME` in a config: what is found, and one line for what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpdm.config import ConfigError, config_from_mapping, own_code
from fedpdm.config.names import DATA_SETS
from fedpdm.config.plugins import DIRECTORY_VARIABLE, find, load_named
from fedpdm.diffusion.names import OBJECTIVES


def test_the_object_of_a_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_things.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_named("own_things:answer", key="data.name") == 42


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("module", "must have the form package.module:NAME"),
        (":NAME", "must have the form"),
        ("module:", "must have the form"),
        ("a.b:c.d", "must have the form"),
        ("../a:b", "must have the form"),
        (".a:b", "must have the form"),
        ("no_such_module_here:x", "cannot be imported"),
        ("json:no_such_thing", "module json has no no_such_thing"),
    ],
)
def test_a_bad_value_is_one_line(value: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_named(value, key="data.name")
    assert str(error.value).startswith(f"data.name: {value!r}")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("body", ["raise RuntimeError('one\\ntwo')", "import no_such_thing", "x ="])
def test_a_module_that_fails_is_one_line(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"failing_{len(body)}"
    (tmp_path / f"{name}.py").write_text(f"{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^data\.name: '{name}:x' cannot be imported") as error:
        load_named(f"{name}:x", key="data.name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("told", [False, True])
def test_the_directory_of_the_run_is_looked_in_last_and_only_meanwhile(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_things_{'told' if told else 'here'}"
    (tmp_path / f"{name}.py").write_text("import sys\npath = list(sys.path)\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not the library')\n")
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    if told:
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    else:
        monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_named(f"{name}:path", key="data.name") == [*before, str(tmp_path)]
    assert sys.path == before
    assert load_named("json:dumps", key="data.name")


def test_an_object_of_another_kind_is_one_line() -> None:
    table = {"one": 1}
    assert find("one", table, int, key="k") == 1
    with pytest.raises(ConfigError, match=r"^k: 'json:dumps' must be a builtins\.int, is a func"):
        find("json:dumps", table, int, key="k")


@pytest.mark.parametrize("place", [*DATA_SETS.values(), *OBJECTIVES.values()])
def test_every_registered_name_leads_somewhere(place: str) -> None:
    assert load_named(place, key="name") is not None


OPEN = (
    "data.name", "coarse.preset", "fine.preset", "coarse.objective", "coarse.weighting",
    "fine.weighting", "aggregation.method",
)  # fmt: skip


@pytest.mark.parametrize("key", OPEN)
def test_a_config_may_name_code_and_imports_none_when_it_is_read(key: str) -> None:
    section, name = key.split(".")
    config = config_from_mapping({section: {name: "no_such_module:thing"}})
    assert own_code(config) == {key: "no_such_module:thing"}
    for bad in ("no_such_module:", "a:b:c", ":x", "a/b:c"):
        line = f"^{key}: {bad!r} must have the form package.module:NAME$"
        with pytest.raises(ConfigError, match=line):
            config_from_mapping({section: {name: bad}})
    with pytest.raises(ConfigError, match=f"^{key}: must be one of "):
        config_from_mapping({section: {name: "nothing"}})


def test_other_keys_name_no_code() -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.kind: must be one of "):
        config_from_mapping({"schedule": {"kind": "a:b"}})
    assert own_code(config_from_mapping({})) == {}


def test_reading_a_config_is_light() -> None:
    code = (
        "import sys, fedpdm.config\n"
        "print(sorted({'torch', 'numpy', 'flwr', 'diffusers'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert answer.stdout == "[]\n"
