"""What a node keeps of each run that it took part in, so that its owner can go on from there.

`runs/DIGEST/` of a node's store has, beside what `fedpdm.storage.client_store` names:

    config.yaml         the resolved configuration that the node was sent
    node.json           which client it is, the shape of its images, its classes, what it holds
    metrics.json        per round, and final: the node's own numbers, which stay here
    statement.json, statement.txt   what the run promises to this node's images
    coarse.safetensors  the shared model (EMA), as the node was sent it after the last round
    samples.png         pictures drawn with the finished models

Ledger and releases lie in the store itself: an image's cost is that of all runs together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError, RunConfig, config_to_yaml
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError, read_json, write_sealed_text
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import line

__all__ = ["NodeRun", "open_run"]

NODE = "node.json"


class NodeRun(RunDirectory):
    """A run as one of its nodes keeps it, read like any run directory: it has one client."""

    STATEMENT = "statement.json"  # privacy.json beside it is what the client itself has released

    @property
    def client_id(self) -> int:
        """Which client the node is; `StoreError` if its file does not say."""
        client = self.facts().get("client_id")
        if type(client) is not int or client < 0:
            raise StoreError(f"{self.root / NODE}: client_id must be at least 0, got {client!r}")
        return client

    @property
    def store(self) -> ClientStore:
        """The node's training state of this run."""
        return ClientStore(self.root, store_label(self.config(), self.client_id))

    def begin(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write what is known before the first round; `facts` are those of `facts()`."""
        if not (self.root / "config.yaml").exists():
            write_sealed_text(self.root / "config.yaml", config_to_yaml(config))
        self.write_json(NODE, facts)

    def facts(self) -> dict[str, Any]:
        """`client_id`, `images` (channels, resolution, num_classes, shift), `class_names`, and
        `clients`: this one's number of images, in all and per class. `StoreError` if damaged."""
        return read_json(self.root / NODE, self._named(NODE))

    def first_client(self) -> int:
        return self.client_id

    def clients(self) -> list[int]:
        return [self.client_id]

    def client_path(self, client_id: int) -> Path:
        """This folder; for other clients one that is not there."""
        return self.root if client_id == self.client_id else super().client_path(client_id)

    def release_path(self, client_id: int) -> Path:
        """The store that this folder lies in, where its ledger is."""
        own = client_id == self.client_id
        return self.root.absolute().parent.parent if own else super().release_path(client_id)

    def partition(self) -> dict[str, Any] | None:
        return self.facts()

    def save_statement(self, statement: Mapping[str, Any], words: str) -> None:
        """Write what the run promises to this node's images."""
        self.write_json(self.STATEMENT, statement)
        self.write_text("statement.txt", words)


def open_run(root: Path) -> RunDirectory:
    """A run directory, a node's store that holds one run, or one of its `runs/DIGEST`.

    Of several runs in a store the finished one is taken, if it is one. `ConfigError`, one line, for
    a store with several to choose from, or with runs of earlier versions, which kept no config.
    """
    root = Path(root)
    if (root / NODE).is_file():
        return NodeRun(root)
    folders = sorted(path for path in (root / "runs").glob("*") if (path / "rounds").is_dir())
    if (root / "config.yaml").exists() or not folders:
        return RunDirectory(root)
    runs = [NodeRun(path) for path in folders if (path / NODE).is_file()]
    if not runs:
        raise ConfigError(
            f"{root}: its {len(folders)} runs are of an earlier version, which kept neither config "
            "nor shared model at a node; take part in a run with this version"
        )
    finished = [run for run in runs if run.is_finished()]
    if len(runs) == 1 or len(finished) == 1:
        return (finished or runs)[0]
    names = ", ".join(f"runs/{run.root.name} ({line(run.config().name)})" for run in runs)
    raise ConfigError(f"{root}: holds {len(runs)} runs, name one of them: {names}")
