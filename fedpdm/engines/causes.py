"""Why a run of Flower failed, from what was logged: the cause, not that there was one.

Flower and Ray report a failure several times over: the exception, exceptions that wrap it, and
boxes and lines which say that an error was encountered. The first is what a reader needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpdm.text import line

__all__ = ["last_error"]

NOTHING = "no error was printed"
LONGEST = 400
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# `(ClientAppActor pid=7, ip=...) `, `2026-11-30 20:50:44,1 `, the frame of a box.
_BEFORE = re.compile(r"^(?:\([^()]*\) +|\d{4}-\d\d-\d\d[ T][\d:,.]+ +|[│|] *)*")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failure|Failed|Refusal)\b")
_LOGGED = re.compile(r"^(?:ERROR|CRITICAL|FATAL)\b[\s:\]]*|^Error: ")
_BOX = re.compile(r"^╭─+ *Error\b.*?$\n(.*?)^╰", re.MULTILINE | re.DOTALL)
# What the machine did to the run: whatever is logged after it follows from it.
_MACHINE = re.compile(
    r"AF_UNIX path|killed due to memory pressure|OutOfMemory|CUDA out of memory|No space left on"
    r"|Too many open files|Cannot allocate memory"
)
_EMPTY = re.compile(
    r"\b(?:error|exception)s? (?:was|were|has been|occurred|is) ?(?:encountered|raised|thrown)?"
    r"|\bSee (?:the )?logs?\b|terminated by|^Traceback|^(?:\w+\.)*Exception:?$|exited with code"
    r"|^\S*(?:RuntimeError|Exception): *(?:ServerApp|ClientApp|The simulation|Simulation)\b",
    re.IGNORECASE,
)
_CHAINED = re.compile(r"^(?:During handling of the above|The above exception was the direct cause)")


def last_error(log: Path, *others: Path) -> str:
    """The cause of the last failure in a log, in one line.

    `others` are logs to which it may point (they may be missing): where it names no cause itself,
    theirs is taken, and else the last thing that was said of an error.
    """
    texts = [_text(path) for path in (log, *others)]
    for find in (_machine, _cause):
        for text in texts:
            if (found := find(text)) is not None:
                return line(found, limit=LONGEST)
    said = [one for text in texts for one in _said(text)]
    return line(said[-1], limit=LONGEST) if said else NOTHING


def _text(path: Path) -> str:
    try:
        return _COLOUR.sub("", path.read_bytes().decode(errors="replace"))
    except OSError:
        return ""


def _lines(text: str) -> list[str]:
    return [_BEFORE.sub("", each.strip()).rstrip(" │") for each in text.split("\n")]


def _machine(text: str) -> str | None:
    found = [each for each in _lines(text) if _MACHINE.search(each)]
    return found[0] if found else None


def _cause(text: str) -> str | None:
    """The last exception that says something, or that which it was raised from; else the last
    logged error that says something."""
    lines = _lines(text)
    places = [at for at, each in enumerate(lines) if _EXCEPTION.match(each)]
    telling = [at for at in places if not _EMPTY.search(lines[at])]
    if not telling:
        logged = [one for one in _said(text) if not _EMPTY.search(one)]
        return logged[-1] if logged else None
    at = telling[-1]
    for before in reversed([place for place in telling if place < at]):
        if not _is_chained(lines[before + 1 : at]):
            break
        at = before
    return lines[at]


def _is_chained(between: Sequence[str]) -> bool:
    return any(_CHAINED.match(each) for each in between)


def _said(text: str) -> Iterator[str]:
    """What boxes and log lines say of errors."""
    for box in _BOX.findall(text):
        yield " ".join(_lines(box))
    for each in _lines(text):
        if _LOGGED.match(each) and (rest := _LOGGED.sub("", each).strip()):
            yield each if each.startswith("Error: ") else rest
        elif ("Error" in each or "Failure" in each) and not each.startswith("╭"):
            yield each
