"""Membership inference: was this image in the training set of that model?

`run_membership` asks with one of `ATTACKS` about an `AttackTarget`, which is any denoiser with its
schedule. An attack means something beside its controls: a model that was overfitted on purpose,
where it must succeed, and one that never saw the members, where it must not.
"""

from fedpdm.attacks.membership.learned import (
    MIN_FITTED,
    HeldOutScores,
    fit_gradients,
    fit_secmi_errors,
    gradient_features,
)
from fedpdm.attacks.membership.running import (
    ATTACKS,
    AttackSpec,
    MembershipResult,
    run_membership,
)
from fedpdm.attacks.membership.scores import (
    Estimate,
    MembershipScores,
    asr_at_chance,
    membership_scores,
)
from fedpdm.attacks.membership.statistics import (
    score_clid,
    score_loss,
    score_pia,
    score_secmi,
    secmi_errors,
    secmi_levels,
)
from fedpdm.attacks.membership.targets import AttackTarget, Progress

__all__ = [
    "ATTACKS",
    "MIN_FITTED",
    "AttackSpec",
    "AttackTarget",
    "Estimate",
    "HeldOutScores",
    "MembershipResult",
    "MembershipScores",
    "Progress",
    "asr_at_chance",
    "fit_gradients",
    "fit_secmi_errors",
    "gradient_features",
    "membership_scores",
    "run_membership",
    "score_clid",
    "score_loss",
    "score_pia",
    "score_secmi",
    "secmi_errors",
    "secmi_levels",
]
