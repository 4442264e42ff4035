"""What attacks found, a line each: `attacks.json` for people who will not read its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Final

__all__ = ["ATTACKERS", "verdicts"]

#: Attackers of a reconstruction that are no model, as they are shown.
ATTACKERS: Final[Mapping[str, str]] = {
    "none": "the upload alone",
    "blind": "the mean of the class",
}


def verdicts(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each target of membership attacks and linkage, and for each other attack.

    `attacks` are those of `attacks.json`. Where several attacks were tried on a target, the best of
    them is held to what the best of so many reaches by chance.
    """
    scored: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in attacks:
        if _auc(each) is not None:
            key = (str(each.get("group", "attack")), str(each.get("target", "-")))
            scored.setdefault(key, []).append(each)
    lines = [_scored(group, target, found) for (group, target), found in scored.items()]
    lines += [
        f"{each.get('name', 'attack')}: {each['headline']}."
        for each in attacks
        if _auc(each) is None and "headline" in each
    ]
    return lines


def _scored(group: str, target: str, found: Sequence[Mapping[str, Any]]) -> str:
    best = max(found, key=lambda each: _auc(each) or (0.0,))
    value, low, high = _auc(best) or (0.5, 0.5, 0.5)
    wide = NormalDist().inv_cdf(1 - 0.025 / len(found)) / NormalDist().inv_cdf(0.975)
    above = value - wide * (value - low) > 0.5
    name = str(best.get("title") or best.get("name", "attack"))
    tried = f"the best of {len(found)} attacks, {name}," if len(found) > 1 else f"{name}"
    if group == "linkage":
        words = "uploads are told apart" if above else "at chance: uploads are not told apart"
    else:
        words = "MEMBERS ARE RECOGNISED" if above else "at chance: members are not recognised"
    return (
        f"{group} on {target}: {words}; {tried} has AUC {100 * value:.1f}% "
        f"({100 * low:.1f} to {100 * high:.1f}; 50 is chance)."
    )


def _auc(attack: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Value, low and high, where a plain number is all three; None without a number."""
    scores = attack.get("scores")
    auc = scores.get("auc") if isinstance(scores, Mapping) else None
    given = auc if isinstance(auc, Mapping) else {"value": auc}
    value = given.get("value")
    three = [value, given.get("low", value), given.get("high", value)]
    numbers = [float(x) for x in three if isinstance(x, int | float) and math.isfinite(x)]
    if len(numbers) < len(three):
        return None
    return numbers[0], numbers[1], numbers[2]
