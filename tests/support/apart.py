"""Commands and scripts in a process of their own that starts at once.

It is forked from one that has imported the libraries (`fedpdm.jobs.processes`). Where a test is
about the start of a program itself, it uses `subprocess`.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedpdm.jobs.processes import OwnProcess

__all__ = ["Apart", "run_apart", "start_apart"]

Apart = OwnProcess[list[str]]


def _work(words: list[str]) -> int:
    os.chdir(words[0])
    if not words[1].endswith(".py"):
        from fedpdm.cli import main

        return main(words[1:])
    sys.argv = words[1:]
    sys.path.insert(0, os.path.dirname(words[1]))
    runpy.run_path(words[1], run_name="__main__")
    return 0


def start_apart(
    *words: Any,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    hear: Callable[[str], None] = lambda line: None,
) -> Apart:
    """`fedpdm WORDS`, or a script (`*.py`) and its arguments; without settings of who runs tests.

    `hear` gets each line of its output while something waits for it or reads it.
    """
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("FEDPDM_")}
    return Apart(
        [str(directory or Path.cwd()), *map(str, words)],
        _work,
        environment={**surroundings, **(environment or {})},
        hear=hear,
    )


def run_apart(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """What `start_apart` does, to its end."""
    printed: list[str] = []
    process = start_apart(*words, **options, hear=printed.append)
    code = process.end()
    texts = ["".join(f"{line}\n" for line in lines) for lines in (printed, process.errors)]
    return subprocess.CompletedProcess(list(words), code, *texts)


def wait_until(there: Callable[[], object], process: Apart, *, seconds: float = 120.0) -> None:
    """Until something is there, the process ends, or the time is over."""
    deadline = time.monotonic() + seconds
    while not there() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
