"""The membership attacks by name, and one attack on one target."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.membership.learned import (
    HeldOutScores,
    fit_gradients,
    fit_secmi_errors,
    gradient_features,
)
from fedpdm.attacks.membership.scores import MembershipScores, membership_scores
from fedpdm.attacks.membership.statistics import (
    score_clid,
    score_loss,
    score_pia,
    score_secmi,
    secmi_errors,
    secmi_levels,
)
from fedpdm.attacks.membership.targets import AttackTarget, Progress, check_images

__all__ = ["ATTACKS", "AttackSpec", "MembershipResult", "run_membership"]


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """An attack: what it needs, its usual parameters and where it is from.

    `fitted`: it learns from half of the images and scores the other half.
    """

    title: str
    source: str
    parameters: Mapping[str, float]
    needs_labels: bool = False
    needs_gradients: bool = False
    fitted: bool = False


ATTACKS: Mapping[str, AttackSpec] = {
    "loss": AttackSpec(
        title="loss threshold",
        source="Matsumoto et al. 2023",
        parameters={"t": 200, "num_draws": 8},
    ),
    "pia": AttackSpec(
        title="PIA",
        source="Kong et al. 2024",
        parameters={"t": 200, "norm": 4.0},
    ),
    "pian": AttackSpec(
        title="PIAN",
        source="Kong et al. 2024",
        # At t = 200, PIA's, it finds little on our control: a network that knows an image answers
        # next to nothing to it, and this scaled up is unlike noise (docs/attacks.md).
        parameters={"t": 50, "norm": 4.0},
    ),
    "secmi": AttackSpec(
        title="SecMI, statistic",
        source="Duan et al. 2023",
        parameters={"t": 100, "step": 10},
    ),
    "secmi_neural": AttackSpec(
        title="SecMI, neural",
        source="Duan et al. 2023",
        parameters={"t": 100, "step": 10, "num_epochs": 30},
        fitted=True,
    ),
    "clid": AttackSpec(
        title="label-conditional (CLiD)",
        source="Zhai et al. 2024",
        parameters={"num_levels": 10, "num_draws": 4},
        needs_labels=True,
    ),
    "gsa": AttackSpec(
        title="gradients (GSA)",
        source="Pang et al. 2023",
        parameters={"num_levels": 10},
        needs_gradients=True,
        fitted=True,
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class MembershipResult:
    """One attack on one target.

    Attributes:
        attack: a name of `ATTACKS`.
        member_scores, non_member_scores: float64, high meaning member, of the images in
            member_rows, non_member_rows (int64, ascending): all of them, or the halves that the
            attacker did not know.
        parameters: as used, JSON; where a level was moved into the target's range, `t` is the one
            used and `requested_t` the one asked for.
        scores: rates and their intervals.
    """

    attack: str
    member_scores: NDArray[np.float64]
    non_member_scores: NDArray[np.float64]
    member_rows: NDArray[np.int64]
    non_member_rows: NDArray[np.int64]
    parameters: dict[str, Any]
    scores: MembershipScores


def run_membership(
    target: AttackTarget,
    members: torch.Tensor,
    member_labels: torch.Tensor,
    non_members: torch.Tensor,
    non_member_labels: torch.Tensor,
    *,
    attack: str,
    seed: np.random.SeedSequence,
    parameters: Mapping[str, float] | None = None,
    batch_size: int = 256,
    num_bootstrap: int = 1000,
    progress: Progress | None = None,
) -> MembershipResult:
    """Score members and non-members of a target with one attack.

    Args:
        members, non_members: (N, C, H, W) and (M, C, H, W), at the target's scale; with labels
            int (N,) and (M,), `NO_LABEL` where there is none.
        attack: a name of `ATTACKS`.
        seed: of all draws: noise, halves, fits and resamples; equal seeds repeat the result.
        parameters: in place of the attack's usual ones.
        batch_size: images per question to the model (gradients: one); changes no draw.
        progress: called with (images done, N + M) after every batch.

    Raises:
        ValueError: for an unknown attack or parameter, wrong shapes, a target that lacks what the
            attack needs, too few images to fit on, or NaN.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")
    usual = dict(ATTACKS[attack].parameters)
    unknown = sorted(set(parameters or {}) - set(usual))
    if unknown:
        raise ValueError(
            f"attack {attack}: parameters are {', '.join(usual)}, got {', '.join(unknown)}"
        )
    chosen: dict[str, Any] = {**usual, **(parameters or {})}
    check_images(members, member_labels, name="members")
    check_images(non_members, non_member_labels, name="non_members")
    if members.shape[1:] != non_members.shape[1:]:
        raise ValueError(
            "members and non_members must have one image shape, got "
            f"{tuple(members.shape[1:])} and {tuple(non_members.shape[1:])}"
        )
    total = len(members) + len(non_members)
    both = [(members, member_labels, 0), (non_members, non_member_labels, len(members))]

    def ask(question: Callable[..., Any], *, draws: bool, batched: bool = True) -> list[Any]:
        answers = []
        for index, (x_0, labels, done) in enumerate(both):
            extra: dict[str, Any] = {"generator": _torch_generator(seed, index)} if draws else {}
            if batched:
                extra["batch_size"] = batch_size
            if progress is not None:
                extra["progress"] = _shifted(progress, done, total)
            answers.append(question(target, x_0, labels, **asked, **extra))
        return answers

    fit_rng = np.random.default_rng(_child(seed, 2))
    asked = {name: value for name, value in chosen.items() if name != "num_epochs"}
    if attack == "gsa":
        found = fit_gradients(*ask(gradient_features, draws=True, batched=False), rng=fit_rng)
    elif attack == "secmi_neural":
        found = fit_secmi_errors(
            *ask(secmi_errors, draws=False),
            rng=fit_rng,
            num_epochs=chosen["num_epochs"],
            device=target.device,
        )
    else:
        question, draws = _STATISTICS[attack]
        member_scores, non_member_scores = ask(question, draws=draws)
        found = HeldOutScores(
            member_scores=member_scores,
            non_member_scores=non_member_scores,
            member_rows=np.arange(len(members)),
            non_member_rows=np.arange(len(non_members)),
        )
    return MembershipResult(
        attack=attack,
        member_scores=found.member_scores,
        non_member_scores=found.non_member_scores,
        member_rows=found.member_rows,
        non_member_rows=found.non_member_rows,
        parameters=_as_used(target, attack, chosen),
        scores=membership_scores(
            found.member_scores,
            found.non_member_scores,
            rng=np.random.default_rng(_child(seed, 3)),
            num_bootstrap=num_bootstrap,
        ),
    )


_STATISTICS: Mapping[str, tuple[Callable[..., NDArray[np.float64]], bool]] = {  # (of, draws noise)
    "loss": (score_loss, True),
    "pia": (score_pia, False),
    "pian": (functools.partial(score_pia, rescale=True), False),
    "secmi": (score_secmi, False),
    "clid": (score_clid, True),
}


def _as_used(target: AttackTarget, attack: str, chosen: dict[str, Any]) -> dict[str, Any]:
    used = {**chosen, "t_range": list(target.t_range)}
    if "step" in chosen:
        levels = secmi_levels(target, t=chosen["t"], step=chosen["step"])
        used |= {"t": levels[-2], "step": levels[-1] - levels[-2], "requested_t": chosen["t"]}
    elif "t" in chosen:
        used |= {"t": target.nearest(chosen["t"]), "requested_t": chosen["t"]}
    if "num_levels" in chosen:
        used["levels"] = list(target.levels(chosen["num_levels"]))
    if attack in ("pia", "pian"):
        used["first_t"] = target.t_range[0]
    return used


def _child(seed: np.random.SeedSequence, index: int) -> np.random.SeedSequence:
    """As `seed.spawn`, but the same child at every call."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, index))


def _torch_generator(seed: np.random.SeedSequence, index: int) -> torch.Generator:
    state = int(_child(seed, index).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & 0x7FFF_FFFF_FFFF_FFFF)


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    def report(here: int, _: int) -> None:
        progress(done + here, total)

    return report
