"""The tests' own `every`: no case is left out, and each that fails is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cases import every


def test_every_case_is_run_and_those_that_fail_are_named(tmp_path: Path) -> None:
    seen: list[tuple[int, str, Path]] = []

    @every("word", ["a", "b"])
    @every("number, allowed", [(1, True), (2, False), (3, False)])
    def check(number: int, allowed: bool, word: str, tmp_path: Path) -> None:
        seen.append((number, word, tmp_path))
        if number == 3:
            pytest.fail("by pytest")
        assert allowed

    with pytest.raises(BaseExceptionGroup, match="2 of 2 cases failed") as caught:
        check(tmp_path=tmp_path)
    assert seen == [(number, word, tmp_path) for word in "ab" for number in (1, 2, 3)]
    first = caught.value.exceptions[0]
    assert isinstance(first, BaseExceptionGroup)
    assert first.__notes__ == ["in the case {'word': 'a'}"]
    assert [each.__notes__ for each in first.exceptions] == [
        [f"in the case {{'number': {number}, 'allowed': False}}"] for number in (2, 3)
    ]


@every("number", range(3))
def test_fixtures_are_handed_on(number: int, tmp_path: Path) -> None:
    assert tmp_path.is_dir()
    assert number < 3
