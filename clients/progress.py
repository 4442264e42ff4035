"""Progress of long client work: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

__all__ = ["work_progress"]

SECONDS_BETWEEN_LINES = 10.0


def work_progress(title: str) -> Callable[[int, int, float], None]:
    """A callback (steps done, steps in all, loss) that shows how far `title` is."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        bar: Any = tqdm(desc=title, leave=False, unit="step")

        def advance(done: int, total: int, loss: float) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")
            if done >= total:
                bar.close()

        return advance

    last = started

    def tell(done: int, total: int, loss: float) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < SECONDS_BETWEEN_LINES or done >= total:
            return
        last = now
        left = (now - started) / done * (total - done)
        print(
            f"{title}: step {done}/{total}, loss {loss:.4f}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell
