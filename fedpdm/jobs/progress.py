"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

__all__ = ["count_progress", "sum_progress", "work_progress"]

SECONDS_BETWEEN_LINES = 10.0


def work_progress(title: str) -> Callable[[int, int, float], None]:
    """A callback (steps done, steps in all, loss) that shows how far `title` is."""
    show = _progress(title, "step")
    return lambda done, total, loss: show(done, total, f"loss {loss:.4f}")


def count_progress(title: str, unit: str) -> Callable[[int, int], None]:
    """A callback (done, in all) for work without a loss."""
    show = _progress(title, unit)
    return lambda done, total: show(done, total, "")


def sum_progress(title: str, unit: str, total: int) -> Callable[[int], None]:
    """A callback (done since it was called last) for `total` pieces of work."""
    show, done = count_progress(title, unit), 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        show(done, total)

    return add


def _progress(title: str, unit: str) -> Callable[[int, int, str], None]:
    """What is done falls where further work begins under the same title: that counts anew."""
    started, before = time.perf_counter(), 0
    if sys.stderr.isatty():
        bar: Any = tqdm(desc=title, leave=False, unit=unit)

        def advance(done: int, total: int, note: str) -> None:
            nonlocal bar
            if done < bar.n:
                bar.close()
                bar = tqdm(desc=title, leave=False, unit=unit)
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(note)
            if done >= total:
                bar.close()

        return advance

    last = called = started

    def tell(done: int, total: int, note: str) -> None:
        nonlocal last, called, started, before
        now = time.perf_counter()
        if done < before:
            started = called
        before, called = done, now
        if now - last < SECONDS_BETWEEN_LINES or done >= total:
            return
        last = now
        left = (now - started) / done * (total - done)
        print(
            f"{title}: {unit} {done}/{total}, {note + ', ' if note else ''}{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell
