"""`docs/threats.md` and `docs/privacy.md` name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def named(text: str) -> list[tuple[str, str]]:
    """(file under tests/, test or "") of all that a page names."""
    return re.findall(r"`(?:tests/)?(\w+/test_\w+\.py)(?:::(test_\w+))?`", text)


def missing(text: str) -> list[str]:
    wrong = []
    for file, test in named(text):
        path = ROOT / "tests" / file
        if not path.exists() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            wrong.append(f"{file}::{test}")
    return wrong


@pytest.mark.parametrize(("page", "least"), [("threats.md", 20), ("privacy.md", 25)])
def test_the_tests_that_a_page_names_exist(page: str, least: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(named(text)) >= least
    assert missing(text) == []


def test_every_threat_that_is_stopped_names_a_test() -> None:
    text = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    threats = [row for row in rows if not row.startswith("| It tries to")]
    assert len(threats) > 15
    assert [row for row in threats if not named(row)] == []


def test_a_test_that_is_not_there_is_found() -> None:
    assert missing("`wire/test_wire.py::test_no_such_thing`") == [
        "wire/test_wire.py::test_no_such_thing"
    ]
    assert missing("`wire/test_nothing.py`") == ["wire/test_nothing.py::"]
