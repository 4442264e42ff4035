"""`attacks.json` as tables and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpdm.reporting.attack_words import ATTACKERS
from fedpdm.reporting.page.cells import Table, is_number, number

__all__ = ["AttackGroup", "attack_groups"]


@dataclass(frozen=True, kw_only=True)
class AttackGroup:
    """Attacks of one kind: a table of scores, further tables with a caption, and notes."""

    title: str
    scores: Table | None
    tables: Sequence[tuple[str, Table]]
    lines: Sequence[str]


_SCORES = ("auc", "asr", "tpr_at_1pct", "tpr_at_01pct")


def attack_groups(attacks: Mapping[str, Any]) -> list[AttackGroup]:
    """`attacks.json`, by kind of attack, in its order."""
    by_group: dict[str, list[Mapping[str, Any]]] = {}
    for attack in attacks.get("attacks", ()):
        by_group.setdefault(str(attack.get("group", "attacks")), []).append(attack)
    groups = []
    for name, found in by_group.items():
        scored = [attack for attack in found if "scores" in attack]
        rest = [attack for attack in found if "scores" not in attack]
        rows = []
        for attack in scored:
            scores = attack["scores"]
            cells = [_interval(scores.get(key)) for key in _SCORES]
            cells.insert(2, _percent(scores.get("asr_at_chance")))
            title = str(attack.get("title") or attack.get("name", "?"))
            rows.append([str(attack.get("target", "-")), title, *cells,
                         number(scores.get("num_members"))])  # fmt: skip
        heads = ["target", "attack", "AUC %", "ASR %", "ASR by chance %", "TPR at 1% FPR, %",
                 "TPR at 0.1% FPR, %", "members"]  # fmt: skip
        groups.append(
            AttackGroup(
                title=name.replace("_", " ").capitalize(),
                scores=Table(columns=heads, rows=rows) if rows else None,
                tables=[
                    (str(attack.get("name", name)), _plain_table(attack["rows"]))
                    for attack in rest
                    if attack.get("rows")
                ],
                lines=list(
                    dict.fromkeys(str(attack["note"]) for attack in found if "note" in attack)
                ),
            )
        )
    return groups


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if is_number(value) else "-"


def _interval(estimate: Any) -> str:
    if not isinstance(estimate, Mapping):
        return _percent(estimate)
    value, low, high = (_percent(estimate.get(key)) for key in ("value", "low", "high"))
    return value if "-" in (low, high) else f"{value} ({low} to {high})"


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of plain values; what is nested (a rate beside chance) becomes columns of its own."""
    flat = []
    for row in rows:
        cells: dict[str, str] = {}
        for key, value in row.items():
            if isinstance(value, Mapping):
                cells |= {f"{key} {k}": number(v) for k, v in value.items()}
            elif not isinstance(value, list):
                cells[key] = number(ATTACKERS.get(value, value) if key == "attacker" else value)
        flat.append(cells)
    columns = list(dict.fromkeys(key for cells in flat for key in cells))
    return Table(
        columns=[key.replace("_", " ") for key in columns],
        rows=[[cells.get(key, "-") for key in columns] for cells in flat],
    )
