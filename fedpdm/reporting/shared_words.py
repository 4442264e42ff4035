"""What is said of the shared model in a round: what it knows, or its losses where that is unknown.

The loss on releases is nearly all noise and hardly moves, so it is not what is shown first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["EXPLANATION", "percent", "shared_words"]

EXPLANATION = (
    "knows: what the shared model's guesses gain on noised images, as a share of what a model "
    "would gain that knew each image exactly. 0% is a plain image, below 0% worse than that; 100% "
    "cannot be reached. Of few images the noise decides. Its loss hardly moves, for it is nearly "
    "all noise (metrics.json has it)."
)
_KNOWN = (("coarse_known", "shared model knows"), ("heldout_coarse_known", "held-out"))
_LOSSES = (("coarse_loss", "coarse loss"), ("heldout_coarse_loss", "held-out"))


def percent(share: float) -> str:
    """A share as it is shown; beyond 100% either way it is the noise of few images."""
    return f"{100 * share:.1f}%" if abs(share) <= 1.0 else "unclear (few images, much noise)"


def shared_words(record: Mapping[str, Any]) -> list[str]:
    """Parts of a line about a round's record, or a final evaluation."""
    present = [(name, words) for name, words in _KNOWN if record.get(name) is not None]
    if present:
        return [f"{words} {percent(record[name])}" for name, words in present]
    return [f"{w} {record[name]:.4f}" for name, w in _LOSSES if record.get(name) is not None]
