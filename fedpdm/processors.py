"""The processors that this process may use, and how the threads of libraries wait on them."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["available", "set_thread_defaults"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """How many: those that it is bound to, and no more than its share of time (cgroups 1, 2)."""
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        bound = os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _share(cgroups, own))))


def set_thread_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """What OpenMP reads when torch is imported, unless the user has set it.

    Threads that wait give their processor away: those that spin took 14 times as long for a small
    U-Net on two cores that others used too. Torch counts the processors that it is bound to and
    knows no share of time, so their number is given where the share is less.
    """
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if _share(CGROUPS, OWN_CGROUP) < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(available()))


def _share(cgroups: Path, own: Path) -> float:
    """Processors' worth of time that the control groups of this process allow; inf without."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    paths = {""} | {line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2}
    shares = [math.inf]
    for path in {parent for one in paths for parent in (one, *map(str, Path(one).parents))}:
        for quota, period in (
            _words(cgroups / path / "cpu.max"),
            _words(
                *(cgroups / "cpu" / path / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
            ),
        ):
            if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
                shares.append(int(quota) / int(period))
    return min(shares)


def _words(*paths: Path) -> tuple[str, str]:
    """The two words of a file, or of a file each; empty where they are not there."""
    try:
        quota, period = " ".join(path.read_text() for path in paths).split()
    except (OSError, ValueError):
        return "", ""
    return quota, period
