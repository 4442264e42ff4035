"""Rounds of noised gradients: single images, noise, who is drawn; and that faults are seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from clients.training import LocalTraining
from fedpdm.privacy.dpsgd import SeededDraws, SystemDraws, gradient_rows
from fedpdm.privacy.mechanism import (
    gradients,
    noised_round,
)
from fedpdm.privacy.noise import GRID, SystemNoise
from fedpdm.privacy.planning import build_gradient_noise, build_samples
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.losses import network_losses
from fedpdm.setup.run_setup import set_up
from tests.support.dpsgd_toys import K, denoiser, drawn, rows_loss
from tests.support.federations import client_of
from tests.support.gradient_toys import (
    MECHANISM,
    HalfNoise,
    canaries,
    canary_fault,
    canary_rounds,
    message,
    network_config,
    noise,
    parameters,
)
from tests.support.oracles import moments_fault, normal_fault

# --- Gradients of single images ----------------------------------------------------------------


def given_draws(
    model: Any, indices: torch.Tensor, draws: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Losses whose k-th row of the i-th example has draw i K + k, whoever else is asked for."""
    at = {int(example): i for i, example in enumerate(indices)}

    def losses(examples: torch.Tensor) -> torch.Tensor:
        place = [at[example] * K + k for example in examples.tolist() for k in range(K)]
        t, noises = (each[place] for each in draws)
        return rows_loss(model, examples.repeat_interleave(K), t, noises)

    return losses


@pytest.mark.parametrize("max_rows", [1, 6, 64])
def test_rows_are_the_mean_of_autograd_on_each_draw_of_an_image(max_rows: int) -> None:
    model, chosen = denoiser(), torch.tensor([3, 0, 4])
    draws = drawn(3 * K)
    losses = given_draws(model, chosen, draws)
    pieces = list(gradient_rows(model.network, losses, chosen, multiplicity=K, max_rows=max_rows))
    assert len(pieces) == {1: 3, 6: 2, 64: 1}[max_rows]
    ours = torch.cat(pieces).numpy()
    weights = list(model.network.parameters())
    for row, example in enumerate(chosen.tolist()):
        singles = []
        for k in range(K):
            t, noises = (each[row * K + k, None] for each in draws)
            loss = rows_loss(model, torch.tensor([example]), t, noises).sum()
            found = torch.autograd.grad(loss, weights)
            singles.append(torch.cat([g.flatten() for g in found]).double().numpy())
        mean = np.mean(singles, axis=0)
        assert np.abs(ours[row] - mean).max() < 1e-4 * np.abs(mean).max() + 1e-7
        # Planted: one draw alone, or their sum, is something else.
        assert np.abs(singles[0] - mean).max() > 0.1 * np.abs(mean).max()
        assert np.linalg.norm(K * mean - ours[row]) > np.linalg.norm(mean)
    assert ours.dtype == np.float32


def test_an_empty_sample_has_no_gradients() -> None:
    """It happens by chance, and must look like any other."""
    model = denoiser()
    loss = given_draws(model, torch.tensor([0]), drawn(K))
    nobody = torch.zeros(0, dtype=torch.int64)
    found = gradient_rows(model.network, loss, nobody, multiplicity=K)
    sent = noised_round(found, parameters(), number=2, size=9, noise=noise())
    assert sent.total.shape == (9,)
    assert int(sent.round) == 2


def test_a_network_is_trained_at_its_levels_on_the_clients_images() -> None:
    config = network_config(network={"lowest_t": 400, "highest_t": 900}, sampling={"handover": 500})
    setup = set_up(config)
    model = build_denoiser(setup, "coarse").eval()
    images = np.full((2, 3, 8, 8), 255, dtype=np.uint8)
    images[1] = 0
    losses = network_losses(
        setup, model, images=images, labels=np.array([4, 9]), draws=200,
        device=torch.device("cpu"), stream=lambda index: torch.Generator().manual_seed(index),
    )  # fmt: skip
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_: Any, inputs: Any, given: dict[str, Any]) -> None:
        asked.append((inputs[0].detach(), inputs[1]))

    with torch.no_grad():
        model.register_forward_pre_hook(watch, with_kwargs=True)
        values, alone = losses(torch.tensor([0, 1])), losses(torch.tensor([1]))
    (x_t, t), (x_alone, t_alone) = asked
    assert values.shape == (400,)
    assert 400 <= int(t.min()) < 420
    assert 880 < int(t.max()) <= 900
    # At a t below 500 something of the picture is left: white, or the shift, which is black.
    first = torch.arange(400) < 200
    white, black = (float(x_t[chosen & (t < 500)].mean()) for chosen in (first, ~first))
    assert white > 0.3
    assert abs(black) < 0.05
    # What an image is noised with says nothing of who else is drawn.
    assert torch.equal(t[200:], t_alone)
    assert torch.equal(x_t[200:], x_alone)
    assert torch.allclose(values[200:], alone, rtol=1e-4)


# --- Noise -------------------------------------------------------------------------------------


def test_noise_is_whole_gaussian_and_knows_nothing_of_the_sum() -> None:
    plan, size = parameters(), 60_000
    rng = np.random.default_rng(9)
    sums = [np.zeros(size, dtype=np.int64), rng.integers(-(10**6), 10**6, size)]
    sent = [message(plan, each, seed=5).total.long().numpy() for each in sums]
    np.testing.assert_array_equal(sent[1] - sums[1], sent[0])  # the same noise, to the digit
    for values in (sent[0], noised(plan, size, SystemNoise()), noised(plan, size, SystemNoise())):
        assert normal_fault(values / GRID) is None
    pair = np.stack([noised(plan, size, SystemNoise()) / GRID for _ in range(2)], axis=1)
    assert moments_fault(pair, [0.0, 0.0], np.eye(2)) is None
    half = noised(plan, size, HalfNoise(np.random.SeedSequence(5)))
    assert normal_fault(half / GRID) is not None


def noised(plan: gradients.GradientParameters, size: int, source: Any) -> np.ndarray:
    sent = MECHANISM.noised(np.zeros(size, dtype=np.int64), plan, number=1, noise=source)
    return sent.total.numpy().astype(np.float64)


def test_outside_simulation_noise_and_samples_are_the_operating_systems() -> None:
    config = network_config(run={"simulation": False}, partition={"kind": "iid"})
    own = {"client": 0, "number": 1}
    assert isinstance(build_gradient_noise(config, **own), SystemNoise)
    assert isinstance(build_samples(config, **own), SystemDraws)
    assert isinstance(build_samples(network_config(), **own), SeededDraws)


def test_no_two_plans_rounds_or_clients_share_noise_or_samples() -> None:
    """In simulation, where both come from the seed."""
    config = network_config()
    others = [
        (config, {"client": 0, "number": 2}),
        (config, {"client": 1, "number": 1}),
        (network_config(fine={"lr": 0.5}), {"client": 0, "number": 1}),
        (network_config(privacy={"noise_draw": 1}), {"client": 0, "number": 1}),
    ]

    def drawn(config: Any, key: dict[str, int]) -> tuple[np.ndarray, list[int]]:
        values = np.empty(500, dtype=np.float32)
        build_gradient_noise(config, **key).fill(values)
        return values, build_samples(config, **key).poisson_batch(500, rate=0.5).tolist()

    first, again = (drawn(config, {"client": 0, "number": 1}) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]
    for other in others:
        values, chosen = drawn(*other)
        assert abs(float(np.corrcoef(first[0], values)[0, 1])) < 0.3
        assert chosen != first[1]


# --- Rounds of canaries, from outside ----------------------------------------------------------

CANARIES = parameters(noise_multiplier=0.05, rounds=12)


@pytest.fixture(scope="module")
def two_clients(tmp_path_factory: pytest.TempPathFactory) -> list[LocalTraining]:
    config = network_config(data={"max_images": 80})
    root = tmp_path_factory.mktemp("canaries") / "run"
    return [client_of(config, root, client).work for client in range(2)]


def fault_of(clients: list[LocalTraining], **options: Any) -> str | None:
    images = min(len(client.local.held.train) for client in clients)
    sent = canary_rounds(clients, CANARIES, **options)
    return canary_fault(sent, CANARIES, images=images)


def unclipped(rows: torch.Tensor, *, steps: float, limit: int) -> torch.Tensor:
    return (rows.clamp(max=9.0).double() * steps).round().sum(dim=0)


def apart(*given: Any, multiplicity: int, **options: Any) -> Iterator[torch.Tensor]:
    for rows in canaries(*given, multiplicity=1, **options):
        yield rows.repeat_interleave(multiplicity, dim=0)


class Drawing:
    """Samples by a rule that is no Poisson sampling."""

    def __init__(self, rule: Callable[..., Any], at: tuple[int, int]) -> None:
        self.rule, self.rng = rule, np.random.default_rng(at)

    def poisson_batch(self, count: int, *, rate: float) -> torch.Tensor:
        return torch.from_numpy(np.sort(self.rule(self.rng, count, round(rate * count))))


def drawing(rule: Callable[..., Any]) -> Callable[..., Drawing]:
    return lambda _, *, client, number: Drawing(rule, (client, number))


FAULTS: dict[str, tuple[str, Any, str]] = {
    "no clipping": (
        "fedpdm.privacy.mechanism.gradients.sum_of_whole", unclipped, "times the clip norm"
    ),
    "half the noise": (
        "build_gradient_noise",
        lambda _, *, client, number: HalfNoise(np.random.SeedSequence((client, number))),
        "noise has 0.50",
    ),
    "the same noise in two rounds": (
        "build_gradient_noise", lambda config, *, client, number:
        build_gradient_noise(config, client=client, number=1 + number % 11), "share noise"
    ),
    "the same noise at two clients": (
        "build_gradient_noise", lambda config, *, client, number:
        build_gradient_noise(config, client=0, number=number), "share noise"
    ),
    "a sample of fixed size": (
        "build_samples",
        drawing(lambda rng, count, size: rng.choice(count, size, replace=False)),
        "not Poisson samples",
    ),
    "the same sample in all rounds": (
        "build_samples", lambda config, *, client, number:
        build_samples(config, client=client, number=1),
        "depends on earlier rounds|not Poisson samples",  # twelve equal sizes are none either
    ),
    "the same sample at two clients": (
        "build_samples", lambda config, *, client, number:
        build_samples(config, client=0, number=number), "draw the same images"
    ),
    "an image drawn twice": (
        "build_samples",
        drawing(lambda rng, count, size: rng.choice(count, size, replace=True)),
        "times the clip norm",
    ),
}  # fmt: skip


@pytest.mark.slow
def test_rounds_are_what_the_plan_says(two_clients: list[LocalTraining]) -> None:
    assert fault_of(two_clients) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_rounds_are_seen(
    two_clients: list[LocalTraining], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, planted, words = FAULTS[name]
    monkeypatch.setattr(where if "." in where else f"clients.gradients.{where}", planted)
    found = fault_of(two_clients)
    assert found is not None
    assert re.search(words, found), found


@pytest.mark.slow
def test_draws_that_are_clipped_apart_are_seen(two_clients: list[LocalTraining]) -> None:
    assert fault_of(two_clients, rows=apart) == "an image adds 2 times the clip norm"
