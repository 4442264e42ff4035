"""A small model for the tests of training, where the right answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedpdm.diffusion.training import OptimizerSettings, Trainer, TrainReport

CPU = torch.device("cpu")
X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0], [2.0, 2.0, -1.0]])
Y = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.5, 0.5]])
EVEN = torch.ones(3, dtype=torch.float64)


class Toy(nn.Module):
    """Stands for a denoiser: a linear map where the U-Net would be."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 2)

    def loss(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (self.network(X[indices]) - Y[indices]).square().sum(dim=1)


def settings(**options: Any) -> OptimizerSettings:
    given = {"lr": 0.01, "batch_size": 4, "total_steps": 30, "warmup_steps": 3, **options}
    return OptimizerSettings(**given)


def toy_trainer(seed: int = 0, **options: Any) -> tuple[Trainer, Toy]:
    model = Toy(seed)
    return Trainer(model, settings(**options), device=CPU), model  # type: ignore[arg-type]


def train(trainer: Trainer, model: Toy, steps: int, seed: int = 0, **options: Any) -> TrainReport:
    given = {"sample_weights": EVEN, "num_steps": steps, **options}
    loss = given.pop("loss", model.loss)
    return trainer.train(loss, generator=torch.Generator().manual_seed(seed), **given)


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
