"""The report on attacks: `attacks.json`, ROC curves, and `summary.md`, one page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.attacks.jobs.running import EndedAttack
from fedpdm.attacks.roc import roc_points
from fedpdm.reporting.attack_words import ATTACKERS, verdicts
from fedpdm.reporting.pictures import draw_roc
from fedpdm.reporting.provenance import software_versions
from fedpdm.storage.files import write_atomic, write_json
from fedpdm.text import markdown, visible

__all__ = ["PAPER", "write_report"]

PAPER = {  # docs/method.md section 5: AUC, attack success rate, TPR at 1% FPR, percent
    "CIFAR-10": (50.01, 50.15, 0.82),
    "Colorized MNIST": (49.70, 50.10, 1.07),
    "CelebA": (50.08, 50.34, 0.86),
    "a non-private model, 1000 epochs": (82.13, 99.62, 99.59),
}
MEANING = """\
What the numbers mean. **AUC** is the chance that a member scores above a non-member: 0.5 is chance.
**ASR** is the balanced accuracy at the best threshold; it is chosen on the scores it is judged by,
so "chance" below is what guessing reaches once in 20 times. **TPR at 1% FPR** is the largest share
of members that is recognised while at most 1% of non-members are accused: 1% is chance. Intervals
are 95%. Members and non-members are equally many of each class and client. Attacks at chance say
that these attacks failed, not that none can succeed; the guarantee of a release is its epsilon.
"""


def write_report(
    done: Sequence[EndedAttack],
    out: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
) -> Path:
    """Write `attacks.json`, `roc-<target>.png` and `summary.md` into `out`; returns the last.

    `facts` are JSON: what was attacked, seeds, config. Unless a target has no curve, its curves
    are drawn on logarithmic axes.
    """
    curves = _draw_curves(done, out)
    record = {
        **facts,
        "versions": software_versions(("fedpdm", "torch", "diffusers", "numpy")),
        "attacks": [
            {
                "name": each.job.name,
                "group": each.job.group,
                "target": each.job.target,
                "seconds": each.seconds,
                "settings": dict(each.job.settings),
                **{key: value for key, value in each.result.items() if key != "curve"},
            }
            for each in done
        ],
        "pictures": [path.name for path in curves],
    }
    write_json(out / "attacks.json", record)
    text = _summary(done, record["attacks"], title=title, facts=facts, curves=curves)
    write_atomic(out / "summary.md", text.encode())
    return out / "summary.md"


def _draw_curves(done: Sequence[EndedAttack], out: Path) -> list[Path]:
    paths = []
    groups: dict[tuple[str, str], list[EndedAttack]] = {}
    for each in done:
        if "curve" in each.result:
            groups.setdefault((each.job.group, each.job.target), []).append(each)
    for (group, target), members in groups.items():
        name = re.sub(r"[^a-z0-9]+", "-", f"{group}-{target}".lower())
        path, lines, smallest = out / f"roc-{name}.png", {}, 0.1
        for each in members:
            curve = each.result["curve"]
            x, y = np.array(curve["members"]), np.array(curve["non_members"])
            area = each.result["scores"]["auc"]["value"]
            lines[f"{each.job.name.split(' on ')[0]}, AUC {area:.3f}"] = roc_points(x, y)
            smallest = min(smallest, max(1e-4, 1.0 / len(y)))
        draw_roc(path, lines, title=f"{group}, {target}", smallest=smallest)
        paths.append(path)
    return paths


def _percent(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _summary(
    done: Sequence[EndedAttack],
    attacks: Sequence[Mapping[str, Any]],
    *,
    title: str,
    facts: Mapping[str, Any],
    curves: Sequence[Path],
) -> str:
    lines = [f"# {markdown(title)}", "", visible(str(facts["what"])), "", "## Verdict", ""]
    lines += [*(f"- {markdown(one)}" for one in verdicts(attacks)), "", MEANING]
    by_group: dict[str, list[EndedAttack]] = {}
    for each in done:
        by_group.setdefault(each.job.group, []).append(each)
    if scored := [*by_group.get("membership", []), *by_group.get("linkage", [])]:
        lines += _membership_lines(scored)
    if found := by_group.get("memorisation"):
        lines += [
            "## Memorisation",
            "",
            *(f"- {d.job.name}: {d.result['headline']}" for d in found),
        ]
        lines += [
            "",
            "Flagged: the nearest training image is at most half as far as the 50 nearest are on "
            "average (Carlini et al. 2023). Held-out real images that are flagged show how alike "
            "images of this set are by nature.",
            "",
        ]
    for group, words in (
        ("reconstruction", "Reconstruction from uploads"),
        ("collusion", "Collusion of all other clients, with their published fine models"),
        ("publishing", "What publishing the own fine model costs the publisher"),
    ):
        lines += _upload_lines(by_group.get(group, []), words)
    fine = [d for d in by_group.get("membership", []) if d.job.target.startswith("fine")]
    if fine:
        worst = max(fine, key=lambda each: each.result["scores"]["auc"]["value"])
        lines += [
            "Fine models are trained without noise. Whoever gets one can attack its owner as "
            f"above: the best attack, {worst.job.name}, has AUC "
            f"{worst.result['scores']['auc']['value']:.3f}. That is a cost to the publisher alone.",
            "",
        ]
    files = ["attacks.json", *(path.name for path in curves)]
    files += [each.result["picture"] for each in done if "picture" in each.result]
    return "\n".join([*lines, f"Files: {', '.join(files)}.", ""])


def _membership_lines(scored: Sequence[EndedAttack]) -> list[str]:
    lines = [
        "## Membership inference, and linkage of uploads",
        "",
        "| target | attack | AUC % | ASR % (chance) | TPR at 1% FPR, % | TPR at 0.1%, % | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in scored:
        s = each.result["scores"]
        lines.append(
            f"| {each.job.target} | {each.result.get('title', 'linkage of uploads')} "
            f"| {_percent(s['auc'])} | {_percent(s['asr'])} ({100 * s['asr_at_chance']:.1f}) "
            f"| {_percent(s['tpr_at_1pct'])} | {_percent(s['tpr_at_01pct'])} | {s['num_members']} |"
        )
    if any(each.job.target in ("coarse", "shared") for each in scored):
        lines += [
            f"| *paper, {name}* | | {auc:.2f} | {asr:.2f} | {tpr:.2f} | | |"
            for name, (auc, asr, tpr) in PAPER.items()
        ]
    if any(each.job.group == "linkage" for each in scored):
        lines += [
            "",
            "Linkage: the server knows two images and asks which of them an upload was made from. "
            "It needs no model, and chance on the coarse model says nothing about it.",
        ]
    return [*lines, *_notes(scored), ""]


def _notes(found: Sequence[EndedAttack]) -> list[str]:
    """What results say of themselves, once each."""
    said = dict.fromkeys(str(each.result["note"]) for each in found if "note" in each.result)
    return [line for note in said for line in ("", note)]


def _upload_lines(found: Sequence[EndedAttack], words: str) -> list[str]:
    if not found:
        return []
    lines = [f"## {words}", ""]
    for each in found:
        if "rows" not in each.result:
            gain = each.result["gain"]
            lines.append(
                f"- {each.job.name}: {each.result['headline']}; the others add "
                f"{100 * gain['value']:+.1f} points of AUC "
                f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
            )
    for each in found:
        if "rows" not in each.result:
            continue
        lines += [
            "",
            f"{each.job.name}, {each.result['rows'][0]['num_images']} images, t0 = "
            f"{each.result['t0']}. Recovery: 0 is perfect, 1 as far off as the upload itself "
            "(or as the mean of the class, which needs no upload).",
            "",
            "| attacker | recovery | against the class mean | SSIM | re-identified in class |",
            "|---|---|---|---|---|",
        ]
        for row in each.result["rows"]:
            ssim = "" if row["ssim"] is None else f"{row['ssim']:.3f}"
            named = row["identification_in_class"]
            who = ATTACKERS.get(row["attacker"], row["attacker"])
            lines.append(
                f"| {who}, {row['method']} | {row['recovery']:.3f} | "
                f"{row['recovery_blind']:.3f} | {ssim} | {100 * named['rate']:.1f}% "
                f"(chance {100 * named['chance']:.1f}%) |"
            )
    return [*lines, *_notes(found), ""]
