"""A Flower strategy of one's own on fedpdm's clients: every client counts alike.

    python examples/custom_strategy.py [FOLDER]

FedAvg weighs clients by their images. Here each weighs the same, however many it has, and the
server goes only part of the way to their mean. What comes of subclassing `CoarseStrategy` (a Flower
`Strategy`): updates are checked by name, shape and dtype, rounds are checkpointed, failed clients
named, runs resumed. Runs in this process; `app` is the same as a Flower ServerApp.
"""

import functools
import sys
from collections.abc import Collection
from pathlib import Path

import torch
from flwr.common import NDArrays
from flwr.server import ServerApp

import fedpdm
from fedpdm import wire
from strategies.answers import ClientAnswer
from strategies.coarse import CoarseStrategy, Weights
from strategies.server_app import server_components

SHARE = 0.8  # of the way to the mean


class ClientsAlike(CoarseStrategy):
    """w <- w + SHARE (mean over clients - w)."""

    def phase(self, round: int) -> str:
        return "coarse"

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._updates: dict[int, Weights] = {}

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        update = wire.decode_update(
            message,
            like=self.weights,
            round=round,
            who=f"client {answer.client_id}",
            encoding=self.settings.encoding,
        )
        if update.client_id != answer.client_id:
            raise wire.WireError(f"client {answer.client_id} answered as {update.client_id}")
        self._updates[answer.client_id] = dict(update.weights)

    def conclude(self, round: int) -> dict[str, float]:
        updates = [self._updates[client] for client in sorted(self._updates)]
        squares = 0.0
        for name, before in self.weights.items():
            every = torch.stack([update[name] for update in updates])
            mean = every.mean(dim=0)
            squares += float((every - mean).square().sum()) / len(updates)
            self.weights[name] = torch.lerp(before, mean, SHARE)
            self.ema[name] = self.weights[name]
        return {"disagreement": squares**0.5}  # into metrics.json, per round


app = ServerApp(server_fn=functools.partial(server_components, strategy=ClientsAlike))

if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "custom-strategy")
    config = fedpdm.configure(
        name="clients-alike",
        run={"rounds": 3},
        data={"max_images": 240},
        partition={"kind": "dirichlet", "num_clients": 3, "alpha": 1.0},
        coarse={"preset": "micro", "steps_per_round": 10},
        fine={"preset": "micro", "steps_per_round": 10},
        evaluation={"image_metrics": False},
    )
    run = fedpdm.run(config, out, strategy=ClientsAlike)
    for record in run.read_json("metrics.json")["rounds"]:
        print(f"round {record['round']}: clients disagree by {record['disagreement']:.3f}")
