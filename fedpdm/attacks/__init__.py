"""Attacks on the release: linkage of uploads and a one-run audit of a client's release path."""

from fedpdm.attacks.audit import AuditReport, audit
from fedpdm.attacks.canaries import draw_game
from fedpdm.attacks.linkage import LinkageResult, linkage_attack, linkage_roc
from fedpdm.attacks.roc import roc_points

__all__ = [
    "AuditReport",
    "LinkageResult",
    "audit",
    "draw_game",
    "linkage_attack",
    "linkage_roc",
    "roc_points",
]
