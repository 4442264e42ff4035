"""The run directory: what a run leaves behind, and the server's checkpoint.

config.yaml          the resolved configuration
privacy.json  privacy.txt   what is promised, in numbers and in words
metrics.json         per round and final; versions.json: of the software
coarse.safetensors   the shared model (EMA), when the run has finished
samples.png  partition.png  partition.txt  partition.json (digests to compare with other machines)
log.txt
earlier/000010/      results after 10 rounds of a run that went on for more
server/checkpoint.safetensors   to resume from
server/updates/      updates of this round that wait for their turn
server/members.json  which images trained a shared model of raw images (a baseline)
server/ledgers.json  marks of participants' ledgers, where no federation keeps them
server/releases/     what clients uploaded (server training only)
clients/<id>/        each client's store (`fedpdm.storage.client_store`); the server never reads
                     it, except for pictures, and to check it before it resumes, in simulation

Files that are read again carry a digest, and say of which config's run they are
(`fedpdm.storage.files`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedpdm.config import ConfigError, RunConfig, config_to_yaml, load_config, run_digest
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import (
    StoreError,
    clear_leftovers,
    is_leftover,
    read_json,
    read_sealed_text,
    read_tensors,
    write_atomic,
    write_json,
    write_sealed_text,
    write_tensors,
)
from fedpdm.storage.holding import HOLD
from fedpdm.storage.tensorfile import write_file
from fedpdm.text import json_text

__all__ = ["RunDirectory", "differing_keys"]

# What a finished run has and one that goes on makes anew.
RESULTS = (
    "coarse.safetensors", "privacy.json", "privacy.txt", "metrics.json", "samples.png",
    "versions.json", "report.html",
)  # fmt: skip


class RunDirectory:
    """Reads and writes one run's files; every write is atomic."""

    STATEMENT = "privacy.json"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._config = ""  # its digest, once it is known

    @property
    def checkpoint_path(self) -> Path:
        return self.root / "server" / "checkpoint.safetensors"

    def client_path(self, client_id: int) -> Path:
        """A client's store, where it lies in the run directory (simulation)."""
        return self.root / "clients" / str(client_id)

    def release_path(self, client_id: int) -> Path:
        """Where the ledger and the releases of that client lie."""
        return self.client_path(client_id)

    def first_client(self) -> int:
        """The client whose models are taken where nothing else is said."""
        return 0

    def clients(self) -> list[int]:
        """Clients whose stores are here, ascending."""
        folders = (self.root / "clients").glob("[0-9]*")
        return sorted(int(path.name) for path in folders if path.name.isdecimal())

    def is_finished(self) -> bool:
        """Whether the last round's results are here."""
        return (self.root / "metrics.json").exists() and "final" in self.read_json("metrics.json")

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """`ConfigError` if the directory cannot be used for `config`; writes nothing.

        It may hold no run of another config, and no run at all unless `resume` is set. `StoreError`
        if a file that a resumed run reads is not as it was written; releases are the ledger's part.
        """
        if (self.root / "config.yaml").exists():
            known = self.config()
            if known != config and not (resume and goes_on(known, config)):
                raise ConfigError(
                    f"{self.root}: holds a run of another config "
                    f"({', '.join(differing_keys(known, config))}); choose another --out"
                )
            if self._ended(config):
                advice = "nothing to resume, but for more rounds (--set run.rounds)"
                advice = advice if resume else "choose another --out"
                raise ConfigError(f"{self.root}: this run has finished; {advice}")
            if not resume:
                raise ConfigError(
                    f"{self.root}: holds this run already; --resume continues it, or choose "
                    "another --out"
                )
            self._check_files(config)
        elif resume:
            raise ConfigError(f"{self.root}: no run to resume (config.yaml is missing)")
        elif self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root}: exists and is not a directory")
        elif self.root.is_dir():
            names = {path.name for path in self.root.iterdir()}
            present = {name for name in names if not is_leftover(name)}
            if strangers := sorted(present - {".flower", "flower.log", HOLD}):
                raise ConfigError(
                    f"{self.root}: is not empty and holds no run ({strangers[0]}, ...); choose "
                    "another --out"
                )

    def _check_files(self, config: RunConfig) -> None:
        """Clients' stores, where they are here, and what clients uploaded, in every part."""
        folders = (self.root / "server" / "releases").glob("*/")
        for part in ("", *(folder.name for folder in folders)):
            self.load_uploads(part=part)
        for path in sorted((self.root / "clients").glob("[0-9]*")):
            if path.name.isdecimal():
                ClientStore(path, store_label(config, int(path.name))).check()

    def open(self, config: RunConfig, *, resume: bool) -> None:
        """Claim the directory for `config` after `check`; nothing is overwritten.

        What killed processes left half written is removed.
        """
        self.check(config, resume=resume)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be created: {error.strerror}") from None
        uploads = self._upload_path(0, "").parent
        for folder in (self.root, self.root / "server", uploads, *uploads.glob("*/")):
            clear_leftovers(folder)
        path = self.root / "config.yaml"
        if not path.exists() or self.config() != config:
            write_sealed_text(path, config_to_yaml(config))
        if resume:
            self._set_aside(config)

    def _ended(self, config: RunConfig) -> bool:
        """Whether the last evaluation is over; of a run that goes on, that of its last round."""
        done, _, history = self.load_checkpoint() or (0, {}, {})
        goes_on_to = 0 if config.run.begun_with is None else config.run.rounds
        return "final" in history and done >= goes_on_to

    def _set_aside(self, config: RunConfig) -> None:
        """Move the results of a run that goes on to `earlier/`, in a folder by its rounds: they
        would pass for those of the longer run."""
        done, _, history = self.load_checkpoint() or (0, {}, {})
        if "final" not in history or self._ended(config):
            return
        folder = self.root / "earlier" / f"{done:06d}"
        for name in RESULTS:
            if (self.root / name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(self.root / name, folder / name)

    def config(self) -> RunConfig:
        path = self.root / "config.yaml"
        if not path.exists():
            raise ConfigError(f"{self.root}: is not a run directory (config.yaml is missing)")
        read_sealed_text(path)
        return load_config(path)

    def _named(self, part: str) -> dict[str, str]:
        """The label of a file of this run; none before it has a config."""
        if not self._config and (self.root / "config.yaml").exists():
            self._config = run_digest(self.config())
        return {"config": self._config, "part": part} if self._config else {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.root / name, value, self._named(name))

    def save_shared(self, weights: Mapping[str, torch.Tensor], *, noise_source: str) -> None:
        """Write a finished run's shared model (EMA)."""
        label = self._named("shared model")
        path = self.root / "coarse.safetensors"
        write_tensors(path, weights, {"noise_source": noise_source}, label)

    def load_shared(self) -> dict[str, torch.Tensor]:
        """The weights of `save_shared`."""
        return read_tensors(self.root / "coarse.safetensors", self._named("shared model"))[0]

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.root / name, text.encode())

    def read_json(self, name: str) -> Any:
        path = self.root / name
        if not path.exists():
            raise ConfigError(f"{path}: is missing; the run has not got that far")
        return read_json(path, self._named(name))

    def statement(self) -> dict[str, Any]:
        """What the run promises, in numbers; `ConfigError` if it has not got that far."""
        found: dict[str, Any] = self.read_json(self.STATEMENT)
        return found

    def statement_words(self) -> str:
        """The same in plain words; empty where it has not got that far."""
        path = (self.root / self.STATEMENT).with_suffix(".txt")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def partition(self) -> dict[str, Any] | None:
        """Who holds how many images of which class; None where that is not known here."""
        path = self.root / "partition.json"
        return read_json(path) if path.exists() else None

    def save_upload(
        self,
        client_id: int,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        *,
        part: str = "",
    ) -> None:
        """Keep what a client uploaded (server training); `part` tells rounds apart."""
        path = self._upload_path(client_id, part)
        write_tensors(path, tensors, metadata, self._named(f"{part}{path.stem}"))

    def drop_upload(self, client_id: int, *, part: str = "") -> None:
        """Forget what a client uploaded."""
        self._upload_path(client_id, part).unlink(missing_ok=True)

    def _upload_path(self, client_id: int, part: str) -> Path:
        return self.root / "server" / "releases" / part / f"{client_id:06d}.safetensors"

    def load_uploads(
        self, *, part: str = ""
    ) -> list[tuple[dict[str, torch.Tensor], dict[str, str]]]:
        """(tensors, metadata) of every upload of a part, in the order of client ids."""
        paths = sorted((self.root / "server" / "releases" / part).glob("*.safetensors"))
        return [read_tensors(path, self._named(f"{part}{path.stem}")) for path in paths]

    def keep_update(self, client_id: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Put aside an update that came before its turn, until the round is over."""
        self._update_path(client_id).parent.mkdir(parents=True, exist_ok=True)
        try:
            write_file(self._update_path(client_id), weights, {})
        except OSError as error:
            path = self._update_path(client_id)
            raise StoreError(f"{path}: cannot be written: {error.strerror}") from None

    def take_update(self, client_id: int) -> dict[str, torch.Tensor]:
        """Inverse of `keep_update`; the file goes, the tensors stay."""
        tensors, _ = read_tensors(self._update_path(client_id))
        self._update_path(client_id).unlink()
        return tensors

    def drop_updates(self) -> None:
        """Forget what was put aside."""
        shutil.rmtree(self._update_path(0).parent, ignore_errors=True)

    def _update_path(self, client_id: int) -> Path:
        return self.root / "server" / "updates" / f"{client_id:06d}.safetensors"

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, torch.Tensor], history: Mapping[str, Any]
    ) -> None:
        """Server state after `round`, with the metrics so far, in one file."""
        write_tensors(
            self.checkpoint_path,
            tensors,
            {"round": str(round), "history": json_text(history, indent=None)},
            self._named("checkpoint"),
        )

    def load_checkpoint(
        self, *, check: bool = True
    ) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """(rounds done, server state, metrics so far), or None before the first round.

        Without `check` it is the one that this process has just written.
        """
        if not self.checkpoint_path.exists():
            return None
        tensors, metadata = read_tensors(
            self.checkpoint_path, self._named("checkpoint"), check=check
        )
        try:
            return int(metadata["round"]), tensors, json.loads(metadata["history"])
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.checkpoint_path}: header is damaged: {error}") from None


def goes_on(known: RunConfig, config: RunConfig) -> bool:
    """Whether `config` is that of the `known` run with more rounds (`run.begun_with` says so)."""
    if config.run.rounds <= known.run.rounds:
        return False
    begun = known.run.begun_with or known.run.rounds
    longer = dataclasses.replace(known.run, rounds=config.run.rounds, begun_with=begun)
    expected = dataclasses.replace(known, run=longer)
    return config == expected


def differing_keys(a: RunConfig, b: RunConfig) -> list[str]:
    """`section.key` of every key in which two configs differ."""
    first, second = dataclasses.asdict(a), dataclasses.asdict(b)
    differing = []
    for section, values in first.items():
        if isinstance(values, dict):
            differing += [f"{section}.{k}" for k in values if values[k] != second[section][k]]
        elif values != second[section]:
            differing.append(section)
    return differing
