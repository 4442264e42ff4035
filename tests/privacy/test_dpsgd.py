"""DP-SGD steps against plain AdamW, the laws of their batches and noise, and bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpdm.diffusion.training import Trainer
from fedpdm.privacy.dpsgd import DpSgdSettings, PrivateTrainer, SeededDraws, SystemDraws
from tests.support.dpsgd_toys import UNIFORM, K, N, denoiser, diffusion_loss, drawn, rows_loss
from tests.support.oracles import binomial_bounds, normal_fault
from tests.support.toys import CPU, Toy, copies, same, seeded, settings, toy_trainer, train


def private_trainer(
    model: Any, *, options: dict[str, Any] | None = None, **privacy: Any
) -> PrivateTrainer:
    given = {"noise_multiplier": 1.0, **privacy}
    return PrivateTrainer(model, settings(**(options or {})), DpSgdSettings(**given), device=CPU)


# --- Batches and noise ----------------------------------------------------------------------


@pytest.mark.parametrize("source", [SeededDraws(seeded(4)), SystemDraws(CPU)])
def test_batches_are_poisson_and_noise_is_normal(source: Any) -> None:
    batches = [source.poisson_batch(50, rate=0.3) for _ in range(400)]
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    sizes = np.array([len(batch) for batch in batches])
    low, high = binomial_bounds(50 * 400, 0.3)
    assert low <= sizes.sum() <= high
    counts = np.bincount(torch.cat(batches).numpy(), minlength=50)
    low, high = binomial_bounds(400, 0.3, significance=1e-6 / 50)
    assert ((low <= counts) & (counts <= high)).all()
    # A fixed batch size would have no variance; that of the binomial is 50 * 0.21 = 10.5, and its
    # estimate from 400 sizes has a standard deviation of 0.74.
    assert abs(sizes.var(ddof=1) - 10.5) < 5 * 0.74
    assert source.poisson_batch(7, rate=1.0).tolist() == list(range(7))

    total = torch.full((100, 100), 3.0)
    noisy = source.add_noise(total, scale=2.0)
    assert (noisy.shape, noisy.dtype) == (total.shape, torch.float32)
    unit = (noisy.double() - 3.0).flatten().numpy() / 2.0
    assert normal_fault(unit) is None
    assert normal_fault(unit / math.sqrt(2)) is not None  # planted fault: half the variance
    assert not torch.equal(noisy, source.add_noise(total, scale=2.0))


def noise_of_a_step(**privacy: Any) -> torch.Tensor:
    """Adam's first moment over 1 - beta1: the gradient that a step without examples' part took."""
    model = Toy()
    model.network = nn.Linear(150, 100)
    trainer = private_trainer(model, **privacy)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 0.0 * model.network(torch.ones(len(indices), 150)).sum(dim=1)

    trainer.train(loss, sample_weights=torch.ones(8).double(), num_steps=1, generator=seeded(6))
    state = trainer.state()
    moments = torch.cat([state[f"exp_avg.{name}"].flatten() for name in ("weight", "bias")])
    return moments.double() / 0.1


@pytest.mark.parametrize("secure", [False, True])
def test_noise_of_a_step_has_the_stated_scale(secure: bool) -> None:
    """batch_size 4, sigma 1.5, C 0.2: standard deviation 1.5 * 0.2 / 4, whatever was drawn."""
    given = {"noise_multiplier": 1.5, "max_grad_norm": 0.2, "secure": secure}
    unit = (noise_of_a_step(**given) / (1.5 * 0.2 / 4)).numpy()
    assert normal_fault(unit) is None
    # Planted faults: half the noise; noise divided by the number that was drawn (not 4).
    assert normal_fault(0.5 * unit) is not None
    assert normal_fault(4 / 3 * unit) is not None
    repeated = torch.equal(noise_of_a_step(**given), noise_of_a_step(**given))
    assert repeated is not secure


def test_an_empty_batch_is_a_step_of_noise() -> None:
    model = Toy()
    trainer = private_trainer(model, options={"batch_size": 1})
    calls: list[int] = []

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        calls.append(len(indices))
        return model.loss(indices % 3, generator)

    weights = torch.ones(10_000, dtype=torch.float64)
    before = copies(trainer.weights())
    report = trainer.train(loss, sample_weights=weights, num_steps=8, generator=seeded(1))
    assert trainer.step == 8
    assert report.num_images == 8
    assert 0 < len(calls) < 8  # an empty batch has probability 0.37
    before, empty = copies(trainer.weights()), 0
    for seed in range(20):
        calls.clear()
        report = trainer.train(loss, sample_weights=weights, num_steps=1, generator=seeded(seed))
        assert not same(trainer.weights(), before)
        before = copies(trainer.weights())
        if not calls:
            empty += 1
            assert report.loss == 0.0
    assert empty


# --- Whole steps ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
def test_without_noise_and_bound_it_is_plain_training(strided: bool) -> None:
    """Everybody in every batch, sigma 0, C infinite: `Trainer` on the same batches and draws."""
    t, noise = drawn(N * K)

    def run(kind: str) -> dict[str, torch.Tensor]:
        model = denoiser()
        if strided:  # as on a GPU: fused Adam wants gradients laid out as the weights are
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        options = {"batch_size": N, "grad_clip": math.inf, "weight_decay": 0.1, "lr": 1e-3}
        rows = torch.arange(N).repeat_interleave(K)
        if kind == "plain":
            plain = Trainer(model, settings(**options), device=CPU)
            plain.train(
                lambda *_: rows_loss(model, rows, t, noise),
                sample_weights=UNIFORM, num_steps=3, generator=seeded(),
            )  # fmt: skip
            return copies(plain.state())
        private = private_trainer(
            model, options=options, noise_multiplier=0.0, max_grad_norm=math.inf, multiplicity=K
        )

        def loss(indices: torch.Tensor, _: torch.Generator) -> torch.Tensor:
            assert indices.tolist() == rows.tolist()
            return rows_loss(model, indices, t, noise)

        private.train(loss, sample_weights=UNIFORM, num_steps=3, generator=seeded())
        return copies(private.state())

    plain, private = run("plain"), run("private")
    assert plain.keys() == private.keys()  # names are those of the plain network
    scale = max(float(v.abs().max()) for k, v in plain.items() if k.startswith("exp_avg."))
    for name, value in plain.items():
        if name.startswith("exp_avg."):  # the gradients themselves
            assert float((value - private[name]).abs().max()) < 1e-4 * scale, name
        elif name.startswith(("model.", "ema.")):
            # Adam divides a gradient near 0 by itself: few weights may differ by a step of 1e-3.
            difference = (value - private[name]).abs()
            assert float(difference.mean()) < 2e-5, name
            assert float(difference.max()) < 3e-3, name


def test_memory_bounds_change_nothing() -> None:
    """Micro-batches of any size add up to the same step."""

    def gradient(max_rows: int) -> torch.Tensor:
        model = Toy()
        trainer = private_trainer(model, max_rows=max_rows, multiplicity=2, max_grad_norm=0.7)
        sizes: list[int] = []

        def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            sizes.append(len(indices))
            assert torch.equal(indices[::2], indices[1::2])
            return model.loss(indices % 3, generator)

        trainer.train(loss, sample_weights=torch.ones(6).double(), num_steps=2, generator=seeded(9))
        assert max(sizes) <= max(2, max_rows)
        return torch.cat([v.flatten() for k, v in trainer.state().items() if "exp_avg." in k])

    assert torch.allclose(gradient(64), gradient(3), atol=1e-6)
    assert torch.allclose(gradient(64), gradient(1), atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    def start(seed: int) -> tuple[PrivateTrainer, Callable[..., torch.Tensor]]:
        model = denoiser(seed=seed)
        trainer = private_trainer(model, options={"batch_size": 2}, multiplicity=2)
        return trainer, diffusion_loss(model)

    def chunk(trainer: Any, loss: Any, steps: int, seed: int) -> None:
        trainer.train(loss, sample_weights=UNIFORM, num_steps=steps, generator=seeded(seed))

    straight, loss = start(0)
    chunk(straight, loss, 2, 1)
    saved = copies(straight.state())
    chunk(straight, loss, 2, 2)
    resumed, loss = start(99)
    chunk(resumed, loss, 1, 7)
    resumed.load_state(saved, what="state")
    chunk(resumed, loss, 2, 2)
    assert same(resumed.state(), straight.state())
    # Planted fault: other noise.
    resumed.load_state(saved, what="state")
    chunk(resumed, loss, 2, 3)
    assert not same(resumed.state(), straight.state())
    # A plain network takes the weights as they are.
    denoiser().network.load_state_dict(straight.weights(), strict=True)


def test_a_proximal_term_pulls_without_touching_privacy() -> None:
    """It adds mu (w - anchor) after the noise: the first moments differ by 0.1 of that."""
    moments = []
    for mu in (0.0, 50.0):
        trainer = private_trainer(Toy(), options={"batch_size": 3})
        anchor = {name: value + 1.0 for name, value in copies(trainer.weights()).items()}
        train(trainer, trainer.model, 1, anchor=anchor, proximal_mu=mu)
        moments.append(trainer.state()["exp_avg.weight"])
    assert torch.allclose(moments[1] - moments[0], torch.full((2, 3), -5.0), atol=1e-4)


# --- Bad input ------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    bads: list[tuple[dict[str, Any], str]] = [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0 and finite, got -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be at least 0 and finite, got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be finite with noise_multiplier 1.0"),
        ({"multiplicity": 0}, "multiplicity must be at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
    ]
    for bad, message in bads:
        with pytest.raises(ValueError, match=re.escape(message)):
            DpSgdSettings(**{"noise_multiplier": 1.0, **bad})


def test_networks_that_mix_examples_are_refused() -> None:
    model = Toy()
    model.network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="BatchNorm1d"):
        private_trainer(model)


def test_bad_calls_are_refused() -> None:
    bads: list[tuple[torch.Tensor, dict[str, Any], str]] = [
        (torch.tensor([1.0, 1.0, 2.0, 1.0]), {}, "client 3: sample_weights must be equal"),
        (torch.zeros(4), {}, "client 3: sample_weights must be equal and positive"),
        (torch.zeros(0), {}, "client 3: sample_weights must be equal and positive"),
        (torch.ones(3), {}, "client 3: batch_size must be at most the 3 images, got 4"),
        (
            torch.ones(4),
            {"max_steps": 5},
            "client 3: the noise was calibrated for 5 steps, got 0 taken and 6 more",
        ),
    ]
    for weights, privacy, message in bads:
        trainer = private_trainer(Toy(), **privacy)
        before = copies(trainer.state())
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            trainer.train(
                trainer.model.loss,
                sample_weights=weights,
                num_steps=6,
                generator=seeded(),
                what="client 3",
            )
        assert "\n" not in str(error.value)
        assert same(trainer.state(), before)
    trainer = private_trainer(Toy(), options={"batch_size": 3})
    with pytest.raises(ValueError, match=r"batch_loss must give 3 losses, got shape \(\)"):
        train(trainer, trainer.model, 1, loss=lambda i, g: trainer.model.loss(i, g).mean())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_name_their_step(value: float) -> None:
    trainer = private_trainer(Toy(), options={"batch_size": 3})
    calls = 0

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return trainer.model.loss(indices, generator) * (value if calls == 22 else 1.0)

    with pytest.raises(FloatingPointError, match=f"^client 3: loss is {value} at step 22$"):
        train(trainer, trainer.model, 30, loss=loss, what="client 3")


def test_progress_and_report_are_those_of_a_trainer() -> None:
    private, plain = private_trainer(Toy(), options={"batch_size": 3}), toy_trainer()[0]
    seen: dict[str, list[int]] = {"private": [], "plain": []}
    for name, trainer in (("private", private), ("plain", plain)):
        report = train(
            trainer, trainer.model, 21,
            progress=lambda done, total, loss, name=name: seen[name].append(done),
        )  # fmt: skip
        assert report.num_steps == 21
        assert report.num_images == 21 * trainer.settings.batch_size
        assert report.loss > 0
    assert seen["private"] == seen["plain"]
    assert private.state().keys() == plain.state().keys()
    nothing = train(private, private.model, 0)
    assert (nothing.num_steps, private.step) == (0, 21)
