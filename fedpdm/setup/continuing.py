"""A run that goes on for more rounds than it was begun with.

Its files keep the label of the config that it was begun with (`fedpdm.config.run_digest`), so
`run.begun_with` says how many rounds that had. The learning rate is a function of the step and of
the number of all steps: rounds that are done were trained on the schedule of their time, and those
that come are trained on the schedule of the longer run, from where it is then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from fedpdm.config import ConfigError, RunConfig, RunKind, config_from_mapping, config_to_json
from fedpdm.config.reading import apply_overrides
from fedpdm.setup.build import build_optimizer_settings
from fedpdm.storage.run_directory import RunDirectory, differing_keys

__all__ = ["continued", "overridden", "run_to_go_on", "schedule_lines"]

ROUNDS = "run.rounds"


def overridden(known: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config of a run that goes on with these `KEY=VALUE`; `run.rounds` is all that may change.

    `ConfigError`, one line, for another key, or for no more rounds than the run has.
    """
    if not overrides:
        return known
    config = config_from_mapping(apply_overrides(json.loads(config_to_json(known)), overrides))
    if others := [name for name in differing_keys(known, config) if name != ROUNDS]:
        raise ConfigError(
            f"--set {others[0]}: a resumed run keeps its config, but for more {ROUNDS}; choose "
            "another --out"
        )
    if config.run.rounds < known.run.rounds:
        raise ConfigError(
            f"{ROUNDS}: must be at least the {known.run.rounds} that the run has, "
            f"got {config.run.rounds}"
        )
    return continued(known, config)


def continued(known: RunConfig, config: RunConfig) -> RunConfig:
    """`config` as that of the run which goes on, where it is `known` but for more rounds; else it
    is given back as it is.

    `ConfigError`, one line, for a run whose rounds cannot become more.
    """
    same = dataclasses.replace(config, run=dataclasses.replace(config.run, begun_with=None))
    plain = dataclasses.replace(
        known, run=dataclasses.replace(known.run, rounds=config.run.rounds, begun_with=None)
    )
    if same != plain or config.run.rounds < known.run.rounds:
        return config
    if config.run.rounds == known.run.rounds:
        return known
    if not known.run.simulation:
        raise ConfigError(f"{ROUNDS}: a deployed run keeps it; its nodes accepted that config")
    if known.kind is RunKind.DP_SGD:
        raise ConfigError(
            f"{ROUNDS}: DP-SGD has noise for the {known.run.rounds} rounds that it was begun with; "
            "begin another run"
        )
    begun = known.run.begun_with or known.run.rounds
    return dataclasses.replace(config, run=dataclasses.replace(config.run, begun_with=begun))


def schedule_lines(config: RunConfig, *, rounds_done: int | None = None) -> list[str]:
    """What a run that goes on says of its rounds and its learning rates; none for another run.

    `rounds_done` are those of its checkpoint, where that is known.
    """
    if config.run.begun_with is None:
        return []
    first, rounds = (rounds_done or config.run.begun_with) + 1, config.run.rounds
    lines = [f"the run was begun with {config.run.begun_with} rounds, and goes on to {rounds}"]
    if first > rounds:
        return lines
    for role in ("coarse", "fine"):
        if role == "coarse" and config.has_statistics:
            continue
        settings = build_optimizer_settings(config, role)
        per_round = settings.total_steps // rounds
        rates = [settings.learning_rate(step) for step in ((first - 1) * per_round,
                                                           settings.total_steps)]  # fmt: skip
        lines.append(
            f"{role} learning rate: {settings.decay} over all {rounds} rounds, {rates[0]:.3g} in "
            f"round {first}, {rates[1]:.3g} at the end (at most {settings.lr:.3g})"
        )
    return lines


def run_to_go_on(root: RunDirectory, config: RunConfig) -> RunConfig:
    """`config`, or as `continued` where the directory holds that run with fewer rounds."""
    return continued(root.config(), config) if (root.root / "config.yaml").exists() else config
