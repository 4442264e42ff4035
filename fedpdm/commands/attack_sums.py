"""`fedpdm attack linkage` and `audit` with `--release statistics`: canaries in sums."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedpdm.commands.attack_options import given_shape, public_images, release_config, tell
from fedpdm.commands.terminal import say

if TYPE_CHECKING:
    from fedpdm.config import RunConfig
    from fedpdm.data import ImageSet
    from fedpdm.privacy.mechanism import ReleasedStatistics, StatisticsParameters

__all__ = ["run_sum_audit", "run_sum_linkage"]


def run_sum_linkage(options: argparse.Namespace) -> int:
    """The action of `attack linkage`: 0 if measured and analytic AUC agree, else 1."""
    import numpy as np

    from fedpdm.attacks.jobs.release_report import draw_sum_linkage, sum_linkage_text
    from fedpdm.attacks.sum_canaries import auditors_public, opposites
    from fedpdm.attacks.sum_linkage import link_sums, with_image
    from fedpdm.engines.one_client import release_sums
    from fedpdm.jobs.progress import sum_progress

    if options.images < 1:
        raise ValueError(f"--images: must be at least 1, got {options.images}")
    if options.pairs is not None:
        raise ValueError("--pairs: is for images; with --release statistics give --repeats")
    held = public_images(options)
    shape = held.images.shape[1:]
    config = _config(options, shape)
    rng = np.random.default_rng(options.seed)
    chosen = rng.permutation(held.distinct())[: options.images - 1]
    others, pair = held.subset(np.sort(chosen)), opposites(shape)
    planned, _ = _planned(config, with_image(others, pair[0], 0))
    public = auditors_public(planned[-1], shape, pair)
    say(
        f"linkage: {options.repeats:,} releases of each of two sets of {len(others) + 1} images ..."
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        clients, show = itertools.count(), sum_progress("linkage", "release", 2 * options.repeats)

        def obtain(images: ImageSet) -> list[ReleasedStatistics]:
            client = next(clients)
            place = Path(folder) / str(client)
            sums = release_sums(_fresh(config, client), images, place, public=public)
            show(1)
            return sums

        result = link_sums(
            others,
            pair,
            obtain,
            public,
            planned,
            num_releases=options.repeats,
        )
    say(f"linkage: done in {time.perf_counter() - started:.1f} s")
    summary = result.summary
    facts = {"data": options.data, "seed": options.seed, **dataclasses.asdict(summary)}
    if options.out is not None:
        draw_sum_linkage(result, options.out / "linkage.png", facts)
    tell(options, "linkage.json", facts, sum_linkage_text(facts))
    return 0 if summary.agrees else 1


def run_sum_audit(options: argparse.Namespace) -> int:
    """The action of `attack audit`: 0 if the sums keep to the stated epsilon and the ledger, else
    1."""
    import numpy as np

    from fedpdm.attacks.jobs.release_report import audit_text
    from fedpdm.attacks.sum_auditing import audit_sums
    from fedpdm.attacks.sum_canaries import auditors_public, draw_sum_game
    from fedpdm.engines.one_client import upload_sums
    from fedpdm.privacy.planning import build_noise

    shape = (3, 16, 16)
    if options.data is not None:
        shape = public_images(options).images.shape[1:]
    if options.shape is not None:
        shape = given_shape(options.shape)
    config = _config(options, shape)
    game = draw_sum_game(options.canaries, shape=shape, rng=np.random.default_rng(options.seed))
    planned, stated = _planned(config, game.images)
    public = auditors_public(planned[-1], shape)
    name = "x".join(map(str, shape))
    say(f"audit: {options.canaries:,} canaries of {name} in sums, two runs ...")
    started = time.perf_counter()
    known = [
        dataclasses.replace(config, run=dataclasses.replace(config.run, simulation=True, seed=seed))
        for seed in options.known_seed
    ]
    suspects = [
        [build_noise(each, client=0, release=release) for each in known]
        for release, _ in enumerate(planned, 1)
    ]
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        uploads, store = upload_sums(config, game.images, Path(folder), public=public, runs=2)
        spent = store.spent(delta=options.delta)
        report = audit_sums(
            game,
            uploads,
            public,
            claimed_epsilon=stated,
            delta=options.delta,
            recorded=spent.releases_per_image,
            suspects=suspects,
        )
    say(f"audit: done in {time.perf_counter() - started:.1f} s")
    facts = {"seed": options.seed, "release": "statistics", **dataclasses.asdict(report)}
    tell(options, "audit.json", facts, audit_text(report, seed=options.seed))
    return 0 if report.passed else 1


def _config(options: argparse.Namespace, shape: tuple[int, int, int]) -> RunConfig:
    """The client's run, around mid-grey unless --shift says otherwise."""
    if options.shift is None:
        options.shift = 0.0
    return release_config(options, statistics_of=math.prod(shape))


def _planned(config: RunConfig, images: ImageSet) -> tuple[tuple[StatisticsParameters, ...], float]:
    """The rounds of a run on these images, and the epsilon that it states."""
    from fedpdm.privacy.mechanism import StatisticsParameters
    from fedpdm.setup.run_setup import set_up

    plan = set_up(config, images).release_plan
    rounds = tuple(each for each in plan.rounds if isinstance(each, StatisticsParameters))
    return rounds, plan.epsilon_exact


def _fresh(config: RunConfig, client: int) -> RunConfig:
    """The same for another client: with seeded noise, of its own seed."""
    run = dataclasses.replace(config.run, seed=config.run.seed + client)
    return dataclasses.replace(config, run=run) if config.run.simulation else config
