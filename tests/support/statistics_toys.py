"""Class statistics of small images: rounds, requests, noise to look at, and attacks on both."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import ImageSet
from fedpdm.privacy.mechanism import (
    ClassStatistics,
    ReleaseSource,
    SeededNoise,
    StatisticsParameters,
)
from fedpdm.privacy.mechanism.whole import pack_symmetric
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.planning import plan_release
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.setup.run_setup import build_schedule
from tests.support.federations import small_config
from tests.support.release_toys import request

MECHANISM = ClassStatistics()
SIDE, CLASSES, COMPONENTS = 4, 3, 3
PIXELS = SIDE * SIDE


def statistics_config(
    *, epsilon: float = 10.0, clip_norm: float = 2.0, rounds: int = 3, **keys: Any
) -> RunConfig:
    return small_config(
        run={"rounds": rounds},
        coarse={"training": "server"},
        privacy={"release": "statistics", "epsilon": epsilon, "clip_norm": clip_norm},
        statistics={"directions": 5, **keys},
    )


def rounds(**changes: Any) -> tuple[StatisticsParameters, ...]:
    """The rounds of a run on 4x4 images of three classes."""
    moves = 3 + changes.get("component_rounds", 3) if changes.get("components", 1) > 1 else 3
    config = statistics_config(**changes, rounds=moves)
    plan = plan_release(config, build_schedule(config), num_classes=CLASSES)
    return plan.rounds  # type: ignore[return-value]


def public(*, seed: int = 0) -> dict[str, torch.Tensor]:
    """Means, orthonormal directions and centres as a server makes them."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(PIXELS, PIXELS)))[0]
    means = rng.normal(size=(CLASSES, PIXELS)) * 0.1
    centers = rng.normal(size=(CLASSES * COMPONENTS, 5)) * 0.5
    return {
        "means": torch.from_numpy(means).float(),
        "directions": torch.from_numpy(rotation[:5].copy()).float(),
        "centers": torch.from_numpy(centers).float(),
    }


def asked(
    stage: int, *, made: tuple[StatisticsParameters, ...] | None = None, **changes: Any
) -> ReleaseRequest:
    """A client's request for one round."""
    planned = made or rounds()
    seen = changes.pop("public", None) or public()
    return dataclasses.replace(
        request(**changes), parameters=planned[stage], planned=planned, public=seen
    )


class NoNoise:
    """Shows what a release would be without noise."""

    description, seeded = "none: for tests", True

    def fill(self, out: np.ndarray) -> None:
        out[:] = 0.0


class HalfNoise(SeededNoise):
    """A planted fault."""

    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        out[:] = np.rint(out / 2.0)


def source(images: np.ndarray, labels: np.ndarray | None = None) -> ReleaseSource:
    """uint8 (N, 4, 4) as a client's images, all of class 0 by default."""
    shaped = images.reshape(-1, 1, SIDE, SIDE).astype(np.uint8)
    given = np.zeros(len(shaped), dtype=np.int64) if labels is None else labels
    return ReleaseSource(images=shaped, labels=given, public=public())


def source_of(images: ImageSet) -> ReleaseSource:
    return ReleaseSource(images=images.images, labels=images.labels, public=public())


def made(
    mechanism: ClassStatistics, given: ReleaseSource, parameters: StatisticsParameters, noise: Any
) -> np.ndarray:
    """The sums that are sent, int64 (rows, n)."""
    return [part.copy() for part in mechanism.make(given, parameters, noise)][1]


def moved(mechanism: ClassStatistics, a: np.ndarray, b: np.ndarray, parameters: Any) -> np.ndarray:
    """Squared distance, in whole steps, of sums in which image a[i] is replaced by b[i].

    Of uint8 (n, 16). By |aa' - bb'|^2 = |a|^4 + |b|^4 - 2 (a.b)^2 for products.
    """
    directions = public()["directions"].numpy()
    x, y = (mechanism.contributions(source(each), parameters, directions) for each in (a, b))
    if not parameters.products:
        return np.vecdot(x - y, x - y)
    xx, yy, xy = np.vecdot(x, x), np.vecdot(y, y), np.vecdot(x, y)
    return xx * xx + yy * yy - 2 * xy * xy


def largest_move(
    mechanism: ClassStatistics, parameters: Any, *, generations: int = 120, seed: int = 0
) -> float:
    """The most that a search finds for any pair of images to move a sum, in whole steps."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, 400, PIXELS))
    best, width = 0.0, 120.0
    for _ in range(generations):
        score = moved(mechanism, a, b, parameters)
        best = max(best, float(score.max()))
        order = np.argsort(-score)[:20]
        parents = order[rng.integers(0, 20, 380)]
        change = rng.normal(size=(2, 380, PIXELS)) * width * (rng.random((2, 380, PIXELS)) < 0.3)
        a = np.concatenate([a[order], np.clip(np.rint(a[parents] + change[0]), 0, 255)])
        b = np.concatenate([b[order], np.clip(np.rint(b[parents] + change[1]), 0, 255)])
        width = max(2.0, width * 0.96)
    return math.sqrt(best)


def audited_mu(
    mechanism: ClassStatistics, parameters: Any, noise: Any, *, draws: int = 600
) -> float:
    """The distance of two neighbours' releases over the spread of one: what an attacker measures
    who knows all images but one, which is one of two at the clip bound."""
    rng = np.random.default_rng(5)
    others = rng.integers(0, 256, (6, PIXELS))
    dark, light = np.zeros(PIXELS), np.full(PIXELS, 255.0)
    half = np.where(np.arange(PIXELS) % 2, 255.0, 0.0)
    pair = (dark, light) if parameters.stage == "means" else (light, half)
    a, b = (source(np.vstack([others, each])) for each in pair)
    exact = [made(mechanism, each, parameters, NoNoise())[0].astype(float) for each in (a, b)]
    gap = exact[0] - exact[1]
    along = gap / np.linalg.norm(gap)
    seen = [made(mechanism, a, parameters, noise(at))[0].astype(float) for at in range(draws)]
    spread = np.std((np.array(seen) - exact[0]) @ along)
    return float(np.linalg.norm(gap) / spread) if spread > 1e-9 else math.inf


def packed_sum(whole: np.ndarray) -> np.ndarray:
    """The packed sum of a a^T by Python's whole numbers, one product at a time."""
    size = whole.shape[1]
    total = [[sum(int(a[i]) * int(a[j]) for a in whole) for j in range(size)] for i in range(size)]
    return pack_symmetric(np.array(total, dtype=np.int64).reshape(size, size))


def seeded(at: int) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(at))


ONE_SIGMA = float(GRID)
