"""The search for copies against brute force by other libraries, and planted copies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from fedpdm.attacks.memorisation import binomial_interval, find_memorised, judge_by_control
from fedpdm.evaluation.metrics import nearest, nearest_rows

Pixels = NDArray[np.uint8]
RNG = np.random.default_rng


def pixels(*shape: int, seed: int = 0) -> Pixels:
    return RNG(seed).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.fixture(params=[(7, 11), (1024, 4096)], ids=["small blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, references = request.param
    monkeypatch.setattr(nearest, "_QUERIES", queries)
    monkeypatch.setattr(nearest, "_REFERENCES", references)
    monkeypatch.setattr(nearest, "_DIFFERENCES", 50 * queries)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("n", [1, 5, 100])
def test_nearest_rows_is_brute_force(n: int) -> None:
    queries, references = pixels(40, 3, 4, 4), pixels(100, 3, 4, 4, seed=1)
    got = nearest_rows(queries, references, n=n)
    every = cdist(queries.reshape(40, -1).astype(float), references.reshape(100, -1).astype(float))
    assert np.array_equal(got.distances, np.sort(every, axis=1)[:, :n])
    assert np.array_equal(np.take_along_axis(every, got.indices, 1), got.distances)
    assert all(len(set(row)) == n for row in got.indices.tolist())

    rows, others = RNG(2).normal(size=(40, 6)) + 50.0, RNG(3).normal(size=(100, 6)) + 50.0
    found = nearest_rows(rows, others, n=n)
    distances, indices = (
        NearestNeighbors(n_neighbors=n, algorithm="kd_tree").fit(others).kneighbors(rows)
    )
    assert np.allclose(found.distances, distances, rtol=1e-12, atol=0.0)
    assert np.array_equal(found.indices, indices)


@pytest.mark.usefixtures("blocks")
def test_nearer_references_may_come_last_and_tie() -> None:
    references = np.arange(60, dtype=np.uint8)[::-1].reshape(60, 1, 1, 1)
    query = np.zeros((3, 1, 1, 1), np.uint8)
    got = nearest_rows(query, references, n=3)
    assert got.indices.tolist() == [[59, 58, 57]] * 3
    assert got.distances.tolist() == [[0.0, 1.0, 2.0]] * 3
    tied = nearest_rows(query[:1], np.full((4, 1, 1, 1), 9, np.uint8), n=4)
    assert tied.indices.tolist() == [[0, 1, 2, 3]]


def test_copies_of_features_are_at_distance_zero_far_from_the_origin() -> None:
    """By <q, r> alone the squares of 1e6 would leave an error of about 1e-2."""
    training = RNG(0).normal(size=(300, 20))
    training[::2] += 1e6  # two clusters: no centre brings both near
    training[1::2] -= 1e6
    found = nearest_rows(training[[7, 250]], training, n=2)
    assert found.distances[:, 0].tolist() == [0.0, 0.0]
    assert found.indices[:, 0].tolist() == [7, 250]
    exact = cdist(training[[7, 250]], training)
    assert np.allclose(found.distances[:, 1], np.sort(exact, axis=1)[:, 1], rtol=1e-12)


def test_progress_is_told() -> None:
    calls: list[tuple[int, int]] = []
    images = pixels(1030, 1, 2, 2)
    nearest_rows(images, images[:9], n=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1024, 1030), (1030, 1030)]


def test_planted_copies_are_flagged_and_independent_images_are_not() -> None:
    training, fresh = pixels(200, 3, 8, 8), pixels(30, 3, 8, 8, seed=1)
    noise = RNG(2).integers(-3, 4, size=(10, 3, 8, 8))
    copies = np.clip(training[50:60] + noise, 0, 255).astype(np.uint8)
    found = find_memorised(np.concatenate([fresh, copies]), training)
    assert np.flatnonzero(found.flagged).tolist() == list(range(30, 40))
    assert found.nearest[30:].tolist() == list(range(50, 60))
    assert set(found.worst(10).tolist()) == set(range(30, 40))
    assert found.worst(1)[0] == int(np.argmin(found.ratios))
    summary = found.summary
    assert (summary.num_flagged, summary.flagged_fraction) == (10, 0.25)
    assert summary.smallest_ratio == found.ratios.min()
    # The root mean square of pixels in [0, 1]: noise of -3 .. 3 levels has variance 4.
    assert found.distances[30:].mean() == pytest.approx(2.0 / 255.0, rel=0.1)
    assert find_memorised(fresh, training).summary.num_flagged == 0

    weights = RNG(3).normal(size=(192, 12))
    rows, others = (x.reshape(len(x), -1) / 255.0 @ weights for x in (copies, training))
    assert find_memorised(rows, others, space="random features").flagged.all()
    assert not find_memorised(others[:40] + 40.0, others).flagged.any()


def test_memorised_ratio_is_the_formula() -> None:
    generated, training = pixels(20, 1, 3, 3), pixels(60, 1, 3, 3, seed=1)
    found = find_memorised(generated, training, threshold_ratio=0.4, num_neighbors=6)
    every = np.sort(cdist(generated.reshape(20, 9) * 1.0, training.reshape(60, 9) * 1.0), axis=1)
    assert np.allclose(found.ratios, every[:, 0] / (0.4 * every[:, :6].mean(axis=1)))
    assert np.allclose(found.distances, every[:, 0] / 3.0 / 255.0)


def test_absolute_distances_are_judged_by_held_out_images() -> None:
    training, held_out = RNG(0).normal(size=(500, 8)), RNG(1).normal(size=(1000, 8))
    control = find_memorised(held_out, training)
    innocent = judge_by_control(find_memorised(RNG(2).normal(size=(2000, 8)), training), control)
    assert innocent.near_low <= 0.01 <= innocent.near_high
    assert (control.distances < innocent.threshold).sum() == 10
    copies = training[:200] + 0.05 * RNG(3).normal(size=(200, 8))
    guilty = judge_by_control(find_memorised(copies, training), control)
    assert guilty.near_fraction > 0.95
    assert guilty.control_flagged_fraction == (control.ratios <= 1).mean()
    bounds = binomial_interval(control.summary.num_flagged, 1000, confidence=0.95)
    assert (guilty.control_flagged_low, guilty.control_flagged_high) == bounds
    with pytest.raises(
        ValueError, match=r"^control must hold at least 100 images for control_share"
    ):
        judge_by_control(control, find_memorised(held_out[:99], training))
    other = find_memorised(held_out, training, space="elsewhere")
    with pytest.raises(ValueError, match=r"^control.space must be that of generated, 'pixels'"):
        judge_by_control(control, other)
    with pytest.raises(ValueError, match=r"^control_share must be in \(0, 1\), got 0"):
        judge_by_control(control, control, control_share=0.0)


def test_binomial_interval_is_clopper_and_pearson() -> None:
    low, high = binomial_interval(3, 40, confidence=0.9)
    assert low == pytest.approx(stats.beta.ppf(0.05, 3, 38))
    assert high == pytest.approx(stats.beta.ppf(0.95, 4, 37))
    assert binomial_interval(0, 40, confidence=0.9)[0] == 0.0
    with pytest.raises(ValueError, match=r"^confidence must be in \(0, 1\), got 1"):
        binomial_interval(0, 40, confidence=1.0)


def test_memorisation_refuses() -> None:
    images, rows = pixels(60, 1, 2, 2), RNG(0).normal(size=(60, 4))
    for n in (1, 61):
        with pytest.raises(ValueError, match=re.escape(f"n must be in [2, 60], got {n}")):
            find_memorised(images, images, num_neighbors=n)
    with pytest.raises(ValueError, match=r"one image size, got \(2, 2, 1\) and \(1, 2, 2\)$"):
        find_memorised(images.transpose(0, 2, 3, 1), images)
    with pytest.raises(ValueError, match=r"^training must be finite"):
        find_memorised(rows, np.where(rows > 2, np.nan, rows))
    with pytest.raises(ValueError, match=r"^training must be uint8"):
        find_memorised(images, images.astype(np.float64))
    with pytest.raises(ValueError, match=r"^count must be at least 1, got 0"):
        find_memorised(images, images).worst(0)
