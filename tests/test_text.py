"""Text from outside: nothing of it is hidden, and nothing of it draws on what is around it."""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata

import pytest

from fedpdm.text import LONGEST, finite, json_text, line, markdown, table_lines, visible
from tests.support.cases import every

SHOWN = [
    ("plain words, 3 of 4", "plain words, 3 of 4"),
    ("Röntgen 数字 हिन्दी", "Röntgen 数字 हिन्दी"),
    ("\x1b[2Kok", r"\x1b[2Kok"),
    ("a\rb\x08\x00", r"a\x0db\x08\x00"),
    ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),  # bidirectional
    ("a\u200bb\ufeffc\u2060\u00ad", r"a\u200bb\ufeffc\u2060\xad"),  # of no width
    ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),  # line separators
    ("a\u3164b\u115fc\ufe0fd\U000e0041", r"a\u3164b\u115fc\ufe0fd\U000e0041"),
    ("a\xa0b\u3000c", r"a\xa0b\u3000c"),  # blanks of other kinds
    ("\udc80", r"\udc80"),  # a byte of a file name that is no UTF-8
]


@every("text, shown", SHOWN)
def test_what_is_not_seen_is_an_escape(text: str, shown: str) -> None:
    assert visible(text) == line(text) == shown
    shown.encode()


@pytest.mark.slow
def test_no_character_that_is_hidden_or_moves_others_is_left() -> None:
    """Of all of Unicode: no category of control, format or separator characters, and line breaks
    are those of a terminal's."""
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    left = {unicodedata.category(c) for c in shown}
    assert not left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} - {"Cc"}
    assert [c for c in shown if unicodedata.category(c) in ("Cc", "Zs")] == [
        "\t",
        "\n",
        " ",
    ]
    assert len(shown.splitlines()) == 2


def test_a_line_is_one_line_of_bounded_length() -> None:
    assert line(" a\n\tb \r\n c ") == "a b c"
    assert line("x" * LONGEST) == "x" * LONGEST
    assert line("x" * 10**6) == "x" * LONGEST + "..."
    assert line("\u202e" * 10**6, limit=60) == r"\u202e" * 10 + "..."
    assert line(ValueError("no\nway")) == "no way"
    assert visible("a\n\tb") == "a\n\tb"


def test_markdown_is_shown_not_obeyed() -> None:
    hostile = "x\n## Privacy\n| *fully* | `anonymous` [a](http://b) <b>$c$</b> &amp; ~~d~~"
    shown = markdown(hostile)
    assert "\n" not in shown
    assert not re.search(r"(?<![\\&])[*`|\[\]#~$<>]", shown)
    assert "://" not in shown
    assert "&amp;amp;" in shown
    assert markdown("digits-eps3.0 (client 2)") == "digits-eps3.0 (client 2)"


def test_numbers_that_json_does_not_have_are_null() -> None:
    value = {"a": [math.inf, -math.inf, (math.nan, 1.5)], "b": {"c": 1e308}, "d": "NaN", "e": True}
    assert finite(value) == {
        "a": [None, None, [None, 1.5]],
        "b": {"c": 1e308},
        "d": "NaN",
        "e": True,
    }
    for indent in (None, 1):
        text = json_text(value, indent=indent)
        assert json.loads(text, parse_constant=pytest.fail) == finite(value)
    assert json_text({"a": 1}) == json.dumps({"a": 1}, indent=1)


def test_a_table_keeps_to_a_width_and_repeats_its_first_column() -> None:
    head = ["method", *(f"column {k}" for k in range(20))]
    body = [["one", *("1.00 ± 0.10" for _ in range(20))], ["two", *("-" for _ in range(20))]]
    whole = table_lines(head, body)
    assert len(whole) == 3
    assert len(whole[0]) > 200
    parts = table_lines(head, body, width=80)
    assert max(map(len, parts)) <= 80
    assert parts.count("") == len(parts) // 4
    assert [row.split("  ")[0] for row in parts[:3]] == [row.split()[0] for row in parts[4:7]]
    found = [cell for row in parts if row.startswith("method") for cell in re.split(" {2,}", row)]
    assert [cell for cell in found if cell != "method"] == head[1:]
    assert table_lines(["a", "b" * 100], [["c", "d"]], width=80)[0] == f"a  {'b' * 100}"
    assert table_lines(["a"], [["b"]], width=1) == ["a", "b"]


def test_columns_stand_under_each_other_with_letters_of_two_places() -> None:
    first, second, third = table_lines(["x", "y"], [["\u732b", "1"], ["abc", "2"]])
    assert (first, second, third) == ("x    y", "\u732b   1", "abc  2")
