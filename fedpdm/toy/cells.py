"""One cell of the toy's experiment: a problem, its fits and what was measured, as plain rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.diffusion.gmm import make_mixture, spectrum_variances
from fedpdm.diffusion.schedule import NoiseSchedule, make_schedule
from fedpdm.toy.federation import Models, Problem, client_counts
from fedpdm.toy.fitting import Clients, fit_linear, train_models
from fedpdm.toy.measure import Estimate, measure, ratio_of_means
from fedpdm.toy.theory import expected_w2, sigma2_at

__all__ = [
    "MAJORITY",
    "MINORITY",
    "SAMPLERS",
    "Cell",
    "at",
    "build_problem",
    "run_cell",
    "theory_ratio",
    "toy_schedule",
]

MAJORITY, MINORITY = 0, 1  # of client 0, see `client_counts`

SAMPLERS = {"ancestral": "ddpm", "flow": "ddim"}
"""Kind, as in `fedpdm.toy.theory` -> scheduler."""
FLOW_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything that a cell's rows depend on.

    `sweep` and `x` say where the rows belong; with several `t0`, each has its `x`, the points are
    the same, and what does not depend on releases is measured once. `fit` is closed, linear or
    mlp; `replicates` are independent federations, with `one_by_one` each with a seed of its own,
    which the trained fits need. `ancestral_steps` None takes every step.
    """

    sweep: str
    x: tuple[float, ...]
    classes: int
    dim: int
    radius: float
    spectrum: str
    exponent: float
    clients: int
    minority: int
    total: int
    num_steps: int
    t0: tuple[int, ...]
    clip_norm: float
    chain: str = "truncated"
    fit: str = "closed"
    samplers: tuple[str, ...] = ("ancestral",)
    methods: tuple[str, ...] = ("alone", "pfdm")
    labels: tuple[int, ...] = (MINORITY,)
    replicates: int = 64
    samples: int = 250
    ancestral_steps: int | None = None
    training_steps: int = 1000
    matching: bool = False
    one_by_one: bool = False
    seed: int = 0

    def key(self) -> str:
        """A name for the cell's results: equal keys have equal rows."""
        return repr(self)


def toy_schedule(num_steps: int) -> NoiseSchedule:
    """DDPM's linear schedule, with betas scaled so that the noise at T does not depend on T.

    1e-4 to 0.02 at T = 1000; T of at least 100.
    """
    scale = 1000.0 / num_steps
    return make_schedule(
        "linear", num_steps=num_steps, beta_start=1e-4 * scale, beta_end=0.02 * scale
    )


def build_problem(cell: Cell, t0: int) -> Problem:
    """The cell's mixture and split, released at t0. `ValueError` for numbers that do not fit."""
    return Problem(
        mixture=make_mixture(
            num_classes=cell.classes,
            radius=cell.radius,
            variances=spectrum_variances(cell.spectrum, cell.dim, exponent=cell.exponent),
        ),
        counts=client_counts(
            num_clients=cell.clients,
            num_classes=cell.classes,
            num_minority=cell.minority,
            num_all=cell.total,
        ),
        schedule=toy_schedule(cell.num_steps),
        t0=t0,
        clip_norm=cell.clip_norm,
        chain=cell.chain,
    )


def _fits(cell: Cell, problem: Problem) -> list[tuple[Models, int]]:
    """(models, how many replicates they hold)."""
    if cell.fit == "closed" and not cell.one_by_one:
        clients = Clients.draw(problem, replicates=cell.replicates, seed=cell.seed)
        return [(fit_linear(clients), cell.replicates)]
    found = []
    for replicate in range(cell.replicates):
        seed = cell.seed + replicate
        clients = Clients.draw(problem, replicates=1, seed=seed)
        if cell.fit == "closed":
            models = fit_linear(clients)
        else:
            models = train_models(clients, kind=cell.fit, num_steps=cell.training_steps, seed=seed)
        found.append((models, 1))
    return found


def run_cell(cell: Cell) -> list[dict[str, Any]]:
    """Rows of plain numbers: one per t0, class, sampler and method.

    `w2` and its interval are means over the replicates, `ratio` is over training alone, both
    beside `theory_w2` and `theory_ratio` where a closed form holds (else None); `w2_matched` is by
    exact assignment.
    """
    rows = []
    same: dict[tuple[int, str, str], _Values] = {}  # of methods that no release enters
    for x, t0 in zip(cell.x, cell.t0, strict=True):
        problem = build_problem(cell, t0)
        fits = _fits(cell, problem)
        for label, sampler in itertools.product(cell.labels, cell.samplers):
            found = {}
            for method in cell.methods:
                key = (label, sampler, method)
                values = same.get(key) or _measure(cell, problem, fits, *key)
                if method in ("alone", "central"):
                    same[key] = values
                found[method] = values
            rows += [
                {"sweep": cell.sweep, "x": x, **_row(cell, problem, label, sampler, method, found)}
                for method in cell.methods
            ]
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Values:
    """Squared distances per replicate, (R,); `matched` is empty if not asked for."""

    gaussian: NDArray[np.float64]
    matched: NDArray[np.float64]
    theory: float | None


def _measure(
    cell: Cell,
    problem: Problem,
    fits: list[tuple[Models, int]],
    label: int,
    sampler: str,
    method: str,
) -> _Values:
    parts = [
        measure(
            problem,
            models,
            method,
            label=label,
            replicates=count,
            num_samples=cell.samples,
            seed=cell.seed + 1 + index,
            scheduler=SAMPLERS[sampler],
            num_steps=FLOW_STEPS if sampler == "flow" else cell.ancestral_steps,
            matching=cell.matching,
        )
        for index, (models, count) in enumerate(fits)
    ]
    theory = None
    if cell.fit != "mlp" and method != "coarse":
        theory = expected_w2(
            method,
            mean=problem.mixture.means[label],
            variances=problem.mixture.variances[label],
            num_own=int(problem.counts[0, label]),
            num_all=int(problem.counts[:, label].sum()),
            sigma2=problem.sigma2,
            sigma2_T=sigma2_at(problem.schedule.alpha_bar(problem.schedule.num_steps)),
            kind=sampler,
        )
    matched = [part.assignment for part in parts if part.assignment is not None]
    return _Values(
        gaussian=np.concatenate([part.gaussian for part in parts]),
        matched=np.concatenate(matched) if matched else np.empty(0),
        theory=theory,
    )


def _row(
    cell: Cell,
    problem: Problem,
    label: int,
    sampler: str,
    method: str,
    found: Mapping[str, _Values],
) -> dict[str, Any]:
    values = found[method]
    w2 = Estimate.of(values.gaussian)
    row: dict[str, Any] = {
        "spectrum": cell.spectrum,
        "dim": cell.dim,
        "clients": cell.clients,
        "chain": cell.chain,
        "fit": cell.fit,
        "sampler": sampler,
        "class": "majority" if label == MAJORITY else "minority",
        "method": method,
        "sigma2": problem.sigma2,
        "t0": problem.t0,
        "num_own": int(problem.counts[0, label]),
        "num_all": int(problem.counts[:, label].sum()),
        "replicates": len(values.gaussian),
        "w2": w2.mean,
        "w2_low": w2.low,
        "w2_high": w2.high,
        "theory_w2": values.theory,
        "w2_matched": float(values.matched.mean()) if len(values.matched) else None,
    }
    if "alone" in found and method != "alone":
        alone = found["alone"]
        ratio = ratio_of_means(values.gaussian, alone.gaussian)
        known = values.theory is not None and alone.theory is not None
        row |= {
            "ratio": ratio.mean,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "theory_ratio": values.theory / alone.theory if known else None,  # type: ignore[operator]
        }
    return row


def theory_ratio(cell: Cell, sigma2: float, *, sampler: str, label: int = MINORITY) -> float:
    """The closed form of `ratio` for PFDM at any sigma2; the cell's own t0 do not enter."""
    problem = build_problem(cell, cell.t0[0])
    shared: dict[str, Any] = {
        "mean": problem.mixture.means[label],
        "variances": problem.mixture.variances[label],
        "num_own": int(problem.counts[0, label]),
        "num_all": int(problem.counts[:, label].sum()),
        "sigma2": sigma2,
        "sigma2_T": sigma2_at(problem.schedule.alpha_bar(problem.schedule.num_steps)),
        "kind": sampler,
    }
    return expected_w2("pfdm", **shared) / expected_w2("alone", **shared)


def at(cell: Cell, **changes: Any) -> Cell:
    """A copy with changes, `x` and `sweep` among them."""
    return Cell(**(vars(cell) | changes))
