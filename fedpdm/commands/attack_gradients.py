"""`fedpdm attack audit --release network`: canaries in gradients."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

from fedpdm.commands.attack_options import given_shape, public_images, release_config, tell
from fedpdm.commands.terminal import say

__all__ = ["run_gradient_audit"]


def run_gradient_audit(options: argparse.Namespace) -> int:
    """The action of `attack audit`: 0 if the rounds keep to the plan and the ledger, else 1."""
    import numpy as np

    from fedpdm.attacks import draw_game
    from fedpdm.attacks.gradient_auditing import audit_gradients, canary_gradients
    from fedpdm.attacks.jobs.release_report import audit_text
    from fedpdm.engines.one_client import upload_gradients
    from fedpdm.privacy.planning import build_gradient_noise
    from fedpdm.setup.build import model_sizes
    from fedpdm.setup.run_setup import set_up

    shape = (3, 8, 8)
    if options.data is not None:
        shape = public_images(options).images.shape[1:]
    if options.shape is not None:
        shape = given_shape(options.shape)
    section = {"rounds": options.rounds, "sample_rate": options.sample_rate}
    config = release_config(options, network=section)
    game = draw_game(options.canaries, shape=shape, rng=np.random.default_rng(options.seed))
    setup = set_up(config, game.images)
    plan = setup.release_plan.gradients
    assert plan is not None  # the config's mechanism
    rows = canary_gradients(game, plan, size=model_sizes(setup)["coarse"])
    say(f"audit: {options.canaries:,} canaries in gradients of {plan.rounds} rounds ...")
    started = time.perf_counter()
    suspects = []
    for seed in options.known_seed:
        run = dataclasses.replace(config.run, simulation=True, seed=seed)
        known = dataclasses.replace(config, run=run)
        suspects.append(build_gradient_noise(known, client=0, number=1))
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        uploads, store = upload_gradients(config, game.images, Path(folder), rows=rows)
        report = audit_gradients(
            game,
            uploads,
            delta=options.delta,
            recorded=store.spent(delta=options.delta).releases_per_image,
            suspects=suspects,
        )
    say(f"audit: done in {time.perf_counter() - started:.1f} s")
    facts = {"seed": options.seed, "release": "network", **section, **dataclasses.asdict(report)}
    tell(options, "audit.json", facts, audit_text(report, seed=options.seed))
    return 0 if report.passed else 1
