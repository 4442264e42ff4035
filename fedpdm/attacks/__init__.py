"""Attacks on what leaves a client: how much of a clipped image a release gives away.

`linkage_attack` measures the server's best guess on real images, `audit` judges a release
path with canaries (`draw_game`), `bounds` turns right guesses into lower bounds on epsilon, `roc`
into rates. `sum_linkage` and `sum_auditing` do the same with class statistics. They see images and
releases, never a run config.

It imports `data`, `diffusion` and `privacy`; `jobs` runs the attacks on a finished run and may also
import `setup`, `evaluation`, `reporting` and `clients`. `api` and `commands` import this room.
"""

from fedpdm.attacks.auditing import AuditReport, audit, residuals
from fedpdm.attacks.bounds import (
    best_num_guesses,
    epsilon_of_mu,
    gaussian_mu_bound,
    independent_mu_bound,
    independent_p_value,
    mu_of_epsilon,
    steinke_epsilon_bound,
)
from fedpdm.attacks.canaries import CanaryGame, GameScores, Guesses, draw_game, score_game
from fedpdm.attacks.linkage import (
    LinkageResult,
    LinkageSummary,
    linkage_attack,
    linkage_auc,
    linkage_roc,
    linkage_tpr,
    worst_case_linkage,
)
from fedpdm.attacks.noisechecks import SIGNIFICANCE, Finding
from fedpdm.attacks.roc import auc, auc_interval, roc_points, tpr_at_fpr

__all__ = [
    "SIGNIFICANCE",
    "AuditReport",
    "CanaryGame",
    "Finding",
    "GameScores",
    "Guesses",
    "LinkageResult",
    "LinkageSummary",
    "auc",
    "auc_interval",
    "audit",
    "best_num_guesses",
    "draw_game",
    "epsilon_of_mu",
    "gaussian_mu_bound",
    "independent_mu_bound",
    "independent_p_value",
    "linkage_attack",
    "linkage_auc",
    "linkage_roc",
    "linkage_tpr",
    "mu_of_epsilon",
    "residuals",
    "roc_points",
    "score_game",
    "steinke_epsilon_bound",
    "tpr_at_fpr",
    "worst_case_linkage",
]
