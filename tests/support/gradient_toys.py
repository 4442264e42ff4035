"""Plans of noised gradients, canaries in them, and what rounds must look like from outside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clients.gradients import noised_gradient
from clients.training import LocalTraining
from fedpdm.config import RunConfig
from fedpdm.privacy.mechanism import (
    GradientParameters,
    NoisedGradients,
    ReleasedGradient,
    SeededNoise,
)
from fedpdm.privacy.noise import GRID, NoiseSource
from fedpdm.privacy.planning import ReleasePlan, plan_release
from fedpdm.privacy.releases import ReleaseRequest, ReleaseStore
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import RunSetup, build_schedule
from tests.support.federations import small_config
from tests.support.release_toys import request

MECHANISM = NoisedGradients()
CLASSES = 10
HUGE = 1e6  # a canary's gradient


def network_config(**sections: dict[str, Any]) -> RunConfig:
    """Two clients of 8x8 digits; three rounds of sums, three of gradients, one of fine steps."""
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 7},
        "partition": {"num_clients": 2},
        "coarse": {"training": "server"},
        "privacy": {"release": "network", "clip_norm": 6.0},
        "network": {"rounds": 3, "sample_rate": 0.3, "draws": 2, "warmup_steps": 2},
    }
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return small_config(**given)


def plan_of(config: RunConfig) -> tuple[ReleasePlan, GradientParameters]:
    """The whole plan of a run, and its last part."""
    plan = plan_release(config, build_schedule(config), num_classes=CLASSES)
    assert plan.gradients is not None
    return plan, plan.gradients


def parameters(**changes: Any) -> GradientParameters:
    """Of a plan without a config."""
    made = {
        "noise_multiplier": 0.8, "sample_rate": 0.3, "rounds": 5, "clip_norm": 0.5, "draws": 2,
        "run": "0123456789abcdef", "grid": GRID,
    }  # fmt: skip
    return GradientParameters(**{**made, **changes})


def noise(at: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(at))


def message(
    plan: GradientParameters, exact: Sequence[int] | np.ndarray, *, number: int = 1, seed: int = 0
) -> ReleasedGradient:
    """A round's message of this exact sum."""
    whole = np.asarray(exact, dtype=np.int64)
    return MECHANISM.noised(whole, plan, number=number, noise=noise(seed))


def asked(plan: GradientParameters, **changes: Any) -> ReleaseRequest:
    """A client's request for a plan of gradients alone."""
    return dataclasses.replace(request(**changes), parameters=plan, planned=(plan,))


def first_weights(setup: RunSetup) -> dict[str, torch.Tensor]:
    """The weights of a new network."""
    network = build_denoiser(setup, "coarse").network
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# --- Canaries ----------------------------------------------------------------------------------


def canaries(
    network: Any, loss: Any, examples: torch.Tensor, *, multiplicity: int, **_: Any
) -> Iterator[torch.Tensor]:
    """In place of `gradient_rows`: image i's gradient is a huge number i, and no other."""
    size = sum(p.numel() for p in network.parameters())
    rows = np.zeros((len(examples), size), dtype=np.float32)
    rows[np.arange(len(examples)), examples.numpy()] = HUGE
    yield torch.from_numpy(rows)


def canary_rounds(
    clients: Sequence[LocalTraining],
    plan: GradientParameters,
    *,
    rows: Callable[..., Any] = canaries,
) -> np.ndarray:
    """What clients send in all rounds of a plan of canaries, int64 (clients, rounds, d).

    The store is left out: a plan with little noise takes its accountant long.
    """
    found = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("clients.gradients.gradient_rows", rows)
        patched.setattr(
            LocalTraining, "obtain", lambda _, images, *, obtain, **__: obtain(images, None)
        )
        patched.setattr(ReleaseStore, "round", lambda _, *asked: asked[-1]())
        for client in clients:
            whole = client.setup.release_plan
            shown = dataclasses.replace(whole, rounds=(*whole.rounds[:-1], plan))
            patched.setattr(client, "setup", dataclasses.replace(client.setup, plan=shown))
            weights = first_weights(client.setup)
            sent = [noised_gradient(client, number + 1, weights) for number in range(plan.rounds)]
            found.append([one.tensors()["total"].long().numpy() for one in sent])
    return np.array(found)


def canary_fault(
    sent: np.ndarray, plan: GradientParameters, *, images: int, significance: float = 1e-6
) -> str | None:
    """How rounds of canaries (`canary_rounds`) deviate from the plan, or None.

    For plans with so little noise that every canary is seen for certain.
    """
    clients, rounds, _ = sent.shape
    step = math.sqrt(plan.limit)  # one canary
    assert step > 12 * GRID
    level = np.rint(sent[..., :images] / step).astype(int)
    if level.max() > 1:
        return f"an image adds {level.max()} times the clip norm"
    if level.min() < 0 or (level.sum(axis=2) == 0).all():
        return "canaries are missing"
    rest = sent[..., images:] / GRID  # noise alone
    count = rest.shape[2]
    tail = significance / (6 * clients * rounds)
    for client in range(clients):
        for each in rest[client]:
            low, high = (stats.chi2.ppf(p, count) for p in (tail, 1.0 - tail))
            if not low <= float(each @ each) <= high:
                return f"noise has {math.sqrt(float(each @ each) / count):.3f} of what is planned"
    flat = rest.reshape(clients * rounds, count)
    alike = np.corrcoef(flat) - np.eye(len(flat))
    if np.abs(alike).max() > stats.norm.isf(tail / len(flat)) / math.sqrt(count):
        return f"two rounds share noise: correlation {np.abs(alike).max():.2f}"
    rate = plan.sample_rate
    sizes = level.sum(axis=2).ravel()  # Binomial(images, rate) each
    expected = images * rate * (1.0 - rate)
    spread = float(((sizes - images * rate) ** 2).sum()) / expected
    low, high = (stats.chi2.ppf(p, len(sizes)) for p in (1e-5, 1.0 - 1e-5))
    if not low <= spread <= high:
        return f"batches of {sizes.min()} to {sizes.max()} images are not Poisson samples"
    each = level.reshape(clients, rounds, images).sum(axis=1)  # Binomial(rounds, rate) each
    spread = float(((each - rounds * rate) ** 2).sum()) / (rounds * rate * (1.0 - rate))
    low, high = (stats.chi2.ppf(p, each.size) for p in (1e-5, 1.0 - 1e-5))
    if not low <= spread <= high:
        return "which images are drawn depends on earlier rounds"
    drawn = level.reshape(clients * rounds, images).astype(float)
    if (np.corrcoef(drawn) - np.eye(len(drawn))).max() > 0.9:
        return "two rounds draw the same images"
    return None


# --- Noise to look at --------------------------------------------------------------------------


class NoNoise:
    """Shows what a message would be without noise."""

    description, seeded = SeededNoise.description, True

    def fill(self, out: np.ndarray) -> None:
        out[:] = 0.0


class HalfNoise(SeededNoise):
    """A planted fault."""

    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        out[:] = np.rint(out / 2.0)


QUIET: NoiseSource = NoNoise()
