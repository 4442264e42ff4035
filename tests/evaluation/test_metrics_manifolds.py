"""Precision, recall, density and coverage against loops, a closed form and another library."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from fedpdm.evaluation.metrics import (
    density_coverage,
    expected_coverage,
    manifold_scores,
    precision_recall,
)
from tests.support.pixels import exactly

RNG = np.random.default_rng


def test_density_coverage_is_the_double_loop() -> None:
    rng, k = RNG(0), 4
    real, made = rng.normal(size=(270, 3)) + 5, rng.normal(size=(90, 3)) * 0.7 + 5.3
    radii = [sorted(math.dist(x, other) for other in real)[k] for x in real]
    inside = [[math.dist(x, y) <= r for y in made] for x, r in zip(real, radii, strict=True)]
    got = density_coverage(real, made, k=k)
    assert got.density == pytest.approx(sum(map(sum, inside)) / (k * len(made)))
    assert got.coverage == pytest.approx(sum(map(any, inside)) / len(real))


@pytest.mark.parametrize(("num_real", "num_made", "k"), [(60, 60, 5), (40, 100, 1), (100, 40, 3)])
def test_coverage_of_one_distribution_has_its_known_mean(
    num_real: int, num_made: int, k: int
) -> None:
    rng = RNG(1)
    draws = np.array(
        [
            density_coverage(
                rng.normal(size=(num_real, 7)), rng.normal(size=(num_made, 7)), k=k
            ).coverage
            for _ in range(300)
        ]
    )
    error = 4 * draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - expected_coverage(num_real, num_made, k=k)) < error
    # Planted fault: one neighbour more.
    assert abs(draws.mean() - expected_coverage(num_real, num_made, k=k + 1)) > error


def test_density_is_about_one_for_one_distribution_and_not_fooled_by_an_outlier() -> None:
    rng = RNG(2)
    real, made = rng.normal(size=(2, 500, 4))
    assert density_coverage(real, made, k=5).density == pytest.approx(1, abs=0.1)
    # One real outlier has a ball that reaches back to the others and holds everything between.
    outlier = np.concatenate([real, np.full((1, 4), 40.0)])
    between = rng.normal(size=(500, 4)) * 0.1 + 30
    assert precision_recall(outlier, between, k=5).precision == 1.0
    got = density_coverage(outlier, between, k=5)
    assert got.density == pytest.approx(0.2)
    assert got.coverage == pytest.approx(1 / 501)


def test_one_copied_image_is_precise_and_covers_little() -> None:
    real = RNG(3).normal(size=(400, 6))
    got = manifold_scores(real, np.repeat(real[:1], 100, axis=0))
    assert got.precision == 1.0
    assert got.recall <= 1 / 400
    assert got.coverage < 0.05


def test_copies_are_inside_whatever_the_offset() -> None:
    """Distances from a matrix product: copies, also of repeated points, stay at distance 0."""
    real = RNG(4).normal(size=(300, 8)) + 1e4
    real[:20] = real[0]  # balls of radius 0
    got = manifold_scores(real, real)
    assert (got.precision, got.recall, got.coverage) == (1.0, 1.0, 1.0)
    far = manifold_scores(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_precision_recall_agrees_with_torch_fidelity() -> None:
    real, made = RNG(5).normal(size=(2, 400, 20)) * np.array([1.0, 0.8])[:, None, None]
    wanted = calculate_precision_recall_full(torch.from_numpy(made), torch.from_numpy(real), 3)
    got = manifold_scores(real, made, k=3)
    assert (got.precision, got.recall) == pytest.approx(wanted, abs=1e-6)
    assert got.precision != pytest.approx(got.recall, abs=0.02)


def test_two_thousand_against_two_thousand_is_fast() -> None:
    real, made = RNG(6).normal(size=(2, 2000, 64))
    started = time.process_time()
    manifold_scores(real, made)
    assert time.process_time() - started < 5


def test_manifolds_refuse() -> None:
    few, many = np.zeros((3, 2)), np.zeros((9, 2))
    with pytest.raises(ValueError, match=exactly("k must be in [1, 2], got 5")):
        density_coverage(few, many, k=5)
    assert density_coverage(many, few, k=5).coverage == 1.0
    with pytest.raises(ValueError, match=r"^generated_features must have shape .* got \(0, 2\)$"):
        density_coverage(many, few[:0], k=5)
    with pytest.raises(ValueError, match="must have equally many values per row, got 2 and 1"):
        manifold_scores(many, many[:, :1])
