"""The toy through the real release, fits and sampler: agreement with theory, and planted faults."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpdm.config.reading import toy_config_from_mapping
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gmm import make_mixture, spectrum_variances
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.noise import SeededNoise
from fedpdm.toy import (
    Clients,
    Estimate,
    LinearDenoiser,
    Models,
    Problem,
    client_counts,
    fit_linear,
    fit_means,
    measure,
    ratio_of_means,
    train_models,
)
from fedpdm.toy.denoisers import average_means
from fedpdm.toy.plan import plan
from fedpdm.toy.running import CellLines
from tests.support.oracles import GaussianPosterior, chain_moments, trailing_levels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHORT = make_schedule("linear", num_steps=100, beta_start=1e-3, beta_end=0.2)
DIM, T0, OWN, ALL, REPLICATES, SAMPLES = 4, 30, 20, 2000, 200, 1000
MINORITY = 1


def problem(**changes: object) -> Problem:
    given: dict = {
        "mixture": make_mixture(
            num_classes=2, radius=0.5, variances=spectrum_variances("unit", DIM)
        ),
        "counts": client_counts(num_clients=2, num_classes=2, num_minority=OWN, num_all=ALL),
        "schedule": SHORT,
        "t0": T0,
        "clip_norm": 1000.0,
        **changes,
    }
    return Problem(**given)


def exact(t0: int, *, num_all: int = ALL, noise: float = 1.0) -> tuple[float, float]:
    """(E W2^2 of PFDM, of training alone), from exact moments of the whole chain of 100 steps."""
    abar = SHORT.alphas_cumprod
    coarse, fine = (GaussianPosterior(abar, [m], [[1.0]]) for m in (1.0, 0.0))
    (w,), ((spread,),) = chain_moments(
        abar, trailing_levels(100, 100), lambda t: coarse if t > t0 else fine,
        mean=[0.0], cov=np.eye(1), stochastic=True,
    )  # fmt: skip
    sigma2 = noise**2 * (1 - abar[t0]) / abar[t0]
    bures = DIM * (math.sqrt(spread) - 1) ** 2
    # Weights of coarse and fine mean sum to 1 but for the start at N(0, I), 1e-4 here.
    pfdm = DIM * (w**2 * (1 + sigma2) / num_all + (1 - w) ** 2 / OWN + 2 * w * (1 - w) / num_all)
    return pfdm + bures, DIM / OWN + bures


def found_ratio(
    shown: Problem,
    models: Models,
    *,
    sampled: Problem | None = None,
    samples: int = SAMPLES,
    alone: np.ndarray | None = None,
) -> Estimate:
    """Of PFDM to training alone; `alone` are the latter's distances, where they are known."""
    options: dict = {
        "label": MINORITY, "replicates": REPLICATES, "num_samples": samples, "seed": 1
    }  # fmt: skip
    pfdm = measure(sampled or shown, models, "pfdm", **options).gaussian
    if alone is None:
        alone = measure(shown, models, "alone", **options).gaussian
    return ratio_of_means(pfdm, alone)


Fitted = tuple[Problem, Models, np.ndarray]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """Problem, models, and the distances of training alone, which no fault of PFDM changes."""
    shown = problem()
    models = fit_linear(Clients.draw(shown, replicates=REPLICATES, seed=0))
    alone = measure(shown, models, "alone", label=MINORITY, replicates=REPLICATES,
                    num_samples=SAMPLES, seed=1)  # fmt: skip
    return shown, models, alone.gaussian


@pytest.mark.slow
def test_ratio_is_the_exact_one(fitted: Fitted) -> None:
    pfdm, alone = exact(T0)
    shown, models, distances = fitted
    interval = found_ratio(shown, models, alone=distances)
    assert interval.contains(pfdm / alone)
    assert interval.high - interval.low < 0.03  # it can fail


@pytest.mark.slow
@pytest.mark.parametrize("step", [-1, 1])
def test_a_hand_over_one_step_off_is_found(fitted: Fitted, step: int) -> None:
    shown, models, distances = fitted
    pfdm, alone = exact(T0)
    interval = found_ratio(shown, models, sampled=replace(shown, t0=T0 + step), alone=distances)
    assert not interval.contains(pfdm / alone)
    moved, _ = exact(T0 + step)
    assert interval.contains(moved / alone)  # and it is that fault, no other


@pytest.mark.slow
def test_the_fine_model_above_t0_is_found(fitted: Fitted) -> None:
    shown, models, distances = fitted
    pfdm, alone = exact(T0)

    def late(x_t: torch.Tensor, t: torch.Tensor, **given: object) -> torch.Tensor:
        model: DenoisingFunction = models.fine if int(t[0]) <= T0 + 4 else models.coarse
        return model(x_t, t, **given)  # type: ignore[arg-type]

    found = found_ratio(shown, replace(models, coarse=late), alone=distances)
    assert not found.contains(pfdm / alone)
    swapped = replace(models, coarse=models.fine)
    assert found_ratio(shown, swapped, alone=distances).contains(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (0.5, False), (1.5, False)])
def test_noise_of_the_wrong_variance_is_found(
    scale: float, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few points in all, the coarse model's own error carries the noise of the releases."""

    class Scaled(SeededNoise):
        def fill(self, out: np.ndarray) -> None:
            super().fill(out)
            out *= scale

    monkeypatch.setattr("fedpdm.toy.fitting.SeededNoise", Scaled)
    few = problem(counts=torch.full((2, 2), OWN))
    models = fit_linear(Clients.draw(few, replicates=REPLICATES, seed=3))
    pfdm, alone = exact(T0, num_all=2 * OWN)
    assert found_ratio(few, models, samples=500).contains(pfdm / alone) == agrees


@pytest.mark.slow
def test_both_chains_agree() -> None:
    two = problem(chain="noise_to_noise")
    models = fit_linear(Clients.draw(two, replicates=REPLICATES, seed=0))
    # T + t0 steps are other steps than T: the fine chain starts at x_tilde itself.
    abar, unit = SHORT.alphas_cumprod, np.eye(1)
    release = GaussianPosterior(abar, [abar[T0] ** 0.5], unit)
    mean, cov = chain_moments(
        abar, trailing_levels(100, 100), lambda _: release,
        mean=[0.0], cov=unit, stochastic=True,
    )  # fmt: skip
    fine = GaussianPosterior(abar, [0.0], unit)
    (w,), ((spread,),) = chain_moments(
        abar, trailing_levels(T0, T0), lambda _: fine, mean=mean, cov=cov, stochastic=True
    )
    _, alone = exact(T0)
    assert w == pytest.approx(abar[T0], rel=0.05)
    pfdm = DIM * ((1 - w) ** 2 / OWN + (math.sqrt(spread) - 1) ** 2)
    pooled = DIM * (w**2 / abar[T0] + 2 * w * (1 - w)) / ALL
    assert found_ratio(two, models).contains((pfdm + pooled) / alone)


# --- Counts and fits ------------------------------------------------------------------------


@pytest.mark.parametrize(("num_clients", "num_classes"), [(2, 2), (3, 3), (4, 2), (2, 5), (16, 3)])
def test_counts_are_balanced_over_clients(num_clients: int, num_classes: int) -> None:
    counts = client_counts(
        num_clients=num_clients, num_classes=num_classes, num_minority=7, num_all=1001
    )
    assert counts.sum(dim=0).tolist() == [1001] * num_classes
    assert counts.shape == (num_clients, num_classes)
    assert int(counts[0, 1]) == 7  # client 0: class 0 is a majority class, class 1 a minority one
    assert int(counts[0, 0]) > 7


def test_bad_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_all must leave a point .* got 10"):
        client_counts(num_clients=3, num_classes=3, num_minority=5, num_all=10)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 5"):
        client_counts(num_clients=0, num_classes=3, num_minority=5, num_all=10)
    with pytest.raises(ValueError, match=r"t0 must be in \[1, 99\], got 100"):
        problem(t0=100)
    with pytest.raises(ValueError, match="chain must be one of"):
        problem(chain="both")
    with pytest.raises(ValueError, match="every client needs at least one point of every class"):
        problem(counts=torch.tensor([[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match=r"counts must be \(M, 2\)"):
        problem(counts=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="class 1 has no points to fit"):
        fit_means(torch.zeros(2, 2), torch.tensor([0, 2]), num_classes=3)
    models = fit_linear(Clients.draw(problem(), replicates=1, seed=0))
    with pytest.raises(ValueError, match="method must be one of alone, pfdm, central, coarse"):
        models.pair("fine")


def test_replicates_are_independent_and_seeded() -> None:
    small = problem(counts=torch.full((2, 2), 3))
    first, again = (Clients.draw(small, replicates=5, seed=1) for _ in range(2))
    other = Clients.draw(small, replicates=5, seed=2)
    assert torch.equal(first.releases[1].x_tilde, again.releases[1].x_tilde)
    assert not torch.equal(first.points[0], other.points[0])
    assert not torch.equal(first.points[0], first.points[1])
    assert len(first.points[0].unique(dim=0)) == 5 * 2 * 3
    assert first.labels[0].bincount().tolist() == [3] * 10


def test_federated_average_of_means_is_the_mean_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1])]
    points = [torch.randn((len(y), 3), generator=generator) for y in labels]
    each = [fit_means(x, y, num_classes=2) for x, y in zip(points, labels, strict=True)]
    counts = torch.stack([y.bincount() for y in labels])
    together = fit_means(torch.cat(points), torch.cat(labels), num_classes=2)
    assert torch.allclose(average_means(each, counts), together)
    assert not torch.allclose(average_means(each, torch.ones(2, 2)), together)


@pytest.mark.parametrize("different", [False, True])
def test_linear_denoiser_is_the_posterior(different: bool) -> None:
    v = torch.tensor([[0.5, 2.0], [3.0, 0.1]] if different else [[0.5, 2.0]] * 2)
    means = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    denoiser = LinearDenoiser(means, v, SHORT)
    x = torch.randn((6, 1, 1, 2), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    for t in (torch.full((6,), 40), torch.tensor([1, 5, 30, 60, 90, 100])):
        found = denoiser(x, t, labels=labels)
        for row, (level, k) in enumerate(zip(t.tolist(), labels.tolist(), strict=True)):
            oracle = GaussianPosterior(SHORT.alphas_cumprod, means[k], np.diag(v[k]))
            one = oracle(x[row : row + 1], t[row : row + 1], labels=labels[row : row + 1])
            assert torch.allclose(found[row : row + 1], one, atol=1e-4), (level, k)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["truncated", "noise_to_noise"])
def test_gradient_descent_finds_the_closed_form(chain: str) -> None:
    """The objectives' minimiser over the linear family, by another way."""
    small = problem(chain=chain, counts=torch.full((2, 2), 200), t0=20)
    clients = Clients.draw(small, replicates=1, seed=0)
    closed = fit_linear(clients)
    trained = train_models(clients, kind="linear", num_steps=700, seed=0, batch_size=512)
    for role in ("fine", "central", "coarse"):
        assert gap(getattr(trained, role), getattr(closed, role)) < 0.03, role
    # Planted fault: the other chain's coarse means, off by a factor of sqrt(abar_t0).
    other = fit_linear(replace(clients, problem=replace(small, chain=_other(chain))))
    assert gap(trained.coarse, other.coarse) > 0.06


def _other(chain: str) -> str:
    return "truncated" if chain == "noise_to_noise" else "noise_to_noise"


def gap(a: DenoisingFunction, b: DenoisingFunction) -> float:
    assert isinstance(a, LinearDenoiser)
    assert isinstance(b, LinearDenoiser)
    return float((a.network.means - b.network.means).detach().abs().max())


@pytest.mark.slow
def test_the_network_samples_the_majority_class() -> None:
    """Many points: what the small network samples is close to the truth, and to nothing else."""
    plain = problem(
        mixture=make_mixture(num_classes=2, radius=2.0, variances=spectrum_variances("unit", 2))
    )
    clients = Clients.draw(plain, replicates=1, seed=0)
    models = train_models(clients, kind="mlp", num_steps=500, seed=0)
    options: dict = {
        "replicates": 1, "num_samples": 500, "seed": 0, "scheduler": "ddim", "num_steps": 50,
        "matching": True,
    }  # fmt: skip
    good = measure(plain, models, "pfdm", label=0, **options)
    assert good.assignment is not None
    assert good.gaussian[0] < 0.1
    assert abs(good.assignment[0]) < 0.2
    with pytest.raises(ValueError, match="kind must be linear or mlp, got 'tree'"):
        train_models(clients, kind="tree", num_steps=1, seed=0)
    with pytest.raises(ValueError, match="train_models takes one replicate, got 2"):
        train_models(Clients.draw(plain, replicates=2, seed=0), kind="mlp", num_steps=1, seed=0)


def test_a_cell_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    shelf = CellLines(tmp_path / "cells.jsonl", resume=False)
    cell = plan(toy_config_from_mapping({"name": "small"}))[0]
    with pytest.raises(FloatingPointError, match=rf"toy: {cell.sweep}: w2_low is -inf"):
        shelf.keep(cell, [{"w2": 1.0, "w2_low": -math.inf}], 1.0)
    assert (tmp_path / "cells.jsonl").read_text() == ""
