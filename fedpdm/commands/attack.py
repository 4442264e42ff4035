"""`fedpdm attack`: try to break the release, with the code that clients run."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from fedpdm.commands.attack_controls import add_controls
from fedpdm.commands.attack_gradients import run_gradient_audit
from fedpdm.commands.attack_models import add_model_attacks
from fedpdm.commands.attack_options import (
    add_release_options,
    given_shape,
    public_images,
    release_config,
    tell,
)
from fedpdm.commands.attack_sums import run_sum_audit, run_sum_linkage
from fedpdm.commands.terminal import say

__all__ = ["add_attack_parser"]

EXAMPLES = """\
examples:
  fedpdm attack runs/eps3 --attacks pia,gsa,memorisation --clients 0,1 --out attacks
  fedpdm attack --unet model --members a.npz --non-members b.npz --out attacks
  fedpdm attack controls --out controls
  fedpdm attack linkage --data mnist --epsilon 10 --clip-norm 10 --out linkage
  fedpdm attack audit --data cifar10 --epsilon 10 --clip-norm 10 --canaries 10000
  fedpdm attack audit --epsilon 10 --clip-norm 10 --seeded 0 --known-seed 0     (must fail)
  fedpdm attack audit --release statistics --epsilon 10
  fedpdm attack linkage --release statistics --epsilon 3
  fedpdm attack audit --release network --epsilon 10 --rounds 100
"""
LINKAGE = """\
The server's best test: from which of two known images was an upload made? Images of a data set go
through a client's real release path; the likelihood ratio's ROC curve is compared with the one that
follows from the noise. Exit code 1 if the two disagree.
With --release statistics: which of two images is in a client's sums? Two sets that differ in one
image, the worst pair, are released again and again.
"""
AUDIT = """\
One-run audit: a client is given one of each of many pairs of canaries, by a secret coin; everything
it uploads in two rounds, with a restart between them, is used to guess the coins. What the right
guesses prove about epsilon, and checks of the noise itself, are held against the client's ledger.
Exit code 1 if the release leaks more than the ledger says.
With --release statistics: everything it uploads in the rounds of a run and of another run
with the same releases; the auditor plays the server as well.
With --release network: canaries are gradients, each along a direction of its own, and everything
it uploads in all rounds of a plan is used; who is drawn is checked as well.
"""


def add_attack_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    attack = commands.add_parser(
        "attack",
        help="attack the release (linkage, audit) or the models of a run or any U-Net",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = attack.add_subparsers(required=True, metavar="ATTACK")
    linkage = kinds.add_parser(
        "linkage",
        help="from which of two images was an upload made?",
        description=LINKAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    linkage.add_argument(
        "--data", default="digits", metavar="IMAGES",
        help="a data set by name, a folder with one folder per class, or a .npz file; "
        "default: %(default)s",
    )  # fmt: skip
    linkage.add_argument("--pairs", type=int, help="default: as many as there are, at most 10,000")
    linkage.add_argument(
        "--repeats", type=int, default=100, metavar="N",
        help="statistics: releases of each of the two sets; default: %(default)s",
    )  # fmt: skip
    linkage.add_argument(
        "--images", type=int, default=64, metavar="N",
        help="statistics: images in a set; default: %(default)s",
    )  # fmt: skip
    linkage.set_defaults(action=run_linkage)
    audit = kinds.add_parser(
        "audit",
        help="what do a client's uploads prove about epsilon?",
        description=AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("--canaries", type=int, default=5000, help="default: %(default)s")
    audit.add_argument(
        "--data", metavar="IMAGES",
        help="canaries in the shape of these images, around their background; as for linkage",
    )  # fmt: skip
    audit.add_argument(
        "--shape", metavar="CxHxW",
        help="default: that of --data, else 3x32x32 (statistics: 3x16x16)",
    )  # fmt: skip
    audit.add_argument(
        "--known-seed", type=int, action="append", default=[], metavar="SEED",
        help="a seed that somebody else may know (repeatable)",
    )  # fmt: skip
    audit.set_defaults(action=run_audit)
    add_model_attacks(kinds)
    add_controls(kinds)
    for parser in (linkage, audit):
        parser.add_argument("--resolution", type=int, help="pixels; default: as they are")
        add_release_options(parser)


def run_linkage(options: argparse.Namespace) -> int:
    """The action of `attack linkage`: 0 if measured and analytic AUC agree, else 1."""
    import numpy as np

    from fedpdm.attacks import linkage_attack
    from fedpdm.attacks.jobs.release_report import draw_linkage, linkage_text
    from fedpdm.engines.one_client import upload_releases

    if options.release == "network":
        raise ValueError("--release: network is for fedpdm attack audit, got it for linkage")
    if options.release == "statistics":
        return run_sum_linkage(options)
    config, images = release_config(options), public_images(options)
    most = len(images.distinct()) // 2
    pairs = min(10_000, most) if options.pairs is None else options.pairs
    say(f"linkage: {pairs:,} pairs of {options.data}, through a client's release path ...")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        result = linkage_attack(
            images,
            lambda chosen: upload_releases(config, chosen, Path(folder))[0][0],
            num_pairs=pairs,
            rng=np.random.default_rng(options.seed),
        )
    say(f"linkage: done in {time.perf_counter() - started:.1f} s")
    summary = result.summary
    facts = {
        "data": options.data,
        "seed": options.seed,
        "t0": result.parameters.t0,
        "shift": result.parameters.shift,
        **dataclasses.asdict(summary),
    }
    if options.out is not None:
        draw_linkage(result, options.out / "linkage.png", facts)
    tell(options, "linkage.json", facts, linkage_text(facts))
    return 0 if summary.agrees else 1


def run_audit(options: argparse.Namespace) -> int:
    """The action of `attack audit`: 0 if the release keeps to its ledger, else 1."""
    import numpy as np

    from fedpdm.attacks import audit, draw_game
    from fedpdm.attacks.jobs.release_report import audit_text
    from fedpdm.engines.one_client import upload_releases
    from fedpdm.privacy.planning import build_noise

    if options.release == "network":
        return run_gradient_audit(options)
    if options.release == "statistics":
        return run_sum_audit(options)
    config = release_config(options)
    shape, background = (3, 32, 32), 0.0
    if options.data is not None:
        images = public_images(options)
        shape, background = images.images.shape[1:], images.background
    if options.shape is not None:
        shape = given_shape(options.shape)
    options.shape = "x".join(map(str, shape))
    game = draw_game(
        options.canaries,
        shape=shape,
        rng=np.random.default_rng(options.seed),
        background=background if options.shift is None else options.shift,
    )
    say(f"audit: {options.canaries:,} canaries of {options.shape}, two rounds ...")
    started = time.perf_counter()
    suspects = []
    for seed in options.known_seed:
        run = dataclasses.replace(config.run, simulation=True, seed=seed)
        suspects.append(build_noise(dataclasses.replace(config, run=run), client=0, release=1))
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        uploads, store = upload_releases(config, game.images, Path(folder), rounds=2)
        spent = store.spent(delta=options.delta)
        report = audit(
            game,
            uploads,
            claimed_epsilon=spent.largest,
            delta=options.delta,
            recorded=spent.releases_per_image,
            suspects=suspects,
        )
    say(f"audit: done in {time.perf_counter() - started:.1f} s")
    facts = {"seed": options.seed, **dataclasses.asdict(report)}
    tell(options, "audit.json", facts, audit_text(report, seed=options.seed))
    return 0 if report.passed else 1
