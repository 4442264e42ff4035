"""The cells of the toy's experiment, and the slopes that are read off them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpdm.config import ToyConfig
from fedpdm.diffusion.gmm import spectrum_variances
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.calibration import UnreachableEpsilonError, calibrate_t0
from fedpdm.toy.cells import MAJORITY, MINORITY, Cell, at, build_problem, toy_schedule
from fedpdm.toy.measure import Slope, fit_slope
from fedpdm.toy.theory import coarse_weight, sigma2_at

__all__ = ["calibrated_t0", "covering_norm", "nearest_t0", "plan", "slopes"]

BOTH = ("ancestral", "flow")
ALL = ("alone", "pfdm", "central")


def nearest_t0(schedule: NoiseSchedule, sigma2: float) -> int:
    """The t0 in [1, T - 1] whose sigma^2 is nearest by ratio; `ValueError` beyond the ends."""
    values = [sigma2_at(schedule.alpha_bar(t)) for t in range(1, schedule.num_steps)]
    if not values[0] * 0.9 <= sigma2 <= values[-1] * 1.1:
        raise ValueError(
            f"sigma2 must be in [{values[0]:.3g}, {values[-1]:.3g}], which the schedule of "
            f"{schedule.num_steps} steps spans, got {sigma2:g}"
        )
    return int(np.argmin(np.abs(np.log(np.array(values) / sigma2)))) + 1


def covering_norm(radius: float, variances: Sequence[float]) -> float:
    """A clip norm that nearly no point of a component at `radius` exceeds.

    ||x||^2 has mean r^2 + sum v and variance at most 2 sum v^2 + 4 r^2 max v; five standard
    deviations above the mean. It depends on the mixture alone, which is public here.
    """
    v = np.asarray(variances)
    spread = 2.0 * float(np.square(v).sum()) + 4.0 * radius**2 * float(v.max())
    return math.sqrt(radius**2 + float(v.sum()) + 5.0 * math.sqrt(spread))


def plan(config: ToyConfig) -> list[Cell]:
    """Every cell, in the order of the report. `ValueError` for numbers that do not fit together."""
    schedule = toy_schedule(config.release.num_steps)
    mixture, measure, sweep = config.mixture, config.measure, config.sweep

    def norm(spectrum: str, dim: int) -> float:
        if config.release.clip_norm is not None:
            return config.release.clip_norm
        v = spectrum_variances(spectrum, dim, exponent=mixture.exponent)
        return covering_norm(mixture.radius, v.tolist())

    base = Cell(
        sweep="methods",
        x=(0.0,),
        classes=mixture.classes,
        dim=mixture.dim,
        radius=mixture.radius,
        spectrum="unit",
        exponent=mixture.exponent,
        clients=config.federation.clients,
        minority=config.federation.minority,
        total=config.federation.total,
        num_steps=config.release.num_steps,
        t0=(nearest_t0(schedule, config.release.sigma2),),
        clip_norm=norm("unit", mixture.dim),
        methods=ALL,
        replicates=measure.replicates,
        samples=measure.samples,
        ancestral_steps=measure.ancestral_steps,
        training_steps=measure.training_steps,
        seed=measure.seed,
    )
    trained = at(
        base,
        replicates=measure.trained_replicates,
        samples=500,
        one_by_one=True,
        samplers=("flow",),
        matching=True,
        methods=(*ALL, "coarse"),
    )
    cells = [
        at(base, labels=(MAJORITY, MINORITY), samplers=BOTH),
        at(base, chain="noise_to_noise", ancestral_steps=None),
        *(at(trained, fit=fit) for fit in ("closed", "linear", "mlp")),
    ]
    if sweep.sigma2:
        t0 = tuple(nearest_t0(schedule, s2) for s2 in sweep.sigma2)
        cells.append(
            at(base, sweep="sigma2", x=sweep.sigma2, t0=t0, samplers=BOTH, ancestral_steps=None,
               samples=2 * base.samples)
        )  # fmt: skip
    few = min(config.federation.total, 2000)  # for the coarse model's share to be seen
    varied: list[dict[str, Any]] = [
        *({"sweep": "minority", "x": n, "minority": n} for n in sweep.minority),
        *({"sweep": "total", "x": n, "total": n} for n in sweep.total),
        *(
            {"sweep": "clients", "x": m, "clients": m, "total": few,
             "minority": max(2, few // (10 * m))}
            for m in sweep.clients
        ),
        *({"sweep": "dim", "x": d, "dim": d, "clip_norm": norm("unit", d)} for d in sweep.dim),
    ]  # fmt: skip
    for index, changes in enumerate(varied, 1):
        x = (float(changes.pop("x")),)
        cells.append(at(base, x=x, seed=base.seed + 1000 * index, **changes))
    for spectrum in ("unit", "power") if sweep.epsilon else ():
        clip_norm = norm(spectrum, sweep.epsilon_dim)
        t0 = tuple(
            calibrated_t0(schedule, epsilon, clip_norm=clip_norm, delta=config.release.delta)
            for epsilon in sweep.epsilon
        )
        cells.append(
            at(base, sweep="epsilon", x=sweep.epsilon, spectrum=spectrum, dim=sweep.epsilon_dim,
               clip_norm=clip_norm, t0=t0, samplers=BOTH, methods=("alone", "pfdm"),
               replicates=max(2, base.replicates // 2), samples=min(base.samples, 100))
        )  # fmt: skip
    for cell in cells:
        for t0_of_x in cell.t0:
            build_problem(cell, t0_of_x)  # every number is checked before anything runs
    return cells


def calibrated_t0(
    schedule: NoiseSchedule, epsilon: float, *, clip_norm: float, delta: float
) -> int:
    """`calibrate_t0`, at most T - 1; `ValueError` naming the sweep where no t0 is noisy enough."""
    try:
        t0 = calibrate_t0(schedule, clip_norm=clip_norm, epsilon=epsilon, delta=delta)
    except UnreachableEpsilonError as error:
        raise ValueError(f"sweep.epsilon {epsilon:g}: {error}") from None
    return min(t0, schedule.num_steps - 1)


def slopes(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The rates of Theorem 5.2: slopes of PFDM's W2^2 in 1/n and in 1/N, beside the closed form.

    At variance 1: d (1 - w)^2 in 1/n, and d (w^2 (1 + sigma^2) + 2 w (1 - w)) in 1/N.
    """
    found = {}
    for sweep, count in (("minority", "num_own"), ("total", "num_all")):
        chosen = [r for r in rows if r["sweep"] == sweep and r["method"] == "pfdm"]
        if len({r[count] for r in chosen}) < 3:
            continue
        slope: Slope = fit_slope(
            [1.0 / r[count] for r in chosen],
            [r["w2"] for r in chosen],
            [(r["w2_high"] - r["w2"]) for r in chosen],
        )
        sigma2, dim = chosen[0]["sigma2"], chosen[0]["dim"]
        w = float(coarse_weight([1.0], sigma2, kind="ancestral")[0])
        theory = (
            dim * (1 - w) ** 2
            if sweep == "minority"
            else dim * (w**2 * (1 + sigma2) + 2 * w * (1 - w))
        )
        found["1/n" if sweep == "minority" else "1/N"] = {
            "slope": slope.value,
            "low": slope.low,
            "high": slope.high,
            "theory": theory,
        }
    return found
