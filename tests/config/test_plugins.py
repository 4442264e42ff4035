"""`package.module:NAME` in a config: what is found, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpdm.config.plugins import load_named
from fedpdm.config.schema import ConfigError


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
