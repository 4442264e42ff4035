"""YAML from strangers is refused in one line before it costs anything."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from fedpdm.config import ConfigError, load_config
from fedpdm.config.strict import LARGEST, StrictError, parse_json, parse_yaml, read_text
from fedpdm.deployment.invitation import read_invitation

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(9 * [f'*{chr(97 + n)}'])}]\n" for n in range(8)
)

REFUSED = {
    "aliases": (ALIASES, "line 2: aliases are not taken"),
    "repeated key": ("run: {seed: 1}\nrun: {seed: 2}\n", "line 2: key 'run' stands there twice"),
    "repeated inner key": ("run:\n  seed: 1\n  seed: 2\n", "line 3: key 'seed' stands there twice"),
    "merge": ("run:\n  <<: {seed: 1}\n", "line 2: merges are not taken"),
    "deep": ("[" * 40 + "]" * 40, "line 1: nests deeper than 32 levels"),
    "very deep": ("[" * 100_000, "nests deeper than 32 levels"),
    "large": ("#" * (LARGEST + 1), f"must have at most {LARGEST} characters, got {LARGEST + 1}"),
    "many values": ("a: [" + "x," * 20_000 + "]", "line 1: has more than 20000 values"),
    "long number": ("a: 1" + ":1" * 300_000, "line 1: a number of 600001 characters"),
    "python object": ("!!python/object/apply:os.getcwd []", "not valid YAML: could not determine"),
    "unhashable key": ("? [1, 2]\n: 3\n", "not valid YAML"),
    "no YAML": ("a: [", "not valid YAML"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_takes_no_time_and_one_line(name: str, tmp_path: Path) -> None:
    text, words = REFUSED[name]
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert time.process_time() - started < 4.0
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)


def test_plain_data_is_read_as_yaml_reads_it() -> None:
    text = "a: 1\nb: [x, 2.5, null, true]\nc: {d: {e: 1e-5}}\n'1': text\n2: number\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_every_file_of_the_experiments_is_read() -> None:
    files = sorted((Path(__file__).parents[2] / "experiments").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert parse_yaml(file.read_text()) == yaml.safe_load(file.read_text())


def test_text_and_number_are_different_keys_and_the_same_text_is_not() -> None:
    assert parse_yaml("1: a\n'1': b\n") == {1: "a", "1": "b"}
    with pytest.raises(StrictError, match="twice"):
        parse_yaml("'run': a\nrun: b\n")


BAD_JSON = {
    "repeated key": ('{"a": {"b": 1, "b": 2}}', "key 'b' stands there twice"),
    "deep": ("[" * 100_000, "nests too deep"),
    "large": (" " * (LARGEST + 1), "characters"),
    "no JSON": ("{", "not valid JSON"),
    "no number": ('{"a": NaN}', "NaN is no number of JSON"),
    "infinity": ("[-Infinity]", "-Infinity is no number of JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_is_as_strict(name: str) -> None:
    text, words = BAD_JSON[name]
    with pytest.raises(StrictError, match=words) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_what_earlier_versions_wrote_is_read() -> None:
    assert parse_json('{"a": [Infinity]}', earlier=True) == {"a": [float("inf")]}


def test_a_file_is_not_read_further_than_it_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: reading all of it would not end
    with pytest.raises(StrictError, match=f"must have at most {LARGEST} characters"):
        read_text(path)
    with pytest.raises(ConfigError, match=r"large\.json: must have at most"):
        read_invitation(path)
    with pytest.raises(ConfigError, match=r"large\.json: must have at most"):
        load_config(path)
