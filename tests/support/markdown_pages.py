"""The documentation's pages, and the code blocks in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
_FENCE = re.compile(r"^( *)```+ *([\w-]*)[^\n]*\n(.*?)^\1```+ *$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block: where it begins, its language ("" for none), its text."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(text: str, page: str) -> list[Block]:
    """All fenced blocks, in order."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[2], match[3]))
    return found


def all_blocks() -> list[Block]:
    """Every block of every page."""
    return [block for page in PAGES for block in blocks_of((ROOT / page).read_text("utf-8"), page)]


def commands_of(block: Block, program: str) -> list[list[str]]:
    """Words after `program` in each line of a shell block that begins with it.

    Lines are joined at a backslash; a comment begins at # or where two blanks or more follow.
    """
    if block.language not in ("", "bash", "sh", "shell", "console"):
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\$ ", "", line.strip()).removeprefix(".venv/bin/")
        line = re.sub(r"^([A-Z_]+=\S* )+", "", line)
        if line.startswith(f"{program} "):
            line = re.split(r"(?<=\S) {2,}(?=[^-\s])", line)[0]
            words = shlex.split(line, comments=True)
            for stop in ("|", ">", "&&", "&", ";"):
                words = words[: words.index(stop)] if stop in words else words
            if "..." not in words:  # "as above, and": the reader fills that in
                found.append(words[1:])
    return found
