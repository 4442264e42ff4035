"""Attacks one after the other; each result is kept as a file as soon as the attack ends.

`results/<name>.json` holds an attack's settings, figures and the scores its curve is drawn from. A
rerun repeats only attacks that have no result with the same settings. After a crash or an
interruption a result is complete or absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.jobs.files import JobFiles
from fedpdm.jobs.processes import in_turn
from fedpdm.jobs.progress import count_progress
from fedpdm.jobs.running import Ended, Standing, run_jobs

__all__ = ["AttackJob", "Count", "EndedAttack", "run_attack_jobs"]

Count = Callable[[int, int], None]  # (done, in all)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AttackJob:
    """One attack on one target.

    `settings` is JSON and decides the result, with the seed and digests of models and images in it.
    `attack` makes it and returns JSON: `headline`, a line; whatever else it found; and, kept
    out of the summary of all attacks, `curve`: scores of `members` and `non_members`.
    """

    name: str
    group: str
    target: str
    settings: Mapping[str, Any]
    attack: Callable[[Count], dict[str, Any]]


EndedAttack = Ended[AttackJob]


def run_attack_jobs(jobs: Sequence[AttackJob], folder: Path, *, say: Say) -> list[EndedAttack]:
    """Run the attacks that have no result; all results, in the order of `jobs`.

    `say` gets a line for each, with an estimate of the time left.
    """
    numbers = {job.name: f"[{number}/{len(jobs)}] {job.name}" for number, job in enumerate(jobs, 1)}

    def tell(one: EndedAttack, standing: Standing) -> None:
        left = standing.seconds_left
        rest = f", about {left:.0f} s left" if left >= 1.0 else ""
        again = " (kept from before)" if one.reused else ""
        say(f"{numbers[one.job.name]}: {one.result['headline']}{again}{rest}")

    return run_jobs(
        jobs,
        shelf=JobFiles(folder / "results", entry="headline"),
        way=in_turn(lambda job: job.attack(count_progress(numbers[job.name], "image"))),
        tell=tell,
    )
