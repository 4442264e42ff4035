"""`fedpdm run --sweep`: runs that differ in one key, side by side, and what they came to."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.commands.resolving import resolve_run
from fedpdm.commands.terminal import progress_aside, show
from fedpdm.config import ConfigError, RunConfig
from fedpdm.text import json_text

__all__ = ["add_sweep_argument", "run_sweep"]

MOST = 64  # runs of a sweep
_COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # not those inside a list


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """One run of a sweep: the value as it was given, the config, the directory, and whether it has
    finished or is to be resumed."""

    value: str
    config: RunConfig
    out: Path
    finished: bool
    resume: bool


def add_sweep_argument(parser: argparse.ArgumentParser) -> None:
    """Add `options.sweep`."""
    parser.add_argument(
        "--sweep", metavar="KEY=VALUE,VALUE,...",
        help="a run for each value of a key, in --out/KEY=VALUE, then a table and a figure that "
        "compare them; with --resume it goes on with those that have not finished",
    )  # fmt: skip


def run_sweep(
    options: argparse.Namespace,
    *,
    check: Callable[..., list[str]],
    work: Callable[..., None],
) -> int:
    """All runs one after the other, then the table; `check` and `work` are those of one run.

    Everything is checked before anything is trained. `ConfigError` or `ValueError`, one line.
    """
    key, values = _parsed(options.sweep)
    base, siblings = _siblings(options, key, values)
    with progress_aside(options):
        for one in siblings:
            lines = ["finished before"] if one.finished else []
            lines = lines or check(options, one.config, one.out, resume=one.resume)
            show("\n".join(f"{key}={one.value}  {line}" for line in lines))
        if not options.dry_run:
            for one in siblings:
                if not one.finished:
                    show(f"\n{key}={one.value}: {one.out}")
                    work(options, one.config, one.out, resume=one.resume)
    facts: dict[str, Any] = {
        "sweep": key,
        "runs": [{"value": one.value, "run": str(one.out)} for one in siblings],
    }
    if options.dry_run:
        text = ""
    else:
        from fedpdm.reporting.sweep import compare_runs

        made = compare_runs(base, key, {one.value: one.out for one in siblings})
        facts |= {"table": str(made.table), "figure": str(made.figure), "results": made.results}
        text = f"\n{made.text}\nwritten to {made.table} and {made.figure}"
    if options.json:
        print(json_text({**facts, "dry_run": options.dry_run}))
    elif text:
        show(text)
    return 0


def _parsed(text: str) -> tuple[str, list[str]]:
    """The key and its values, as text."""
    key, separator, rest = text.partition("=")
    values = [value.strip() for value in _COMMAS.split(rest)]
    if not separator or not key.strip() or not all(values):
        raise ConfigError(f"--sweep: must have the form KEY=VALUE,VALUE,..., got {text!r}")
    if not 2 <= len({*values}) == len(values) <= MOST:
        raise ConfigError(f"--sweep: must have 2 to {MOST} values, each once, got {text!r}")
    return key.strip(), values


def _siblings(
    options: argparse.Namespace, key: str, values: list[str]
) -> tuple[Path, list[Sibling]]:
    """The directory of all, and its runs."""
    if options.experiment is None:
        raise ConfigError("--sweep: give the experiment file, with --resume too")
    if any(override.partition("=")[0].strip() == key for override in options.overrides):
        raise ConfigError(f"--sweep: {key} is given by --set too")
    from fedpdm.storage.run_directory import RunDirectory

    plain = copy.copy(options)
    plain.resume = False  # the directory of all is no run
    _, base = resolve_run(plain)
    if (base / "config.yaml").exists():
        raise ConfigError(f"{base}: holds a run, and a sweep has a directory for several")
    found = []
    for value in values:
        own = copy.copy(options)
        own.overrides = [*options.overrides, f"{key}={value}"]
        own.out = base / re.sub(r"[^\w.=+-]", "_", f"{key}={value}")
        config, out = resolve_run(own)
        run = RunDirectory(out)
        there = (out / "config.yaml").exists()
        finished = options.resume and there and run.config() == config and run.is_finished()
        found.append(
            Sibling(
                value=value,
                config=config,
                out=out,
                finished=finished,
                resume=options.resume and there,
            )
        )
    configs = [one.config for one in found]
    for number, one in enumerate(found):
        if one.config in configs[:number] or one.out in [each.out for each in found[:number]]:
            raise ConfigError(f"--sweep: {key}={one.value} is a value that is there already")
    return base, found
