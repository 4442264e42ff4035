"""YAML and JSON from strangers: plain data of bounded size and depth, no key twice, no aliases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import yaml

__all__ = ["LARGEST", "StrictError", "parse_json", "parse_yaml", "read_text"]

LARGEST = 1 << 20  # characters of a file
DEEPEST = 32  # collections inside each other
MOST = 20_000  # values of a YAML file, whose reader is slow
LONGEST_NUMBER = 400  # characters; YAML counts to the base of 60, in time that grows as the square


class StrictError(ValueError):
    """Text that is no YAML or JSON, or more than is taken here; one line."""


class _Loader(yaml.SafeLoader):
    """Refuses what makes a small text large (aliases), deep or ambiguous (repeated keys)."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise StrictError(f"line {line}: aliases are not taken")
        self.count += 1
        if self.count > MOST:
            raise StrictError(f"line {line}: has more than {MOST} values")
        self.depth += 1
        if self.depth > DEEPEST:
            raise StrictError(f"line {line}: nests deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > LONGEST_NUMBER:
            raise StrictError(
                f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters"
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(getattr(key, "value", "")))
            if key.tag == "tag:yaml.org,2002:merge":
                raise StrictError(f"line {key.start_mark.line + 1}: merges are not taken")
            if name in seen:
                raise StrictError(
                    f"line {key.start_mark.line + 1}: key {key.value!r} stands there twice"
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def read_text(path: Path, *, most: int = LARGEST) -> str:
    """A file's text; `StrictError` if it cannot be read, is no UTF-8 text or must have more than
    `most` characters."""
    try:
        with open(path, "rb") as file:
            data = file.read(4 * most + 1)
    except OSError as error:
        raise StrictError(f"cannot be read: {error.strerror}") from None
    if len(data) > 4 * most:
        raise StrictError(f"must have at most {most} characters")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise StrictError("is not UTF-8 text") from None


def parse_yaml(text: str) -> Any:
    """Plain data from YAML. `StrictError` in one line for everything else."""
    if len(text) > LARGEST:
        raise StrictError(f"must have at most {LARGEST} characters, got {len(text)}")
    try:
        return yaml.load(text, Loader=_Loader)
    except StrictError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise StrictError(f"not valid YAML: {' '.join(str(error).split())}") from None


def parse_json(text: str, *, most: int = LARGEST, earlier: bool = False) -> Any:
    """Plain data from JSON of at most `most` characters. `StrictError` in one line for everything
    else. NaN and infinities are taken where `earlier` versions may have written them."""
    if len(text) > most:
        raise StrictError(f"must have at most {most} characters, got {len(text)}")
    constant = float if earlier else _refuse
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=constant)
    except StrictError:
        raise
    except RecursionError:
        raise StrictError("not valid JSON: nests too deep") from None
    except ValueError as error:
        raise StrictError(f"not valid JSON: {error}") from None


def _refuse(name: str) -> NoReturn:
    raise StrictError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise StrictError(f"key {twice!r} stands there twice")
    return made
