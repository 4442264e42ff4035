"""Membership attacks that are fitted: the attacker knows half of the answers already.

Half of the members and half of the non-members, drawn at random, are what the attacker knows; a
classifier is fitted on them and only the other halves are scored. So there are no shadow models,
and the attacker is stronger than one who has to train them.

    SecMI (neural)   a small convolutional network on the images of SecMI's absolute errors
                     (Duan et al. 2023)
    GSA              logistic regression on the logarithms of an image's gradient norms, one per
                     parameter tensor, of the noise loss averaged over levels (Pang et al. 2023,
                     GSA1; they fit boosted trees on shadow models)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fedpdm.attacks.membership.targets import (
    AttackTarget,
    Progress,
    noise_like,
    rows_in_batches,
)

__all__ = [
    "MIN_FITTED",
    "HeldOutScores",
    "fit_gradients",
    "fit_secmi_errors",
    "gradient_features",
]

Array = NDArray[np.float64]
Index = NDArray[np.int64]

MIN_FITTED = 10  # members, and non-members: five-fold cross-validation on half of them
_TINY = 1e-12  # gradients of an image that is fitted exactly are 0
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_WIDTHS = (16, 32)
_FIT_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutScores:
    """Scores float64 of the images the attacker did not know, and their rows int64, ascending."""

    member_scores: Array
    non_member_scores: Array
    member_rows: Index
    non_member_rows: Index


def gradient_features(
    target: AttackTarget,
    x_0: torch.Tensor,
    labels: torch.Tensor,
    *,
    generator: torch.Generator,
    num_levels: int = 10,
    progress: Progress | None = None,
) -> Array:
    """log || grad_w L(x) ||_2 per parameter tensor w, float64 (N, number of tensors).

    L is the mean of (eps - eps_hat(x_t, t))^2 over `target.levels(num_levels)` and the pixels, one
    draw of the noise per level from `generator` (CPU). One backward pass per image, over all
    levels at once. Norms below 1e-12 count as that. `ValueError` for a target without parameters,
    or with one that takes no gradient.
    """
    if not target.parameters:
        raise ValueError("the gradient attack needs the target's parameters, got none")
    frozen = sum(not parameter.requires_grad for parameter in target.parameters)
    if frozen:
        raise ValueError(f"the gradient attack needs requires_grad, {frozen} parameters lack it")
    levels = torch.tensor(target.levels(num_levels), device=target.device)
    rows = []
    for x, y in rows_in_batches(target, x_0, labels, batch_size=1, progress=progress):
        each = x.expand(len(levels), *x.shape[1:])
        noise = noise_like(each, generator=generator)
        with torch.enable_grad():
            x_t = target.at_level(each, levels, noise)
            error = noise - target.noise_estimate(x_t, levels, y.expand(len(levels)))
            gradients = torch.autograd.grad(
                error.square().mean(), target.parameters, allow_unused=True, materialize_grads=True
            )
        norms = torch.stack([g.detach().double().norm() for g in gradients])
        rows.append(norms.clamp_min(_TINY).log().cpu())
    return _finite(torch.stack(rows).numpy())


def fit_gradients(
    member_features: Array, non_member_features: Array, *, rng: np.random.Generator
) -> HeldOutScores:
    """Log-odds of membership from `gradient_features` (N, F) and (M, F).

    Features are standardised; the penalty of the regression is the one of the best AUC in
    five-fold cross-validation on the known half.
    """
    known, held_out = _halves((len(member_features), len(non_member_features)), rng=rng)
    model = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": _PENALTIES},
        scoring="roc_auc",
        cv=StratifiedKFold(5, shuffle=True, random_state=int(rng.integers(2**31))),
    )
    features = np.concatenate([member_features[known[0]], non_member_features[known[1]]])
    model.fit(features, np.repeat([1, 0], [len(known[0]), len(known[1])]))
    return HeldOutScores(
        member_scores=np.asarray(model.decision_function(member_features[held_out[0]])),
        non_member_scores=np.asarray(model.decision_function(non_member_features[held_out[1]])),
        member_rows=held_out[0],
        non_member_rows=held_out[1],
    )


def fit_secmi_errors(
    member_errors: torch.Tensor,
    non_member_errors: torch.Tensor,
    *,
    rng: np.random.Generator,
    num_epochs: int = 30,
    device: torch.device | str = "cpu",
) -> HeldOutScores:
    """Log-odds of membership from `secmi_errors` (N, C, H, W) and (M, C, H, W).

    The network sees log(1 + |error| / mean of the known half), and ends in an average over
    positions. Adam, 1e-3, batches of 64, the last weights.
    """
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
    known, held_out = _halves((len(member_errors), len(non_member_errors)), rng=rng)
    maps = [errors.abs().float() for errors in (member_errors, non_member_errors)]
    fitted = torch.cat([m[rows] for m, rows in zip(maps, known, strict=True)])
    scale = float(fitted.mean()) or 1.0  # all errors 0: nothing to learn, nothing to divide
    answers = torch.tensor([1.0] * len(known[0]) + [0.0] * len(known[1]))
    seed = int(rng.integers(2**63))
    network = _error_network(fitted.shape[1], seed=seed).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    order = torch.Generator().manual_seed(seed)
    inputs, answers = (fitted / scale).log1p().to(device), answers.to(device)
    with torch.enable_grad():
        for _ in range(num_epochs):
            shuffled = torch.randperm(len(inputs), generator=order).to(device)
            for rows in shuffled.split(_FIT_BATCH):
                loss = nn.functional.binary_cross_entropy_with_logits(
                    network(inputs[rows])[:, 0], answers[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    scores = []
    with torch.no_grad():
        for values, rows in zip(maps, held_out, strict=True):
            parts = ((values[rows] / scale).log1p()).split(_FIT_BATCH)
            logits = torch.cat([network(part.to(device))[:, 0].cpu() for part in parts])
            scores.append(_finite(logits.double().numpy()))
    return HeldOutScores(
        member_scores=scores[0],
        non_member_scores=scores[1],
        member_rows=held_out[0],
        non_member_rows=held_out[1],
    )


def _error_network(channels: int, *, seed: int) -> nn.Module:
    """(B, C, H, W) -> (B, 1). Nothing normalises: the size of the errors is the signal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, _WIDTHS[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_WIDTHS[0], _WIDTHS[1], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(_WIDTHS[1], 1),
        )


def _halves(
    sizes: tuple[int, int], *, rng: np.random.Generator
) -> tuple[tuple[Index, Index], tuple[Index, Index]]:
    """((known members, known non-members), (held-out members, held-out non-members)): rows."""
    for name, size in zip(("members", "non-members"), sizes, strict=True):
        if size < MIN_FITTED:
            raise ValueError(f"a fitted attack needs at least {MIN_FITTED} {name}, got {size}")
    members, non_members = (np.array_split(rng.permutation(size), 2) for size in sizes)
    return (
        (np.sort(members[1]), np.sort(non_members[1])),
        (np.sort(members[0]), np.sort(non_members[0])),  # the larger half where a size is odd
    )


def _finite(values: Array) -> Array:
    if np.isnan(values).any():
        raise ValueError(f"the model answered NaN for {int(np.isnan(values).sum())} values")
    return values
