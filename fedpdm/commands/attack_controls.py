"""`fedpdm attack controls`: do the attacks succeed where they must, and fail where they must?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedpdm.commands.attack_models import check_numbers, finish_attacks, membership_names
from fedpdm.config import ConfigError

__all__ = ["add_controls"]

CONTROLS = """\
Every attack on a model that was overfitted on purpose, where it must succeed, and on one that never
saw the members, where it must be at chance. Exit code 1 if one is not so.
"""


def add_controls(kinds: Any) -> None:
    """Add `controls` to the subparsers of `fedpdm attack`."""
    controls = kinds.add_parser(
        "controls",
        help="do the attacks succeed where they must, and fail where they must?",
        description=CONTROLS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    controls.add_argument("--images", type=int, default=500, help="default: %(default)s")
    controls.add_argument("--steps", type=int, default=20_000, help="default: %(default)s")
    controls.add_argument("--attacks", metavar="A,A,...", help="default: all of membership")
    controls.add_argument("--samples", type=int, default=1000, help="default: %(default)s")
    controls.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    controls.add_argument("--out", type=Path, required=True, metavar="DIR")
    controls.set_defaults(action=run_controls)


def run_controls(options: argparse.Namespace) -> int:
    """The action of `attack controls`: 0 if every attack is as it must be, else 1."""
    check_numbers(options, "seed", "images", "steps", "samples")
    from fedpdm.attacks.jobs.controls import as_it_must_be, plan_controls
    from fedpdm.attacks.jobs.plan import chosen_attacks
    from fedpdm.jobs.progress import work_progress

    names, groups = chosen_attacks(options.attacks)
    if options.attacks and groups:
        raise ConfigError(f"--attacks: controls are of {membership_names()}, got {groups[0]}")
    jobs = plan_controls(
        attacks=names,
        num_images=options.images,
        num_steps=options.steps,
        num_samples=options.samples,
        out=options.out,
        seed=options.seed,
        show=work_progress,
    )
    what = (
        f"Two models, each trained on {options.images} 8x8 digits for {options.steps} steps: one "
        "on the members, overfitted on purpose, where every attack must reach an AUC of 0.9 "
        "and half of the samples be flagged as copies, and one on other digits, "
        "where no 95% interval of an AUC may lie above 0.5 and fewer may be flagged."
    )
    failed = 0
    for each in finish_attacks(options, jobs, "Controls of the attacks", {"what": what}):
        right = as_it_must_be(each)
        failed += not right
        line = f"{'ok  ' if right else 'FAIL'} {each.job.name}: {each.result['headline']}"
        print(line, file=sys.stderr if options.json else sys.stdout)
    return 1 if failed else 0
