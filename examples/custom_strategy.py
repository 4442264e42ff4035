"""A custom Flower strategy on fedpdm's clients: every client counts alike.

    python examples/custom_strategy.py [FOLDER]

In a config, beside this file: `aggregation.method: custom_strategy:ClientsAlike`. Each client
weighs the same, not by its images; the server goes part of the way to their mean.
"""

import sys

import torch

import fedpdm
from strategies.coarse import CoarseStrategy

SHARE = 0.8  # of the way to the mean


class ClientsAlike(CoarseStrategy):
    """w <- w + SHARE (mean over clients - w)."""

    def merge(self, round: int) -> dict[str, float]:
        squares = 0.0
        for name, before in self.weights.items():
            every = torch.stack([update.weights[name] for update in self.updates])
            mean = every.mean(dim=0)
            squares += float((every - mean).square().sum()) / len(every)
            self.weights[name] = torch.lerp(before, mean, SHARE)
        return {"disagreement": squares**0.5}  # into metrics.json, per round


if __name__ == "__main__":
    few, quick = {"preset": "nano", "steps_per_round": 10}, {"image_metrics": False}
    config = fedpdm.configure(
        run={"rounds": 3}, data={"max_images": 240}, coarse=few, fine=few, evaluation=quick,
        partition={"kind": "dirichlet", "num_clients": 3, "alpha": 1.0},
    )  # fmt: skip
    run = fedpdm.run(config, (sys.argv[1:] or ["custom-strategy"])[0], strategy=ClientsAlike)
    for record in run.read_json("metrics.json")["rounds"]:
        print(f"round {record['round']}: clients disagree by {record['disagreement']:.3f}")
