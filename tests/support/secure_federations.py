"""Federations whose rounds are secure: in process, and deployed, message by message."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from fedpdm.engines.inprocess import run_in_process
from fedpdm.storage.run_directory import RunDirectory
from tests.support.deployments import (
    Federation,
    Sent,
    deployed_config,
    deployed_node,
    draw_pictures,
)
from tests.support.federations import flat, small_config

MOST = 100  # aggregation.max_examples
ONE_ROUND: dict[str, Any] = {
    "run": {"rounds": 1},
    "fine": {"steps_per_round": 0},
    "evaluation": {"image_metrics": False},
}


def coarse_weights(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = RunDirectory(root).load_checkpoint()
    assert checkpoint is not None
    return {n: t.clone() for n, t in checkpoint[1].items() if n.startswith("weights.")}


def run(out: Path, num_clients: int = 3, **aggregation: Any) -> dict[str, torch.Tensor]:
    config = small_config(
        **ONE_ROUND, partition={"num_clients": num_clients}, aggregation=aggregation
    )
    run_in_process(config, out)
    return coarse_weights(out)


def record(out: Path) -> Any:
    return json.loads((out / "metrics.json").read_text())["rounds"][0]


def farthest(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[n].double() - second[n].double()).abs().max()) for n in first)


@dataclass
class SecureFederation(Federation):
    """Nodes that keep Flower's state between messages, as its own do.

    `tamper` sees every request and what the node's app answers, and says what is sent.
    """

    tamper: Callable[[Message, Message], Message] | None = None
    states: dict[int, RecordDict] = field(default_factory=dict)

    def _context(self, node_id: int, node: Mapping[str, Any]) -> Context:
        context = super()._context(node_id, node)
        context.state = self.states.setdefault(node_id, context.state)
        return context

    def _answer(self, message: Message) -> Message:
        asked = message_from_proto(message_to_proto(message))
        kept = message_from_proto(message_to_proto(message))  # Flower's mod takes parts out of it
        reply = super()._answer(asked)
        return self.tamper(kept, reply) if self.tamper is not None else reply

    def replies(self) -> list[Sent]:
        """Answers to requests for training: four for each client and round."""
        return self.of("train")


def secure_federation(root: Path, *, num_clients: int = 3, **sections: Any) -> SecureFederation:
    """Hospitals under `root`, one round, secure unless `aggregation` says otherwise."""
    public = root / "public"
    if not public.exists():
        draw_pictures(public, seed=1, count=2, test=2)
    given = {name: dict(values) for name, values in sections.items()}
    given["aggregation"] = {
        "secure": True, "max_examples": MOST, **given.get("aggregation", {})
    }  # fmt: skip
    given["partition"] = {"num_clients": num_clients}
    given["run"] = {"rounds": 1, "simulation": False, **given.get("run", {})}
    given["evaluation"] = {"num_images": 10}
    given["coarse"] = {"steps_per_round": 1, "warmup_steps": 0, **given.get("coarse", {})}
    given["fine"] = {"steps_per_round": 0, **given.get("fine", {})}
    config = deployed_config(public, **given)
    nodes = {
        k: {**deployed_node(root, k), "num-partitions": num_clients} for k in range(num_clients)
    }
    return SecureFederation(nodes, flat(config, root / "server"))
