"""A client's own classifier, with other images and with Gaussians beside it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedpdm.data import ImageSet
from fedpdm.evaluation.use import (
    Recipe,
    _mixed,
    own_log_probabilities,
    use_of,
)

FAST = Recipe(num_steps=60, trainings=1)


def striped(labels: np.ndarray, *, seed: int, noise: float = 20.0) -> np.ndarray:
    """8x8 images whose class says which two rows are bright."""
    images = np.random.default_rng(seed).normal(60.0, noise, (len(labels), 1, 8, 8))
    for index, label in enumerate(labels):
        images[index, 0, 2 * label : 2 * label + 2] += 120.0
    return np.clip(images, 0, 255).astype(np.uint8)


def image_set(labels: list[int], *, seed: int) -> ImageSet:
    values = np.asarray(labels, dtype=np.int64)
    return ImageSet(
        images=striped(values, seed=seed),
        labels=values,
        class_names=("a", "b", "c"),
        background=0.0,
    )


def test_accuracy_is_a_mean_over_classes_and_over_trainings() -> None:
    labels = np.array([0, 0, 0, 1])
    right = np.eye(2)[labels]
    wrong = np.eye(2)[[0, 0, 1, 0]]
    assert use_of([right], labels, minority=[1]).mean == 1.0
    found = use_of([right, wrong], labels, minority=[1])
    assert found.minority == pytest.approx(0.5)
    assert found.mean == pytest.approx((np.mean([1, 2 / 3]) + 0.5) / 2)
    with pytest.raises(ValueError, match=r"none of the minority classes \(7,\)"):
        use_of([right], labels, minority=[7])


def test_every_class_is_drawn_equally_often_and_shares_hold() -> None:
    own = image_set([0] * 30 + [1] * 10 + [2] * 2, seed=0)
    others = striped(np.array([0, 2, 2, 2]), seed=1), np.array([0, 2, 2, 2])
    images, labels, chances = _mixed(own, others, minority=[2], own_share=0.25)
    assert len(images) == 42 + 3  # of the majority class nothing is taken
    for label in range(3):
        assert chances[labels == label].sum() == pytest.approx(1.0)
    assert chances[40:42].sum() == pytest.approx(0.25)
    assert chances[42:].sum() == pytest.approx(0.75)
    _, _, alone = _mixed(own, None, minority=[2], own_share=0.25)
    assert alone[40:].sum() == pytest.approx(1.0)


@pytest.mark.slow
def test_real_images_of_a_rare_class_help_and_wrong_ones_hurt() -> None:
    own = image_set([0] * 40 + [1] * 40 + [2], seed=0)
    test = image_set([0, 1, 2] * 40, seed=9)
    many = np.full(40, 2, dtype=np.int64)
    good = own_log_probabilities(
        own, (striped(many, seed=2), many), test.images, minority=[2], seed=0, recipe=FAST
    )
    mislabelled = striped(np.zeros(40, dtype=np.int64), seed=2), many
    trusting = dataclasses.replace(FAST, own_share=0.01)
    bad = own_log_probabilities(
        own, mislabelled, test.images, minority=[2], seed=0, recipe=trusting
    )
    assert use_of(good, test.labels, minority=[2]).minority > 0.9
    zeros = test.labels == 0
    assert bad[0][zeros, 0].mean() < good[0][zeros, 0].mean() - 0.3
    again = own_log_probabilities(
        own, (striped(many, seed=2), many), test.images, minority=[2], seed=0, recipe=FAST
    )
    assert np.allclose(good[0], again[0])
    assert np.allclose(np.exp(good[0]).sum(axis=1), 1.0)
