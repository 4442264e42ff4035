"""Stopping and going on, loading by name, and what goes wrong in training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from fedpdm.diffusion.denoisers import Denoiser, DenoiserSpec
from fedpdm.diffusion.objectives import denoising_loss
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.training import Trainer, class_weights, select_device
from fedpdm.diffusion.weights import load_named
from tests.support.toys import CPU, copies, same, settings, toy_trainer, train

# --- Stopping and going on ------------------------------------------------------------------


def denoiser_trainer(seed: int) -> tuple[Trainer, Callable[..., torch.Tensor]]:
    spec = DenoiserSpec(
        preset=PRESETS["nano"], resolution=8, channels=1, num_classes=3, prediction="v",
        knows_clipping=False,
    )  # fmt: skip
    schedule = make_schedule("linear")
    torch.manual_seed(seed)
    model = Denoiser(spec, schedule)
    x_0 = torch.randn((6, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) % 3

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            model, schedule, x_0[indices], labels=labels[indices], t_max=1000, weighting="v",
            generator=generator,
        )  # fmt: skip

    return Trainer(model, settings(), device=CPU), loss


@pytest.mark.slow
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_resumed_run_goes_on_bit_for_bit(steps_before: int) -> None:
    def chunk(trainer: Trainer, loss: Callable[..., torch.Tensor], steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        trainer.train(
            loss, sample_weights=torch.ones(6).double(), num_steps=steps, generator=generator
        )

    straight, loss = denoiser_trainer(0)
    chunk(straight, loss, steps_before, 1)
    saved = copies(straight.state())
    chunk(straight, loss, 3, 2)
    resumed, loss = denoiser_trainer(99)
    chunk(resumed, loss, 2, 7)  # moments of another run, to be forgotten
    resumed.load_state(saved, what="state")
    assert resumed.step == steps_before
    assert same(resumed.state(), saved)
    chunk(resumed, loss, 3, 2)
    assert same(resumed.state(), straight.state())
    # Planted fault: moments that are not restored.
    forgetful, loss = denoiser_trainer(0)
    forgetful.load_weights({k[6:]: v for k, v in saved.items() if k[:6] == "model."}, what="w")
    forgetful.step = steps_before
    chunk(forgetful, loss, 3, 2)
    assert same(forgetful.weights(), straight.weights()) == (steps_before == 0)


def test_states_that_do_not_fit_are_refused() -> None:
    trainer, model = toy_trainer()
    train(trainer, model, 2)
    state = copies(trainer.state())
    assert {key.partition(".")[0] for key in state} == {
        "model", "ema", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip

    def without(prefix: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state.items() if not key.startswith(prefix)}

    for bad, message in (
        (without("step"), "what it was: step is missing"),
        ({**state, "step": torch.zeros(2)}, "what it was: step is missing or not one number"),
        ({**state, "momentum.bias": torch.zeros(2)}, "unknown entries ['momentum']"),
        (without("model.bias"), "what it was: names do not match; missing ['bias']"),
        (without("ema."), "missing ['bias', 'weight'], unexpected []"),
        (without("exp_avg_sq."), "what it was, exp_avg_sq: names do not match"),
        (without("exp_avg."), "what it was, exp_avg: names do not match"),
        ({**state, "ema.more": torch.zeros(1)}, "unexpected ['more']"),
        ({**state, "exp_avg.bias": torch.zeros(3)}, "bias must be torch.float32 (2,), got"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            toy_trainer()[0].load_state(bad, what="what it was")


# --- Loading by name ------------------------------------------------------------------------


def test_loading_copies_by_name() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(1, 3)}
    source = {"b": torch.ones(1, 3), "a": torch.tensor([1.0, 2.0])}
    load_named(target, source, what="it")
    assert target["a"].tolist() == [1, 2]
    source["a"] += 1
    assert target["a"].tolist() == [1, 2]  # a copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "it: names do not match; missing ['a'], unexpected []"),
        ({"c": torch.zeros(1)}, "it: names do not match; missing [], unexpected ['c']"),
        ({"a": torch.zeros(3)}, "it: a must be torch.float32 (2,), got torch.float32 (3,)"),
        ({"a": torch.zeros(1, 2)}, "it: a must be torch.float32 (2,), got torch.float32 (1, 2)"),
        ({"b": torch.zeros(3).double()}, "b must be torch.float32 (3,), got torch.float64 (3,)"),
        ({"b": torch.zeros(3).int()}, "b must be torch.float32 (3,), got torch.int32 (3,)"),
    ],
)
def test_what_does_not_match_is_named_and_nothing_is_loaded(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    source = {"a": torch.ones(2), "b": torch.ones(3), **change}
    given = {name: value for name, value in source.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_named(target, given, what="it")
    assert float(target["a"].sum() + target["b"].sum()) == 0.0


# --- What goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), math.inf])
@pytest.mark.parametrize("bad_step", [1, 2, 21, 22, 30])
def test_a_loss_that_is_not_finite_names_its_step(bad_step: int, value: float) -> None:
    trainer, model = toy_trainer()
    train(trainer, model, 10)
    calls = 0

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        good = model.loss(indices, generator)
        return good * value if calls == bad_step else torch.nan_to_num(good)

    message = f"^client 3 round 2: loss is {value} at step {10 + bad_step}$"
    with pytest.raises(FloatingPointError, match=message):
        train(trainer, model, 30, loss=loss, what="client 3 round 2")


def test_a_gradient_that_is_not_finite_is_noticed_in_the_last_step() -> None:
    trainer, model = toy_trainer()

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        root = (model.network.weight * 0).abs().sum().sqrt()  # 0, with an infinite slope
        return model.loss(indices, generator) + root

    with pytest.raises(FloatingPointError, match=r"^training: gradient is nan at step 1$"):
        train(trainer, model, 1, loss=loss)


def test_class_weights_interpolate_between_images_and_classes() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 5])
    assert class_weights(labels, balance=0.0).tolist() == [1.0] * 7
    even = class_weights(labels, balance=1.0)
    assert even.dtype == torch.float64
    assert even.tolist() == [0.25] * 4 + [0.5] * 2 + [1.0]
    totals = [float(even[labels == k].sum()) for k in (0, 2, 5)]
    assert totals == pytest.approx([1.0, 1.0, 1.0])  # classes that are not there get nothing
    assert class_weights(labels, balance=0.5).tolist() == pytest.approx(
        [0.5] * 4 + [2**-0.5] * 2 + [1.0]
    )
    for balance in (-0.1, 1.1, float("nan")):
        message = re.escape(f"class_balance must be in [0, 1], got {balance}")
        with pytest.raises(ValueError, match=message):
            class_weights(labels, balance=balance)


def test_devices_are_checked() -> None:
    assert select_device("cpu") == CPU
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"run.device '{name}' cannot be used here: ") as error:
            select_device(name)
        assert "\n" not in str(error.value)
