"""What mkdocs changes when it builds the site.

The help of every command replaces `<!-- command line -->` on a line of its own. In tables, the
numbers of a cell stay on one line, and a key breaks after a dot or an underscore.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any
from unittest import mock

from fedpdm.cli import main
from fedpdm.commands.terminal import walk_commands

__all__ = ["command_line", "on_page_content", "on_page_markdown"]


class _Found(BaseException):
    """Carries the parser out of `main`."""


def _parser() -> argparse.ArgumentParser:
    def found(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            main(["--help"])
        except _Found as caught:
            parser: argparse.ArgumentParser = caught.args[0]
            return parser
    raise RuntimeError("fedpdm has no argparse parser")


def command_line() -> str:
    """Markdown: a heading and the help of every command."""
    parser = _parser()
    every = [parser, *(command for _, command in walk_commands(parser))]
    with mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}):
        parts = [f"## {one.prog}\n\n```text\n{one.format_help()}```" for one in every]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with every page's text."""
    mark = "<!-- command line -->"
    return markdown.replace(mark, command_line()) if f"\n{mark}\n" in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs calls this with every page's HTML."""
    html = re.sub(r"(?<=<td>)[\d.]+( [±/] [\d.]+)+(?=</td>)", _together, html)
    return re.sub(r"(?<=<td><code>)[\w.]+(?=</code></td>)", _breakable, html)


def _together(numbers: re.Match[str]) -> str:
    return numbers[0].replace(" ", "&nbsp;")


def _breakable(key: re.Match[str]) -> str:
    return re.sub(r"[._](?=\w)", r"\g<0><wbr>", key[0])
