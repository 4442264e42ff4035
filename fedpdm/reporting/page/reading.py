"""A run directory as plain data for a page; a part is None where its file is missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError, RunConfig, config_to_json
from fedpdm.privacy.mechanism import mechanism_named
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import plain_text
from fedpdm.setup.choice import SamplingChoice, kept_choices
from fedpdm.storage.files import StoreError, read_json
from fedpdm.storage.node_run import NodeRun, open_run
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["LedgerLine", "RunFacts", "flat_config", "read_run", "statement_blocks"]

LEDGER = "ledger.jsonl"
ATTACKS = "attacks.json"


@dataclass(frozen=True, kw_only=True)
class LedgerLine:
    """One client's ledger: what it has spent; only `client` and `head`, or `problem`, where the
    store is not here."""

    client: int
    head: str = ""
    releases: int | None = None
    images: int | None = None
    epsilon: float | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run. `attacks` is `attacks.json`, found in `attacks_folder`; `choices` are those of the
    clients whose stores are here."""

    run: RunDirectory
    config: RunConfig
    privacy: Mapping[str, Any] | None
    metrics: Mapping[str, Any] | None
    partition: Mapping[str, Any] | None
    versions: Mapping[str, str]
    ledgers: Sequence[LedgerLine]
    attacks: Mapping[str, Any] | None
    attacks_folder: Path | None
    choices: Mapping[int, SamplingChoice] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> str:
        """The directory's name, without its place on this machine."""
        return self.run.root.absolute().name

    @property
    def at_node(self) -> bool:
        """Whether this is a node's own side of the run."""
        return isinstance(self.run, NodeRun)

    @property
    def place(self) -> str:
        """Where the run was, and whose side of it this is."""
        if isinstance(self.run, NodeRun):
            return f"deployment, at the node of client {self.run.client_id}"
        return "simulation" if self.config.run.simulation else "deployment"

    @property
    def finished(self) -> bool:
        return self.privacy is not None and "final" in (self.metrics or {})

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        return list((self.metrics or {}).get("rounds", ()))

    @property
    def final_clients(self) -> Sequence[Mapping[str, Any]]:
        return list((self.metrics or {}).get("final", {}).get("clients", ()))

    @property
    def statement(self) -> str:
        """The privacy statement in plain words, or empty."""
        return self.run.statement_words() or (plain_text(self.privacy) if self.privacy else "")

    def class_names(self) -> list[str]:
        """By label, of the split or of the config; empty if nothing here says."""
        named = [each for each in self.config.data.classes or () if isinstance(each, str)]
        whole = named if len(named) == len(self.config.data.classes or ()) else []
        return [str(name) for name in (self.partition or {}).get("class_names", whole)]


def read_run(root: Path, *, attacks: Path | None = None) -> RunFacts:
    """Read a run directory, or what a node keeps of a run; parts that it has not got to are None.

    `attacks` is a directory with `attacks.json`; default: the run directory or its `attacks/`.
    `ConfigError` or `StoreError`, one line, if it is no run directory or a file is damaged.
    """
    run = open_run(root)
    root, config = run.root, run.config()
    folder = _attacks_folder(root, attacks)
    privacy = _read(root / run.STATEMENT)
    return RunFacts(
        run=run,
        config=config,
        privacy=privacy,
        metrics=_read(root / "metrics.json"),
        partition=run.partition(),
        versions={str(k): str(v) for k, v in (_read(root / "versions.json") or {}).items()},
        ledgers=_ledgers(run, config, privacy or {}),
        attacks=_read(folder / ATTACKS) if folder else None,
        attacks_folder=folder,
        choices=kept_choices(run, config),
    )


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _attacks_folder(root: Path, given: Path | None) -> Path | None:
    if given is not None:
        if not (given / ATTACKS).exists():
            raise ConfigError(f"--attacks: {given} holds no {ATTACKS}; fedpdm attack RUN makes it")
        return given
    return next((f for f in (root, root / "attacks") if (f / ATTACKS).exists()), None)


def _ledgers(
    run: RunDirectory, config: RunConfig, privacy: Mapping[str, Any]
) -> tuple[LedgerLine, ...]:
    """A line per client: from its ledger where that is here, else the head that the run noted."""
    mechanism_named(config.privacy.release)  # ledgers may name custom ones
    lines = {
        int(client): LedgerLine(client=int(client), head=str(head))
        for client, head in privacy.get("ledger_heads", {}).items()
    }
    for client in run.clients():
        folder = run.release_path(client)
        if not (folder / LEDGER).exists():
            continue
        try:
            store = ReleaseStore(folder)
            ledger, spent = store.ledger(), store.spent(delta=config.privacy.delta)
            lines[client] = LedgerLine(
                client=client,
                head=ledger.head,
                releases=len(ledger.releases()),
                images=spent.images,
                epsilon=spent.largest,
            )
        except StoreError as error:
            problem = str(error).replace(str(folder), f"clients/{client}")
            lines[client] = LedgerLine(client=client, problem=problem)
    return tuple(lines[client] for client in sorted(lines))


def statement_blocks(text: str) -> list[tuple[str, list[str]]]:
    """The statement's paragraphs, each with the items listed under it, without its title.

    Lines that were broken for a terminal are joined again.
    """
    blocks = []
    for block in text.strip().split("\n\n")[1:]:
        lines = block.split("\n")
        items = [line.strip().removeprefix("- ") for line in lines if line.startswith("  ")]
        words = " ".join(line.strip() for line in lines if not line.startswith("  "))
        blocks.append((words, items))
    return blocks


def flat_config(config: RunConfig) -> dict[str, Any]:
    """`section.key` of every key, in order; lists as text, no folder of this machine."""
    data = dataclasses.replace(config.data, root=None)
    nested = json.loads(config_to_json(dataclasses.replace(config, data=data)))
    flat: dict[str, Any] = {"name": nested["name"]}
    for section_field in dataclasses.fields(config):
        if isinstance(section := nested.get(section_field.name), dict):
            order = [f.name for f in dataclasses.fields(getattr(config, section_field.name))]
            flat |= {f"{section_field.name}.{key}": section[key] for key in order if key in section}
    return flat
