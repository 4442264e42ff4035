"""Distances of features, and pixel features, against closed forms and loops."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from fedpdm.evaluation.metrics import (
    PixelFeatures,
    frechet_distance,
    gaussian_statistics,
    kernel_distance,
)
from tests.support.pixels import exactly, random_pixels

RNG = np.random.default_rng


# --- Gaussian statistics and the Frechet distance -------------------------------------------


def test_gaussian_statistics_are_numpys() -> None:
    features = RNG(0).normal(size=(40, 5)).astype(np.float32)
    statistics = gaussian_statistics(features)
    assert statistics.num_examples == 40
    assert statistics.mean.dtype == statistics.cov.dtype == np.float64
    assert np.allclose(statistics.mean, features.astype(float).mean(axis=0), atol=1e-12)
    assert np.allclose(statistics.cov, np.cov(features.astype(float), rowvar=False), atol=1e-12)


def test_frechet_distance_closed_forms() -> None:
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(9 + 9)
    # Commuting covariances, rotated together: sum of (sqrt a_i - sqrt b_i)^2.
    rng = RNG(1)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0, 5, size=(2, 6))
    a[0] = b[1] = 0.0
    shift = rng.normal(size=6)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(shift, (turn * a) @ turn.T, np.zeros(6), (turn * b) @ turn.T)
    assert got == pytest.approx(expected, rel=1e-12)
    # Rank one: a u u' and b v v' have tr root sqrt(a b) |u . v|.
    u, v = (w / np.linalg.norm(w) for w in rng.normal(size=(2, 6)))
    got = frechet_distance(np.zeros(6), 3 * np.outer(u, u), np.zeros(6), 2 * np.outer(v, v))
    assert got == pytest.approx(5 - 2 * math.sqrt(6) * abs(u @ v), rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    rng = RNG(2)
    first, second = rng.normal(size=(2, 30, 8)) * rng.uniform(0.1, 3, size=(2, 1, 8))
    a, b = gaussian_statistics(first), gaussian_statistics(second)
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    gap = ((a.mean - b.mean) ** 2).sum()
    expected = gap + np.trace(a.cov + b.cov - 2 * root)
    got = frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert got == pytest.approx(expected, rel=1e-9)
    assert got == pytest.approx(frechet_distance(b.mean, b.cov, a.mean, a.cov), rel=1e-12)
    assert got != pytest.approx(gap + np.trace(a.cov + b.cov - root), rel=0.01)  # planted fault


def test_frechet_distance_of_singular_covariances() -> None:
    few = gaussian_statistics(RNG(3).normal(size=(5, 60)) * 1e3)
    own = frechet_distance(few.mean, few.cov, few.mean, few.cov)
    assert 0 <= own < 1e-9 * np.trace(few.cov)
    zero = np.zeros((60, 60))
    assert frechet_distance(few.mean, few.cov, few.mean, zero) == pytest.approx(np.trace(few.cov))
    assert frechet_distance(few.mean, zero, few.mean, zero) == 0.0
    # Shifted copies: only the means differ.
    assert frechet_distance(few.mean, few.cov, few.mean + 7, few.cov) == pytest.approx(60 * 49)


def test_frechet_distance_refuses() -> None:
    eye, mean = np.eye(2), np.zeros(2)
    cases: list[tuple[tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], str]] = [
        ((mean, eye, np.zeros(3), eye), "one shape (d,), got (2,) and (3,)"),
        ((mean, np.eye(3), mean, eye), "cov_a must have shape (2, 2), got (3, 3)"),
        ((mean, eye, mean, [[1.0, 0.5], [0.0, 1.0]]), "cov_b must be symmetric"),
        ((mean, -eye, mean, eye), "cov_a must be positive semi-definite, got the eigenvalue -1"),
        ((mean, eye * np.nan, mean, eye), "cov_a must be finite, got inf or nan"),
        ((mean * np.nan, eye, mean, eye), "mean_a and mean_b must be finite, got inf or nan"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            frechet_distance(*arguments)
    message = "features must have shape (N, d) with N at least 2, got (1, 3)"
    with pytest.raises(ValueError, match=exactly(message)):
        gaussian_statistics(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=exactly("features must be finite, got inf or nan")):
        gaussian_statistics(np.full((2, 3), np.inf))


# --- kernel distance ------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 3])
def test_kernel_distance_is_the_double_loop(degree: int) -> None:
    rng = RNG(4)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(7, 4)) + 0.5

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** degree

    within_a = [kernel(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [kernel(x, y) for x, y in itertools.permutations(b, 2)]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    assert kernel_distance(a, b, degree=degree) == pytest.approx(float(expected), rel=1e-10)


def test_kernel_distance_sums_over_pieces() -> None:
    a, b = RNG(5).normal(size=(2, 700, 3))
    kernels = [(x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    off = [(k.sum() - np.trace(k)) / (700 * 699) for k in kernels[:2]]
    expected = sum(off) - 2 * kernels[2].mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    rng = RNG(6)
    draws = np.array([kernel_distance(*rng.normal(size=(2, 20, 5))) for _ in range(2000)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean()) < 4 * error
    assert draws.min() < 0
    # Planted fault: with the diagonal kept, the estimate is above 0 on average.
    diagonal = 2 * ((rng.normal(size=(2000, 5)) ** 2).sum(axis=1) / 5 + 1) ** 3
    assert (draws + (diagonal - 2) / 20).mean() > 4 * error


def test_kernel_distance_grows_with_the_shift() -> None:
    a, b = RNG(7).normal(size=(2, 100, 5))
    values = [kernel_distance(a, b + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)


def test_kernel_distance_refuses() -> None:
    a = np.zeros((3, 2))
    with pytest.raises(ValueError, match=exactly("degree must be at least 1, got 0")):
        kernel_distance(a, a, degree=0)
    with pytest.raises(ValueError, match=r"^b must have shape \(N, d\) .* got \(1, 2\)$"):
        kernel_distance(a, a[:1])
    message = "a and b must have equally many values per row, got 2 and 1"
    with pytest.raises(ValueError, match=exactly(message)):
        kernel_distance(a, a[:, :1])


# --- pixel features -------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [20, 48, 300])  # fewer than, as many as, more than pixels
def test_pixel_features_are_principal_components(num_images: int) -> None:
    images = random_pixels(num_images, 3, 4, 4)
    k = 7
    features = PixelFeatures.fit(images, num_components=k)
    scaled = images.reshape(num_images, 48) / 127.5 - 1
    centred = scaled - scaled.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(features.components @ features.components.T, np.eye(k), atol=1e-10)
    overlap = np.abs((features.components * rows[:k]).sum(axis=1))
    assert np.allclose(overlap, 1, atol=1e-8)
    values = features(images)
    assert values.shape == (num_images, k)
    assert values.dtype == np.float64
    assert np.allclose((values**2).sum(axis=0), singular[:k] ** 2)
    largest = np.abs(features.components).argmax(axis=1)
    assert (features.components[np.arange(k), largest] > 0).all()


def test_all_components_keep_all_distances() -> None:
    images = random_pixels(60, 1, 4, 4)
    values = PixelFeatures.fit(images, num_components=16)(images)
    gaps = np.linalg.norm(values[:, None] - values[None], axis=2) * 127.5
    flat = images.reshape(60, -1).astype(float)
    assert np.allclose(gaps, np.linalg.norm(flat[:, None] - flat[None], axis=2), atol=1e-8)


def test_pixel_features_refuse() -> None:
    images = random_pixels(10, 1, 4, 4)
    for k in (0, 10):
        with pytest.raises(ValueError, match=exactly(f"num_components must be in [1, 9], got {k}")):
            PixelFeatures.fit(images, num_components=k)
    with pytest.raises(ValueError, match=r"must be uint8 of shape .* got float64 of shape \(2, 2"):
        PixelFeatures.fit(np.zeros((2, 2, 2, 2)), num_components=1)  # type: ignore[arg-type]
    features = PixelFeatures.fit(images, num_components=2)
    with pytest.raises(ValueError, match=exactly("images must have 16 values, got 25")):
        features(random_pixels(2, 1, 5, 5))
