"""What a deployed client tells its owner, on standard output: a line for each thing that it did.

Nothing of it is sent: it may speak of raw images, as the fine model's loss does. Under `fedpdm node
start` the lines stand in the node's own output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedpdm.reporting.shared_words import shared_words
from fedpdm.text import line

__all__ = ["round_words", "tell_owner"]


def tell_owner(who: str, words: str) -> None:
    """One line."""
    print(line(f"{who}: {words}"), flush=True)


def round_words(
    round: int, metrics: Mapping[str, Any], *, num_bytes: int, fine_loss: float | None
) -> str:
    """What a round of training was, from its metrics and the size of its answer."""
    parts = [f"round {round}{' again, as before' if metrics.get('replayed') else ''}"]
    parts += shared_words(metrics)
    if fine_loss is not None and math.isfinite(fine_loss):
        parts.append(f"fine loss {fine_loss:.4f}")
    parts.append(f"{num_bytes / 1e6:.1f} MB sent")
    if "seconds" in metrics:
        parts.append(f"{metrics['seconds']:.0f} s")
    return ", ".join(parts)
