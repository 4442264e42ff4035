"""The cells of a call: methods, seeds and the variants of an ablation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError, Suite
from fedpdm.suites.cell import Cell

__all__ = ["plan_cells"]


def plan_cells(
    suite: Suite,
    profile: str,
    *,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] = (),
    ablation: str | None = None,
    variants: Sequence[str] = (),
    overrides: Mapping[str, Any],
    runs: Path,
    results: Path,
    engine: str = "inprocess",
    keep: bool = False,
) -> list[Cell]:
    """Every cell, seed by seed, so that a table fills evenly.

    Args:
        seeds: None: as many as the profile says; of an ablation with draws, the first.
        methods, variants: empty: all of the table or, with `ablation`, of it.
        overrides: config keys that are set in every method.
        runs, results: where runs and results go; absolute.
        engine: inprocess or flower.
        keep: whether the clients' stores outlast the scoring.

    Raises:
        ConfigError: a profile, method, ablation or variant that is not there, or a bad config.
    """
    size = suite.profile(profile)
    changes: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
    chosen: Sequence[str] = tuple(dict.fromkeys(methods)) or suite.methods_of(profile)
    if ablation:
        study = suite.ablation(ablation)
        names = tuple(dict.fromkeys(variants)) or tuple(study.variants)
        changes = [(name, dict(study.variant(name))) for name in names]
        chosen = tuple(dict.fromkeys(methods)) or study.methods
    draws = size.draws if ablation else 1
    if seeds is None:
        seeds = range(size.first_seed, size.first_seed + (size.seeds if draws == 1 else 1))
    cells = []
    for seed, draw in itertools.product(seeds, range(draws)):
        for variant, change in changes:
            if not change:
                variant = None  # the table's own cell, which need not run twice
            for method in chosen:
                row = suite.method(method)
                if size.shared_steps is None and (row.stop, row.above) != ("last", "model"):
                    raise ConfigError(f"method {method}: needs a profile with shared_steps")
                config = suite.compose(
                    profile, method, seed=seed, draw=draw, overrides=[change, overrides],
                    label=f"{ablation}{variant}" if variant else "",
                )  # fmt: skip
                if draw and not config.kind.releases:
                    continue  # there is no noise to draw
                cells.append(
                    Cell(
                        suite=suite.name,
                        profile=profile,
                        method=method,
                        seed=seed,
                        draw=draw,
                        ablation=ablation if variant else None,
                        variant=variant,
                        clients=size.clients,
                        own_models=size.shared_steps is not None,
                        stop=row.stop,
                        above=row.above,
                        config=config,
                        runs=runs,
                        results=results,
                        engine=engine,
                        keep=keep,
                    )
                )
    return cells
