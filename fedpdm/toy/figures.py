"""The toy's figures, from the rows of its cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.diffusion.gmm import spectrum_variances
from fedpdm.reporting.pictures import Panel, Series, draw_panels, draw_scatter
from fedpdm.toy.cells import MINORITY, Cell, at, build_problem, theory_ratio, toy_schedule
from fedpdm.toy.fitting import Clients, fit_linear, train_models
from fedpdm.toy.measure import draw_samples
from fedpdm.toy.plan import calibrated_t0, covering_norm
from fedpdm.toy.theory import coarse_weight

__all__ = ["draw_all", "scatter_figure"]

Row = Mapping[str, Any]
NAMES = {"ancestral": "ancestral sampler (DDPM)", "flow": "probability flow (DDIM)"}
SPECTRA = {"unit": "unit covariance", "power": "variance in few directions"}
RATIO = "error, coarse then fine / alone"


def _chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def _series(
    name: str,
    rows: Sequence[Row],
    *,
    x: Callable[[Row], float],
    prefix: str,
    curve: tuple[Any, Any] | None = None,
) -> Series:
    """Measured points of `prefix` with the theory at them, or `curve` (x, y) through them."""
    ordered = sorted(rows, key=x)

    def column(key: str) -> Any:
        return np.array([r[key] for r in ordered], dtype=np.float64)

    at_x = np.array([x(r) for r in ordered])
    return Series(
        name=name,
        x=at_x,
        y=column(prefix),
        low=column(f"{prefix}_low"),
        high=column(f"{prefix}_high"),
        curve_x=at_x if curve is None else curve[0],
        curve_y=column(f"theory_{prefix}") if curve is None else curve[1],
    )


def draw_all(rows: Sequence[Row], cells: Sequence[Cell], out: Path, *, delta: float) -> list[Path]:
    """Every figure whose sweep is among the rows of the cells; returns the files."""
    by_sigma, by_epsilon = _of(rows, "sigma2"), _of(rows, "epsilon")
    made: list[Path] = []
    if by_sigma:
        made += _by_sigma(by_sigma, next(c for c in cells if c.sweep == "sigma2"), out)
    if by_epsilon:
        chosen = {c.spectrum: c for c in cells if c.sweep == "epsilon"}
        made += _by_epsilon(by_epsilon, chosen, out, delta=delta)
    return made + _rates(rows, out)


def _of(rows: Sequence[Row], sweep: str) -> list[Row]:
    return _chosen(rows, sweep=sweep, method="pfdm")


def _points(rows: Sequence[Row]) -> str:
    return (
        f"Points: measured, 95% interval over {rows[0]['replicates']} independent federations. "
        "Lines: closed form"
    )


def _by_sigma(rows: Sequence[Row], cell: Cell, out: Path) -> tuple[Path, Path]:
    grid = np.geomspace(min(r["sigma2"] for r in rows), max(r["sigma2"] for r in rows), 60)
    series = [
        _series(
            NAMES[sampler],
            _chosen(rows, sampler=sampler),
            x=lambda r: r["sigma2"],
            prefix="ratio",
            curve=(grid, np.array([theory_ratio(cell, s2, sampler=sampler) for s2 in grid])),
        )
        for sampler in NAMES
    ]
    panel = Panel(
        title="", x_label=r"noise variance of a release, $\sigma^2$", y_label=RATIO,
        series=series, level=1.0, level_name="training alone",
    )  # fmt: skip
    return draw_panels(
        out / "gain-sigma2",
        [panel],
        title="Collaboration helps, and less so the noisier the releases",
        note=f"{_points(rows)}.\nError: squared 2-Wasserstein distance to the true minority "
        f"class, {rows[0]['num_own']} own points of {rows[0]['num_all']:,}. Below 1, "
        "collaboration is better.",
    )


def _by_epsilon(
    rows: Sequence[Row], cells: Mapping[str, Cell], out: Path, *, delta: float
) -> tuple[Path, Path]:
    grid = np.geomspace(min(r["x"] for r in rows), max(r["x"] for r in rows), 40)
    curves = {}
    for spectrum, cell in cells.items():
        schedule = toy_schedule(cell.num_steps)
        t0 = [
            calibrated_t0(schedule, epsilon, clip_norm=cell.clip_norm, delta=delta)
            for epsilon in grid
        ]
        sigma2 = [schedule.noise_to_signal(t) ** 2 for t in t0]
        for sampler in NAMES:
            ratios = [theory_ratio(cell, s2, sampler=sampler) for s2 in sigma2]
            curves[spectrum, sampler] = (grid, np.array(ratios))
    panels = [
        Panel(
            title=NAMES[sampler], x_label=f"epsilon (delta {delta:g})", y_label=RATIO,
            series=[
                _series(
                    SPECTRA[spectrum],
                    _chosen(rows, sampler=sampler, spectrum=spectrum),
                    x=lambda r: r["x"],
                    prefix="ratio",
                    curve=curves[spectrum, sampler],
                )
                for spectrum in cells
            ],
            level=1.0, level_name="training alone",
        )
        for sampler in NAMES
    ]  # fmt: skip
    return draw_panels(
        out / "gain-epsilon",
        panels,
        title="At the same epsilon, data with few large directions (like images) gain more",
        note=f"{_points(rows)}. {rows[0]['dim']} dimensions, the same total variance;\nthe clip "
        "norm covers nearly every point, so noise is calibrated to the norm of all directions.",
    )


def _rates(rows: Sequence[Row], out: Path) -> list[Path]:
    axes = (
        ("minority", "the client's own points, n"),
        ("total", "points of all clients, N"),
        ("clients", "clients M (N fixed, n = N / 10 M)"),
        ("dim", "dimensions d"),
    )
    panels = []
    for sweep, label in axes:
        found = _chosen(rows, sweep=sweep)
        if not found:
            continue
        panels.append(
            Panel(
                title="", x_label=label, y_label="squared 2-Wasserstein distance", log_y=True,
                ticks=sorted({float(r["x"]) for r in found}),
                series=[
                    _series(
                        name, _chosen(found, method=method), x=lambda r: float(r["x"]), prefix="w2"
                    )
                    for method, name in (
                        ("alone", "alone"),
                        ("pfdm", "coarse then fine"),
                        ("central", "one model on all raw data"),
                    )
                ],
            )
        )  # fmt: skip
    if not panels:
        return []
    return list(
        draw_panels(
            out / "rates",
            panels,
            title="The minority class's error falls with n and N as the theory says;\n"
            "training alone loses most where many clients hold little each",
            note=f"{_points(_of(rows, sweep))}. Ancestral sampler. Where a bar has no lower end, "
            "the interval reaches 0.",
        )
    )


def _line(x: Any, name: str, y: Any) -> Series:
    """A curve without points."""
    empty = np.empty(0)
    return Series(name=name, x=empty, y=empty, low=empty, high=empty, curve_x=x, curve_y=y)


def directions_figure(
    variances: Mapping[str, Sequence[float]], sigma2: float, out: Path, *, epsilon: float
) -> list[Path]:
    """How much of training alone's error is left in each principal direction.

    `variances` by the name of the data, each (d,) descending; `sigma2` of their releases.
    """
    panels = []
    for sampler, name in NAMES.items():
        series = []
        for data, values in variances.items():
            v = np.asarray(values, dtype=np.float64)
            left = (1.0 - coarse_weight(v, sigma2, kind=sampler)) ** 2
            overall = float((v * left).sum() / v.sum())
            index = np.arange(1.0, len(v) + 1)
            series.append(_line(index, f"{data}; in all {overall:.3f}", left))
        panels.append(
            Panel(
                title=name, x_label="principal direction, largest first", y_label=RATIO,
                series=series, level=1.0, level_name="training alone",
            )
        )  # fmt: skip
    return list(
        draw_panels(
            out / "directions",
            panels,
            title="Why images gain: the coarse model speaks in the few large directions, "
            "where most of the error is",
            note=rf"Closed form for N much larger than n, epsilon {epsilon:g}, "
            rf"$\sigma^2$ = {sigma2:.0f}. A direction of variance v takes the share "
            r"v / (v + $\sigma^2$) of its mean from the coarse"
            "\nmodel (DDPM), or the root of it (DDIM). Both data have the same total variance and "
            "dimension.",
        )
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScatterData:
    """What `scatter_figure` shows: row -> panel -> points (N, 2), and the client's own points."""

    rows: Mapping[str, Mapping[str, Any]]
    own_points: Any
    mean: Any
    deviations: Any
    num_all: int
    sigma2: float


def scatter_data(cell: Cell, *, own: int = 6, num: int = 500) -> ScatterData:
    """Samples of the minority class in 2-D: truth, alone, coarse then fine, central, coarse only.

    Two rows: the linear denoiser in closed form, and the trained network. `own` points at the
    client, few enough for the difference to be seen.
    """
    v = spectrum_variances("unit", 2)
    norm = covering_norm(cell.radius, v.tolist())
    shown = at(cell, dim=2, minority=own, replicates=1, spectrum="unit", clip_norm=norm)
    problem = build_problem(shown, shown.t0[0])
    clients = Clients.draw(problem, replicates=1, seed=shown.seed)
    fits = {
        "linear denoiser": fit_linear(clients),
        "small network": train_models(
            clients, kind="mlp", num_steps=shown.training_steps, seed=shown.seed
        ),
    }
    mean = problem.mixture.means[MINORITY].numpy()
    rng = np.random.default_rng(shown.seed)
    truth = mean + rng.standard_normal((num, 2)) * v.sqrt().numpy()
    rows: dict[str, dict[str, Any]] = {}
    for name, models in fits.items():
        panels = {"truth": truth}
        titles = {"alone": f"training alone ({own} points, x)", "pfdm": "coarse, then fine",
                  "central": "one model on all raw data"}  # fmt: skip
        for method, title in titles.items():
            output = draw_samples(
                problem, models, method, label=MINORITY, replicates=1, num_samples=num,
                seed=shown.seed, scheduler="ddim", num_steps=100,
            )  # fmt: skip
            panels[title] = output.images.flatten(1).double().numpy()
            if method == "pfdm" and output.coarse is not None:
                last = output.coarse.flatten(1).double().numpy()
        panels["what the coarse model knows at t0"] = last
        rows[name] = panels
    points = clients.points[0][clients.labels[0] == MINORITY].flatten(1).double().numpy()
    return ScatterData(
        rows=rows,
        own_points=points,
        mean=mean,
        deviations=v.sqrt().numpy(),
        num_all=int(problem.counts[:, MINORITY].sum()),
        sigma2=problem.sigma2,
    )


def scatter_figure(data: ScatterData, out: Path) -> list[Path]:
    """Draw `scatter_data`."""
    return list(
        draw_scatter(
            out / "samples",
            data.rows,
            mean=data.mean,
            deviations=data.deviations,
            own=[(0, 1), (1, 1)],
            own_points=data.own_points,
            title=f"A class of which the client has {len(data.own_points)} points, and all clients "
            f"together {data.num_all:,}",
            note="Dashed: the true distribution (1 and 2 standard deviations) and its mean (+). "
            "Circle: the samples' mean. "
            rf"Noise of a release: $\sigma^2$ = {data.sigma2:.2g}.",
        )
    )
