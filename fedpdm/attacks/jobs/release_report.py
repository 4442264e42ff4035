"""What attacks on the release found, in words and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from fedpdm.attacks.auditing import AuditReport
from fedpdm.attacks.linkage import LinkageResult, linkage_roc
from fedpdm.attacks.roc import roc_points
from fedpdm.attacks.sum_linkage import SumLinkage
from fedpdm.reporting.pictures import draw_roc

__all__ = [
    "audit_text",
    "draw_linkage",
    "draw_sum_linkage",
    "linkage_text",
    "sum_linkage_text",
]


def linkage_text(facts: dict[str, Any]) -> str:
    """The measured curve beside theory and the worst case; `facts` as in `linkage.json`."""
    low, high = facts["auc_low"], facts["auc_high"]
    middle = facts["distance_quantiles"][3]
    return "\n".join(
        (
            f"Linkage of uploads, {facts['num_pairs']:,} pairs of {facts['data']} (seed "
            f"{facts['seed']}), t0 = {facts['t0']}, clip norm {facts['clip_norm']:g} around "
            f"{facts['shift']:g}, sigma {facts['sigma']:.4g}",
            f"{'':<34}{'measured':>10}{'analytic':>10}{'worst case':>12}",
            f"{'AUC':<34}{facts['auc']:>10.4f}{facts['auc_analytic']:>10.4f}"
            f"{facts['worst_auc']:>12.4f}",
            f"{'TPR at ' + format(facts['fpr'], '.0%') + ' FPR':<34}{facts['tpr']:>10.4f}"
            f"{facts['tpr_analytic']:>10.4f}{facts['worst_tpr']:>12.4f}",
            f"{facts['confidence']:.0%} interval of the AUC: {low:.4f} to {high:.4f}, the analytic "
            f"value is {'inside' if facts['agrees'] else 'OUTSIDE'}",
            f"median distance of a pair after clipping: {middle:.4g}; the worst case is two images "
            f"at {2 * facts['clip_norm']:g}",
            "This is what a server can do that knows both images and asks which was uploaded.",
        )
    )


def draw_linkage(result: LinkageResult, path: Path, facts: dict[str, Any]) -> None:
    """ROC curves on logarithmic axes: measured, by theory, worst case."""
    fpr = np.geomspace(1e-6, 1.0, 400)[:-1]
    ratio = 2.0 * facts["clip_norm"] / facts["sigma"]
    draw_roc(
        path,
        {
            f"measured, AUC {facts['auc']:.3f}": roc_points(result.positive, result.negative),
            f"analytic, AUC {facts['auc_analytic']:.3f}": linkage_roc(
                result.distances, sigma=facts["sigma"]
            ),
            f"worst case, AUC {facts['worst_auc']:.3f}": (
                fpr,
                special.ndtr(special.ndtri(fpr) + ratio),
            ),
        },
        title=f"Linkage of uploads, {facts['data']}, t0 = {facts['t0']}, "
        f"clip norm {facts['clip_norm']:g}",
        smallest=max(1e-4, 2.0 / facts["num_pairs"]),
    )


def sum_linkage_text(facts: dict[str, Any]) -> str:
    """Of class statistics, together and round by round; `facts` as in `linkage.json`."""
    low, high = facts["auc_low"], facts["auc_high"]
    return "\n".join(
        (
            f"Linkage of class statistics, {facts['num_releases']:,} releases of each of two sets "
            f"of {facts['num_images']:,} images of {facts['data']} that differ in one (seed "
            f"{facts['seed']})",
            f"{'':<34}{'measured':>10}{'analytic':>10}{'worst case':>12}",
            f"{'AUC':<34}{facts['auc']:>10.4f}{facts['auc_analytic']:>10.4f}"
            f"{facts['worst_auc']:>12.4f}",
            f"{'TPR at ' + format(facts['fpr'], '.0%') + ' FPR':<34}{facts['tpr']:>10.4f}"
            f"{facts['tpr_analytic']:>10.4f}{facts['worst_tpr']:>12.4f}",
            *(
                f"{'AUC of ' + stage + ' alone':<34}{measured:>10.4f}{analytic:>10.4f}"
                for stage, _, measured, analytic in facts["rounds"]
            ),
            f"{facts['confidence']:.0%} interval of the AUC: {low:.4f} to {high:.4f}, the analytic "
            f"value is {'inside' if facts['agrees'] else 'OUTSIDE'}",
            f"the pair is {facts['reached_mu']:.4g} standard deviations apart; the worst case is "
            f"mu = {facts['mu']:.4g}",
            "This is what a server can do that knows all images but one, and that one's two "
            "candidates.",
        )
    )


def draw_sum_linkage(result: SumLinkage, path: Path, facts: dict[str, Any]) -> None:
    """ROC curves on logarithmic axes: measured, by theory, worst case."""
    fpr = np.geomspace(1e-6, 1.0, 400)[:-1]
    by_mu = {
        f"{name}, AUC {facts[key]:.3f}": (fpr, special.ndtr(special.ndtri(fpr) + facts[mu]))
        for name, key, mu in (
            ("analytic", "auc_analytic", "reached_mu"),
            ("worst case", "worst_auc", "mu"),
        )
    }
    measured = {f"measured, AUC {facts['auc']:.3f}": roc_points(result.positive, result.negative)}
    draw_roc(
        path,
        measured | by_mu,
        title=f"Linkage of class statistics, {facts['data']}",
        smallest=max(1e-4, 1.0 / facts["num_releases"]),
    )


def audit_text(report: AuditReport, *, seed: int) -> str:
    """Bounds and findings, a line each, and the verdict."""
    shape = "x".join(map(str, report.image_shape))
    made = report.guesses
    lines = [
        f"One-run audit, {made.num_canaries:,} canaries of {shape} (seed {seed}); "
        f"{report.num_uploads} uploads, {report.num_distinct} distinct, {report.recorded} in the "
        "ledger",
        f"  claimed epsilon at delta {report.delta:g}        {report.claimed_epsilon:8.4f}",
        f"  lower bounds at {made.confidence:.0%} confidence:",
        f"    one run, any mechanism (Steinke)     {report.epsilon_steinke:8.4f}   "
        f"({made.num_right} of the {made.num_guesses} surest guesses right)",
        f"    one run, Gaussian DP (Mahloujifar)   {report.epsilon_gaussian:8.4f}",
        f"    images noised independently          {report.epsilon_independent:8.4f}   "
        f"({made.num_right_of_all} of {made.num_canaries} right, {report.accuracy:.4f}; theory "
        f"{report.expected_accuracy:.4f})",
        f"  canaries are {report.distance_ratio:.3f} of the largest possible distance apart",
        "  checks:",
    ]
    for finding in report.findings:
        chance = "" if finding.p_value is None else f" (p = {finding.p_value:.2g})"
        verdict = "ok  " if finding.passed else "FAIL"
        lines.append(f"    {verdict} {finding.name}: {finding.seen}{chance}")
    verdict = "keeps to" if report.passed else "LEAKS MORE THAN"
    lines.append(f"  the release {verdict} what its ledger says")
    return "\n".join(lines)
