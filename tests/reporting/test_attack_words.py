"""The verdict on attacks."""

from __future__ import annotations

from typing import Any

from fedpdm.reporting.attack_words import verdicts


def attack(title: str, low: float, value: float, **changes: Any) -> dict[str, Any]:
    auc = {"value": value, "low": low, "high": 2 * value - low}
    return {"group": "membership", "target": "coarse", "title": title,
            "scores": {"auc": auc}, **changes}  # fmt: skip


def test_at_chance_and_not() -> None:
    found = verdicts([
        attack("PIA", 0.49, 0.51), attack("SecMI", 0.46, 0.48),
        attack("GSA", 0.9, 0.95, target="fine of client 0"),
        attack("linkage", 0.7, 0.75, group="linkage", target="client 0"),
    ])  # fmt: skip
    assert found == [
        "membership on coarse: at chance: members are not recognised; the best of 2 attacks, PIA, "
        "has AUC 51.0% (49.0 to 53.0; 50 is chance).",
        "membership on fine of client 0: MEMBERS ARE RECOGNISED; GSA has AUC 95.0% (90.0 to 100.0; "
        "50 is chance).",
        "linkage on client 0: uploads are told apart; linkage has AUC 75.0% (70.0 to 80.0; 50 is "
        "chance).",
    ]


def test_the_best_of_many_is_held_to_the_best_of_many() -> None:
    one = attack("PIA", 0.501, 0.521)
    assert "RECOGNISED" in verdicts([one])[0]
    assert "at chance" in verdicts([one, *(attack(str(k), 0.48, 0.5) for k in range(9))])[0]


def test_headlines_and_what_cannot_be_read() -> None:
    found: list[dict[str, Any]] = [
        {"name": "copies", "headline": "0 of 10 samples flagged"},
        {"name": "odd", "scores": {"auc": None}},
        {"name": "odder", "scores": "none"},
        attack("plain", 0, 0, scores={"auc": 0.4}),
    ]
    assert verdicts(found) == [
        "membership on coarse: at chance: members are not recognised; plain has AUC 40.0% (40.0 to "
        "40.0; 50 is chance).",
        "copies: 0 of 10 samples flagged.",
    ]
    assert verdicts([]) == []
