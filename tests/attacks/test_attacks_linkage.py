"""Upload linkage: the measured attack against its closed form, on an independent mechanism."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import special

from fedpdm.attacks.linkage import (
    LinkageResult,
    linkage_attack,
    linkage_auc,
    linkage_roc,
    linkage_tpr,
    worst_case_linkage,
)
from fedpdm.data import ImageSet
from fedpdm.privacy.types import ReleasedDataset
from tests.support.attack_paths import Path, random_images

PATH = Path(clip_norm=4.0, mu=2.0)


def attack(path: Path = PATH, *, count: int = 4000, seed: int = 0) -> LinkageResult:
    rng = np.random.default_rng(seed)
    return linkage_attack(
        random_images(count, rng), lambda images: path.release(images, rng), rng=rng
    )


def test_measured_agrees_with_the_closed_form() -> None:
    summary = attack().summary
    assert summary.num_pairs == 2000
    assert summary.agrees
    assert summary.auc_low < summary.auc_analytic < summary.auc_high
    assert summary.auc_high - summary.auc_low < 0.05
    assert summary.tpr == pytest.approx(summary.tpr_analytic, abs=0.06)
    assert summary.auc_analytic < summary.worst_auc == pytest.approx(special.ndtr(math.sqrt(2.0)))
    assert summary.worst_tpr == pytest.approx(special.ndtr(special.ndtri(0.01) + 2.0))
    assert max(summary.distance_quantiles) <= 2 * PATH.clip_norm
    assert list(summary.distance_quantiles) == sorted(summary.distance_quantiles)
    json.dumps(dataclasses.asdict(summary))


@pytest.mark.parametrize(
    "path",
    [
        Path(noise_scale=0.5),
        Path(noise_scale=1.5),
        Path(clip_norm=4.0, mu=2.0, change=lambda z: z * 0.0),
    ],
)
def test_wrong_noise_disagrees(path: Path) -> None:
    assert not attack(path).summary.agrees


@pytest.mark.parametrize("shift", [-1.0, 0.3])
def test_shifts_and_small_sets(shift: float) -> None:
    missed = sum(not attack(Path(shift=shift), count=60, seed=s).summary.agrees for s in range(60))
    assert missed <= 5  # 99% intervals; 1 in 10^5 by chance


def test_scores_follow_from_the_pixels() -> None:
    """Pairs, labels of positive and negative, and the ratio itself, recomputed one by one."""
    rng = np.random.default_rng(3)
    seen: dict[str, object] = {}

    def obtain(images: ImageSet) -> ReleasedDataset:
        seen["images"] = images
        seen["release"] = PATH.release(images, rng)
        return seen["release"]  # type: ignore[return-value]

    result = linkage_attack(random_images(100, rng), obtain, rng=rng, num_pairs=7)
    images, release = seen["images"], seen["release"]
    assert isinstance(images, ImageSet)
    assert isinstance(release, ReleasedDataset)
    assert len(images) == 14
    means, abar = PATH.clipped(images), release.parameters.alpha_bar
    uploads = release.x_tilde.flatten(1).double().numpy()
    for i in range(7):
        a, b = means[2 * i], means[2 * i + 1]
        for row, score in ((2 * i, result.positive[i]), (2 * i + 1, result.negative[i])):
            far = np.sum((uploads[row] - math.sqrt(abar) * b) ** 2) / (2 * (1 - abar))
            near = np.sum((uploads[row] - math.sqrt(abar) * a) ** 2) / (2 * (1 - abar))
            assert score == pytest.approx(far - near, abs=1e-4)
        assert result.distances[i] == pytest.approx(np.linalg.norm(a - b), rel=1e-6)


def test_equal_images_are_drawn_once() -> None:
    rng = np.random.default_rng(4)
    few = random_images(5, rng)
    repeated = few.subset(np.arange(50) % 5)
    result = linkage_attack(repeated, lambda images: PATH.release(images, rng), rng=rng)
    assert result.summary.num_pairs == 2
    assert result.distances.min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_pooled_auc_is_the_mean_over_pairs(count: int) -> None:
    distances = np.random.default_rng(count).gamma(2.0, 1.5, size=count)
    sample = distances[:300]
    square = sample[:, None] ** 2 + sample[None, :] ** 2
    exact = float(special.ndtr(np.sqrt(square) / (2 * 3.0)).mean())
    assert linkage_auc(sample, sigma=3.0) == pytest.approx(exact, abs=1e-12)
    if count > 2048:  # groups of distances against all pairs
        square = distances[:, None] ** 2 + distances[None, :] ** 2
        exact = float(special.ndtr(np.sqrt(square) / (2 * 3.0)).mean())
        assert linkage_auc(distances, sigma=3.0) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 40.0])
def test_curve_agrees_with_its_numbers(sigma: float) -> None:
    distances = np.random.default_rng(1).gamma(2.0, 1.5, size=200)
    fpr, tpr = linkage_roc(distances, sigma=sigma, num_points=4001)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == pytest.approx((0, 0, 1, 1), abs=1e-6)
    assert np.trapezoid(tpr, fpr) == pytest.approx(linkage_auc(distances, sigma=sigma), abs=2e-3)
    for at in (0.001, 0.01, 0.3):
        assert np.interp(at, fpr, tpr) == pytest.approx(
            linkage_tpr(distances, sigma=sigma, fpr=at), abs=2e-2
        )


def test_one_distance_is_the_closed_form() -> None:
    """METHOD's example, t0 = 690 and C = 10: AUC 0.898."""
    sigma = 20.0 / (0.8984 * 2)
    same = np.full(10, 20.0)
    auc, tpr = worst_case_linkage(clip_norm=10.0, sigma=sigma, fpr=0.05)
    assert linkage_auc(same, sigma=sigma) == pytest.approx(auc, abs=1e-12)
    assert linkage_tpr(same, sigma=sigma, fpr=0.05) == pytest.approx(tpr, abs=1e-9)
    assert auc == pytest.approx(0.898, abs=1e-3)
    assert linkage_auc([0.0], sigma=1.0) == 0.5
    assert linkage_tpr([0.0], sigma=1.0, fpr=0.2) == pytest.approx(0.2, abs=1e-6)


def test_bad_input() -> None:
    rng = np.random.default_rng(0)
    images = random_images(6, rng)

    def obtain(given: ImageSet) -> ReleasedDataset:
        return PATH.release(given, rng)

    with pytest.raises(ValueError, match=r"num_pairs must be in \[1, 3\], got 4"):
        linkage_attack(images, obtain, rng=rng, num_pairs=4)
    with pytest.raises(ValueError, match="images must hold at least 2 distinct ones, got 1"):
        linkage_attack(images.subset(np.zeros(4, dtype=np.int64)), obtain, rng=rng)
    with pytest.raises(ValueError, match=r"obtain must release one row per image, \(6, 1, 8, 8\)"):
        linkage_attack(images, lambda given: obtain(given.subset(np.arange(3))), rng=rng)

    def broken(given: ImageSet) -> ReleasedDataset:
        released = obtain(given)
        return dataclasses.replace(released, x_tilde=torch.full_like(released.x_tilde, math.nan))

    with pytest.raises(ValueError, match="obtain must release finite values"):
        linkage_attack(images, broken, rng=rng)
    with pytest.raises(ValueError, match="sigma must be positive and finite, got 0"):
        linkage_auc([1.0], sigma=0.0)
    with pytest.raises(ValueError, match="distances must be"):
        linkage_tpr([-1.0], sigma=1.0)
    with pytest.raises(ValueError, match=r"fpr must be in \(0, 1\), got 1"):
        linkage_tpr([1.0], sigma=1.0, fpr=1.0)
