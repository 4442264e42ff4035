"""Frechet distances at infinity and KID over subsets: exact values, loops and torch-fidelity."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from fedpdm.evaluation.metrics import (
    FeatureStatistics,
    FrechetReference,
    frechet_at_infinity,
    gaussian_statistics,
    kernel_distance,
    kernel_distance_of_subsets,
)
from tests.support.pixels import exactly

RNG = np.random.default_rng


def gaussian(width: int) -> FeatureStatistics:
    return FeatureStatistics(mean=np.zeros(width), cov=np.eye(width), num_examples=1000)


# --- Frechet distance -----------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [12, 20, 200])  # fewer than, as many as, more than d
def test_distance_to_a_reference_is_the_matrix_root(num_rows: int) -> None:
    rng = RNG(0)
    rows, real = (
        rng.normal(size=(num_rows, 20)) * 2 + 1,
        rng.normal(size=(300, 20)) @ np.diag(rng.uniform(0.1, 2, size=20)),
    )
    target, own = gaussian_statistics(real), gaussian_statistics(rows)
    shifted = own.cov + 1e-13 * np.eye(20)  # sqrtm wants full rank
    root = scipy.linalg.sqrtm(shifted @ target.cov).real
    wanted = ((own.mean - target.mean) ** 2).sum() + np.trace(own.cov + target.cov - 2 * root)
    assert FrechetReference(target).distance(rows) == pytest.approx(wanted, rel=1e-5)


def test_distance_to_a_reference_agrees_with_torch_fidelity() -> None:
    rng = RNG(1)
    made, real = rng.normal(size=(500, 16)) * 1.2, rng.normal(size=(400, 16)) + 0.3
    parts = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (made, real)]
    wanted = fid_statistics_to_metric(*parts, False)["frechet_inception_distance"]
    got = FrechetReference(gaussian_statistics(real)).distance(made)
    assert got == pytest.approx(wanted, rel=1e-6)


def test_extrapolation_removes_most_of_the_bias() -> None:
    """Draws of the reference's own Gaussian: 0 at infinity, and far above at every N."""
    width, rng = 16, RNG(2)
    reference = FrechetReference(gaussian(width))
    plain, limit = [], []
    for _ in range(20):
        rows = rng.normal(size=(1000, width))
        plain.append(reference.distance(rows))
        limit.append(frechet_at_infinity(rows, reference, rng=rng).value)
    # ||mean||^2 is d / N on average, the roots of the covariance give d (d + 1) / (4 N) more.
    assert np.mean(plain) == pytest.approx((width + width * (width + 1) / 4) / 1000, rel=0.1)
    error = np.std(limit) / 20**0.5
    assert abs(np.mean(limit)) < 4 * error + 0.1 * np.mean(plain)
    assert np.mean(plain) > 8 * error  # which the plain distance would not pass


def test_extrapolation_finds_a_known_distance() -> None:
    """N(m, s^2 I) against N(0, I): ||m||^2 + d (s - 1)^2."""
    rng, width = RNG(3), 8
    rows = rng.normal(size=(4000, width)) * 1.5 + 0.5
    wanted = width * (0.25 + 0.25)
    got = frechet_at_infinity(rows, gaussian(width), rng=rng)
    assert got.value == pytest.approx(wanted, rel=0.05)
    assert got.sizes[0] == 1000
    assert got.sizes[-1] == 4000
    assert (np.diff(got.sizes) > 0).all()
    # The last point is the distance of all rows, and the line is numpy's.
    assert got.distances[-1] == pytest.approx(FrechetReference(gaussian(width)).distance(rows))
    design = np.stack([np.ones(len(got.sizes)), 1 / got.sizes], axis=1)
    line = np.linalg.lstsq(design, got.distances, rcond=None)[0]
    assert (got.value, got.slope) == pytest.approx(tuple(line), rel=1e-6)


def test_extrapolation_follows_its_rng_alone() -> None:
    rows = RNG(4).normal(size=(200, 8))
    first, again, other = (
        frechet_at_infinity(rows, gaussian(8), rng=RNG(seed)).value for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_few_rows_still_have_a_line() -> None:
    got = frechet_at_infinity(RNG(7).normal(size=(65, 64)), gaussian(64), rng=RNG(0))
    assert got.sizes[0] == 32
    assert np.isfinite(got.value)
    assert got.value < got.distances[-1]


def test_extrapolation_refuses() -> None:
    rows, target = np.zeros((10, 2)), gaussian(2)
    for smallest in (1, 10):
        message = f"smallest must be in [2, 9], got {smallest}"
        with pytest.raises(ValueError, match=exactly(message)):
            frechet_at_infinity(rows, target, rng=RNG(0), smallest=smallest)
    with pytest.raises(ValueError, match=exactly("num_sizes must be at least 2, got 1")):
        frechet_at_infinity(rows, target, rng=RNG(0), num_sizes=1)
    with pytest.raises(ValueError, match="N at least 4, got"):
        frechet_at_infinity(rows[:3], target, rng=RNG(0))
    message = "features and the reference must have equally many values per row, got 2 and 3"
    with pytest.raises(ValueError, match=exactly(message)):
        frechet_at_infinity(rows, gaussian(3), rng=RNG(0))


# --- KID ------------------------------------------------------------------------------------


def test_kernel_distance_of_subsets_is_the_loop() -> None:
    rng = RNG(8)
    a, b = rng.normal(size=(300, 5)), rng.normal(size=(280, 5)) + 0.2
    got = kernel_distance_of_subsets(a, b, rng=RNG(9), num_subsets=12, subset_size=50)
    again, values = RNG(9), []
    for _ in range(12):
        first, second = (again.choice(len(rows), 50, replace=False) for rows in (a, b))
        values.append(kernel_distance(a[first], b[second]))
    assert got.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert got.std == pytest.approx(np.std(values), rel=1e-9)


def test_kernel_distance_of_whole_sets_is_torch_fidelitys() -> None:
    rng = RNG(10)
    a, b = rng.normal(size=(200, 6)), rng.normal(size=(200, 6)) * 1.3
    got = kernel_distance_of_subsets(a, b, rng=rng, num_subsets=3, subset_size=200)
    wanted = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=200, verbose=False
    )
    assert got.mean == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-9)
    assert got.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_defaults() -> None:
    a, b = RNG(11).normal(size=(2, 300, 3))
    got = kernel_distance_of_subsets(a, b[:80], rng=RNG(0))
    assert (got.subset_size, got.num_subsets) == (40, 100)
    assert got.mean == pytest.approx(kernel_distance(a, b[:80]), abs=2 * got.std)
    large = RNG(12).normal(size=(2, 2000, 64))
    started = time.process_time()
    assert kernel_distance_of_subsets(*large, rng=RNG(0)).subset_size == 1000
    assert time.process_time() - started < 5


def test_kernel_distance_of_subsets_refuses() -> None:
    a = np.zeros((30, 2))
    for size in (1, 21):
        message = f"subset_size must be in [2, 20], got {size}"
        with pytest.raises(ValueError, match=exactly(message)):
            kernel_distance_of_subsets(a, a[:20], rng=RNG(0), subset_size=size)
    with pytest.raises(ValueError, match=exactly("num_subsets must be at least 1, got 0")):
        kernel_distance_of_subsets(a, a, rng=RNG(0), num_subsets=0)
    with pytest.raises(ValueError, match=exactly("degree must be at least 1, got 0")):
        kernel_distance_of_subsets(a, a, rng=RNG(0), degree=0)
