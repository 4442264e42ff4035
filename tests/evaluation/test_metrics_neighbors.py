"""Metrics of nearest neighbours against loops and cases made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpdm.evaluation.metrics import (
    near_copy_fraction,
    near_copy_ratio,
    nearest_label,
    precision_recall,
)
from tests.support.pixels import Pixels, exactly, random_pixels

RNG = np.random.default_rng


# --- precision and recall -------------------------------------------------------------------


def test_precision_recall_is_the_double_loop() -> None:
    rng = RNG(8)
    real, generated, k = rng.normal(size=(300, 2)), rng.normal(size=(280, 2)) * 0.5 + 1, 2

    def share_inside(points: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
        radii = [sorted(math.dist(c, other) for other in centres)[k] for c in centres]
        inside = [
            any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return sum(inside) / len(inside)

    got = precision_recall(real, generated, k=k)
    assert got.precision == pytest.approx(share_inside(generated, real))
    assert got.recall == pytest.approx(share_inside(real, generated))
    assert got.precision != got.recall


def test_precision_recall_tells_quality_from_coverage() -> None:
    real = np.array([[float(x), 0.0] for x in range(10)])
    assert precision_recall(real, real, k=1) == precision_recall(real, real + 0.5, k=1)
    copied = precision_recall(real, real, k=1)
    assert (copied.precision, copied.recall) == (1.0, 1.0)
    far = precision_recall(real, real + 1000, k=1)
    assert (far.precision, far.recall) == (0.0, 0.0)
    one_mode = precision_recall(real, np.array([[2.0, 0.0], [2.1, 0.0], [1.9, 0.0]]), k=1)
    assert (one_mode.precision, one_mode.recall) == (1.0, 0.1)
    spread = precision_recall(real, real * 100 + np.array([0.0, 5.0]), k=1)
    assert spread.precision == 0.0
    assert spread.recall == 1.0


def test_precision_recall_refuses() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match=exactly(f"k must be in [1, 2], got {k}")):
            precision_recall(np.zeros((3, 1)), np.zeros((5, 1)), k=k)


# --- nearest label --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_nearest_label_is_the_loop(k: int) -> None:
    # Few levels and few pixels, so that distances and votes tie all the time.
    images = random_pixels(300, 1, 2, 2) // 64
    references = random_pixels(30, 1, 2, 2, seed=1) // 64
    labels = RNG(2).integers(0, 4, size=30)

    def by_hand(image: Pixels) -> int:
        distances = [int(((image.astype(int) - r.astype(int)) ** 2).sum()) for r in references]
        nearest = sorted(range(30), key=lambda at: (distances[at], at))[:k]
        votes = [int(labels[at]) for at in nearest]
        return max(votes, key=lambda vote: (votes.count(vote), -votes.index(vote)))

    got = nearest_label(images, reference_images=references, reference_labels=labels, k=k)
    assert got.dtype == np.int64
    assert got.tolist() == [by_hand(image) for image in images]


def test_nearest_label_ties_go_to_the_nearest() -> None:
    references = np.array([10, 20, 30, 250], np.uint8).reshape(4, 1, 1, 1)
    labels = np.array([7, 3, 3, 7])
    query = np.array([[[[12]]]], np.uint8)
    for k, answer in ((1, 7), (2, 7), (3, 3), (4, 7)):
        got = nearest_label(query, reference_images=references, reference_labels=labels, k=k)
        assert got.tolist() == [answer], k


def test_nearest_label_refuses() -> None:
    images, labels = random_pixels(4, 1, 2, 2), np.zeros(4, np.int64)
    for k in (0, 5):
        with pytest.raises(ValueError, match=exactly(f"k must be in [1, 4], got {k}")):
            nearest_label(images, reference_images=images, reference_labels=labels, k=k)
    with pytest.raises(ValueError, match=r"^reference_labels must be integers of shape \(4,\)"):
        nearest_label(images, reference_images=images, reference_labels=labels[:3])
    with pytest.raises(ValueError, match=r"one image size, got \(1, 2, 2\) and \(1, 2, 1\)$"):
        nearest_label(images, reference_images=images[..., :1], reference_labels=labels)


# --- near copies ----------------------------------------------------------------------------


def test_near_copy_ratio_is_the_formula() -> None:
    generated, training = random_pixels(270, 1, 3, 3), random_pixels(40, 1, 3, 3, seed=1)
    got = near_copy_ratio(generated, training, threshold_ratio=0.4, n=6)
    for image, ratio in zip(generated, got, strict=True):
        distances = sorted(
            math.dist(image.ravel().tolist(), other.ravel().tolist()) for other in training
        )
        assert ratio == pytest.approx(distances[0] / (0.4 * sum(distances[:6]) / 6), rel=1e-12)
    assert 0 <= got.min() <= got.max() <= 1 / 0.4


def test_near_copies_are_flagged_and_fresh_images_are_not() -> None:
    training = random_pixels(200, 3, 8, 8)
    fresh = random_pixels(30, 3, 8, 8, seed=1)
    assert near_copy_fraction(fresh, training) == 0.0
    noise = RNG(2).integers(-3, 4, size=(10, 3, 8, 8))
    copies = np.clip(training[:10] + noise, 0, 255).astype(np.uint8)
    assert near_copy_fraction(np.concatenate([copies, fresh]), training) == 0.25
    assert near_copy_ratio(training[:3], training).tolist() == [0.0, 0.0, 0.0]
    # All neighbours are copies of one image: still 0, without a division by zero.
    assert near_copy_ratio(training[:1], training[:1].repeat(60, axis=0)).tolist() == [0.0]
    # A ratio of exactly 1 counts: distances 1 and 3, of mean 2, times 0.5.
    row = np.array([11, 13], np.uint8).reshape(2, 1, 1, 1)
    edge = np.array([[[[10]]]], np.uint8)
    assert near_copy_ratio(edge, row, n=2).tolist() == [1.0]
    assert near_copy_fraction(edge, row, n=2) == 1.0
    assert near_copy_fraction(edge, row, n=2, threshold_ratio=0.49) == 0.0


def test_near_copy_refuses() -> None:
    images = random_pixels(4, 1, 2, 2)
    for n in (1, 5):
        with pytest.raises(ValueError, match=exactly(f"n must be in [2, 4], got {n}")):
            near_copy_fraction(images, images, n=n)
    message = "threshold_ratio must be above 0 and finite, got 0.0"
    with pytest.raises(ValueError, match=exactly(message)):
        near_copy_fraction(images, images, n=2, threshold_ratio=0.0)
    message = "generated and training must have one image size, got (1, 2, 1) and (1, 2, 2)"
    with pytest.raises(ValueError, match=exactly(message)):
        near_copy_fraction(images[..., :1], images, n=2)
