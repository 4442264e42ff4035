"""Training steps against a hand-written AdamW, its average, FedProx, precision and draws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.training import (
    OptimizerSettings,
)
from tests.support.oracles import binomial_bounds
from tests.support.toys import Toy, X, Y, copies, same, settings, toy_trainer, train

# --- The learning rate ----------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays() -> None:
    plan = settings(lr=0.8, total_steps=200, warmup_steps=4, decay="constant")
    rates = [plan.learning_rate(step) for step in (0, 1, 2, 3, 4, 100, 500)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    plan = settings(lr=0.8, total_steps=200, warmup_steps=0, decay="cosine")
    rates = [plan.learning_rate(step) for step in (0, 50, 100, 150, 200, 999)]
    half = math.sqrt(0.5)
    expected = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half), 0.0, 0.0]
    assert rates == pytest.approx(expected, abs=1e-15)
    assert settings(lr=1.0, total_steps=10, warmup_steps=10).learning_rate(4) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(0.4 * math.pi))
    )


# --- One step after another -----------------------------------------------------------------


def adamw(batches: list[list[int]], plan: OptimizerSettings) -> tuple[np.ndarray, np.ndarray]:
    """Weights and EMA after the batches, by the formulas (Loshchilov and Hutter 2019), float64.

    The gradient of sum_j (W x + b - y)_j^2 is 2 (W x + b - y) (x, 1)'.
    """
    model = Toy()
    w = np.hstack(
        [model.network.weight.detach().numpy(), model.network.bias.detach().numpy()[:, None]]
    )
    w = w.astype(np.float64)
    ema, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    x = np.hstack([X.numpy(), np.ones((3, 1))]).astype(np.float64)
    for k, batch in enumerate(batches, start=1):
        g = np.mean([np.outer(2 * (w @ x[i] - Y[i].numpy()), x[i]) for i in batch], axis=0)
        g *= min(1.0, plan.grad_clip / np.sqrt((g**2).sum()))
        warm = min(1.0, k / max(1, plan.warmup_steps))
        lr = plan.lr * warm * 0.5 * (1 + math.cos(math.pi * (k - 1) / plan.total_steps))
        m, v = 0.9 * m + 0.1 * g, plan.beta2 * v + (1 - plan.beta2) * g**2
        step = (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - plan.beta2**k)) + 1e-8)
        w = w - lr * plan.weight_decay * w - lr * step
        decay = min(plan.ema_decay, (1 + k) / (10 + k))
        ema = decay * ema + (1 - decay) * w
    return w, ema


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3, "beta2": 0.95},
        {"grad_clip": 0.05, "lr": 0.2},
        {"ema_decay": 0.25, "warmup_steps": 0},
    ],
)
def test_steps_are_those_of_adamw_and_the_average_follows(options: dict[str, Any]) -> None:
    trainer, model = toy_trainer(**options)
    drawn: list[list[int]] = []

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(indices.tolist())
        return model.loss(indices, generator)

    report = train(trainer, model, 17, loss=loss)
    assert (report.num_steps, report.num_images, trainer.step) == (17, 68, 17)
    assert [len(batch) for batch in drawn] == [4] * 17
    w, ema = adamw(drawn, trainer.settings)
    for found, expected in ((trainer.weights(), w), (trainer.ema(), ema)):
        together = np.hstack([found["weight"].numpy(), found["bias"].numpy()[:, None]])
        assert np.allclose(together, expected, rtol=1e-4, atol=1e-5)
    # Planted fault: an average that is never updated, or always equal to the weights.
    assert not np.allclose(ema, w, atol=1e-3)
    assert not np.allclose(ema, adamw([], trainer.settings)[1], atol=1e-3)


def test_the_average_moves_from_the_first_step() -> None:
    trainer, model = toy_trainer(ema_decay=0.9999)
    before = copies(trainer.ema())
    train(trainer, model, 1)
    for name, value in trainer.weights().items():
        expected = 2 / 11 * before[name] + 9 / 11 * value
        assert torch.allclose(trainer.ema()[name], expected, atol=1e-6)


def test_reports_count_and_average() -> None:
    trainer, model = toy_trainer(lr=1e-12)
    seen: list[tuple[int, int, float]] = []
    report = train(trainer, model, 41, progress=lambda *given: seen.append(given))
    assert [given[:2] for given in seen] == [(1, 41), (21, 41), (41, 41)]
    rows = torch.arange(3)
    losses = model.loss(rows, torch.Generator()).detach()
    exact, spread = float(losses.mean()), float(losses.std())
    assert abs(report.loss - exact) < 5 * spread / math.sqrt(41 * 4)
    assert report.images_per_second == pytest.approx(164 / report.seconds)
    assert dataclasses.replace(report, seconds=0.0).images_per_second == 0.0


def test_no_steps_change_nothing() -> None:
    trainer, model = toy_trainer()
    before = copies(trainer.state())
    report = train(trainer, model, 0)
    assert (report.num_steps, report.num_images, report.loss) == (0, 0, 0.0)
    assert same(trainer.state(), before)


def test_examples_are_drawn_by_weight() -> None:
    trainer, model = toy_trainer(batch_size=10_000, lr=1e-9)
    drawn: list[torch.Tensor] = []

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(indices)
        return model.loss(indices, generator)

    train(trainer, model, 2, loss=loss, sample_weights=torch.tensor([1.0, 0.0, 3.0]).double())
    counts = torch.bincount(torch.cat(drawn), minlength=3).tolist()
    low, high = binomial_bounds(20_000, 0.75)
    assert counts[1] == 0
    assert low <= counts[2] <= high


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("auto", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_precision_on_a_cpu(precision: str, dtype: torch.dtype) -> None:
    trainer, model = toy_trainer(precision=precision)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert model.network(X[indices]).dtype == dtype
        return model.loss(indices, generator)

    train(trainer, model, 1, loss=loss)
    assert trainer.weights()["weight"].dtype == torch.float32


# --- FedProx --------------------------------------------------------------------------------


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    trainer, model = toy_trainer(grad_clip=1e9)
    anchor = {name: torch.full_like(p, 0.25) for name, p in trainer.weights().items()}
    before = copies(trainer.weights())

    def nothing(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 0.0 * model.loss(indices, generator)

    train(trainer, model, 1, loss=nothing, anchor=anchor, proximal_mu=0.3)
    moments = trainer.state()  # Adam's first moment after one step is (1 - 0.9) of the gradient
    for name, start in before.items():
        assert torch.allclose(moments[f"exp_avg.{name}"], 0.03 * (start - 0.25), atol=1e-8)


@pytest.mark.slow
def test_the_proximal_optimum_lies_between_the_clients_and_the_anchor() -> None:
    # min sum_j (b_j - 1)^2 + mu/2 (b_j - 0)^2 is b = 2 / (2 + mu): closed form, mu = 2.
    trainer, model = toy_trainer(lr=0.05, total_steps=600, warmup_steps=0)
    anchor = {name: torch.zeros_like(p) for name, p in trainer.weights().items()}

    def pull(indices: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return (
            (model.network.bias - 1).square().sum() + 0 * model.network.weight.sum() + 0 * indices
        )

    train(trainer, model, 600, loss=pull, anchor=anchor, proximal_mu=2.0)
    assert trainer.weights()["bias"].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert float(trainer.weights()["weight"].abs().max()) < 1e-3


def test_no_proximal_term_without_mu() -> None:
    anchor = {"weight": torch.full((2, 3), 9.0), "bias": torch.full((2,), 9.0)}
    outcomes = []
    for options in ({}, {"anchor": anchor}, {"anchor": anchor, "proximal_mu": 0.5}):
        trainer, model = toy_trainer()
        train(trainer, model, 5, **options)
        outcomes.append(copies(trainer.weights()))
    assert same(outcomes[0], outcomes[1])
    assert not same(outcomes[0], outcomes[2])
