"""Scores of a group and of a classifier trained on synthetic images, on real digits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpdm.data import ImageSet, load_image_set
from fedpdm.evaluation.downstream import DownstreamScores, classifier_scores
from fedpdm.evaluation.features import (
    PixelExtractor,
    TrainedFeatures,
    inception,
    train_feature_network,
)
from fedpdm.evaluation.judging import GroupReference, GroupScores, score_group
from fedpdm.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    gaussian_statistics,
    near_copy_fraction,
    precision_recall,
)
from tests.support.pixels import exactly

RNG = np.random.default_rng


class World:
    """Digits: public ones for the network, a client's, other clients', and the test set's."""

    def __init__(self, cache: Path) -> None:
        train, self.test = (
            load_image_set("digits", split=split, coloring="none") for split in ("train", "test")
        )
        order = RNG(0).permutation(len(train))
        self.public, self.own, self.others = (
            train.subset(part) for part in np.split(order, [600, 800])
        )
        self.network: TrainedFeatures = train_feature_network(
            self.public, seed=0, num_steps=200, cache=cache
        )
        self.cache = cache

    def reference(self) -> GroupReference:
        return GroupReference.of(self.test, range(10), self.network, cache=self.cache)

    def score(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> GroupScores:
        return score_group(
            images,
            labels,
            reference=self.reference(),
            training=self.own.images,
            extractor=self.network,
            classifier=self.network,
            rng=RNG(1),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_real_images_are_the_floor(world: World) -> None:
    floor = world.score(world.others.images, world.others.labels)
    generated = np.clip(
        world.others.images + RNG(2).normal(size=world.others.images.shape) * 60, 0, 255
    ).astype(np.uint8)
    noisy = world.score(generated, world.others.labels)
    assert floor.frechet < noisy.frechet / 3
    assert floor.frechet_infinity < floor.frechet
    assert floor.kernel < noisy.kernel / 3
    assert floor.precision > 0.6
    assert floor.recall > 0.6
    assert floor.density > 0.7
    assert floor.coverage > max(0.8, noisy.coverage)
    assert floor.near_copies < 0.4  # 8x8 digits are much alike
    assert floor.class_fidelity is not None
    assert floor.class_fidelity > 0.93
    wrong = world.score(world.others.images, (world.others.labels + 1) % 10)
    assert wrong.class_fidelity is not None
    assert wrong.class_fidelity < 0.05
    assert wrong.frechet == floor.frechet


def test_copies_have_a_good_distance_and_are_found_out(world: World) -> None:
    """Lesson of a first trial: a Frechet distance rewards copying, so others stand beside it."""
    few = world.own.images[:75]
    copies = world.score(np.repeat(few, 8, axis=0), np.repeat(world.own.labels[:75], 8))
    floor = world.score(world.others.images, world.others.labels)
    assert copies.near_copies == 1.0
    assert floor.near_copies < 0.4  # 8x8 digits are much alike
    assert copies.recall < floor.recall / 2
    assert copies.coverage < floor.coverage - 0.2


def test_every_score_is_its_function(world: World) -> None:
    got = world.score(world.others.images, world.others.labels)
    made, real = world.network(world.others.images), world.network(world.test.images)
    a, b = gaussian_statistics(made), gaussian_statistics(real)
    assert got.frechet == pytest.approx(frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-5)
    shares = precision_recall(real, made, k=3)
    assert (got.precision, got.recall) == (shares.precision, shares.recall)
    balls = density_coverage(real, made, k=5)
    assert (got.density, got.coverage) == (balls.density, balls.coverage)
    assert got.near_copies == near_copy_fraction(world.others.images, world.own.images)
    right = world.network.classify(world.others.images) == world.others.labels
    assert got.class_fidelity == right.mean()
    assert (got.num_images, got.num_reference) == (len(world.others), len(world.test))
    assert got == world.score(world.others.images, world.others.labels)  # the same rng


def test_a_group_is_its_classes(world: World) -> None:
    reference = GroupReference.of(world.test, (3, 5), world.network, cache=world.cache)
    chosen = np.isin(world.test.labels, (3, 5))
    assert np.allclose(reference.features.features, world.network(world.test.images[chosen]))
    few = world.test.subset(np.arange(40))
    count = int((few.labels == 3).sum())
    message = (
        f"evaluation.num_reference: classes (3,) need at least 6 reference images, got {count}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        GroupReference.of(few, (3,), world.network, cache=world.cache)


def test_names_carry_the_features(world: World) -> None:
    names = world.score(world.others.images, world.others.labels).named("minority")
    ours = "[trained-64]"
    assert names.keys() == {
        *(f"minority_frechet{end}{ours}" for end in ("", "_infinity")),
        *(f"minority_kernel{end}{ours}" for end in ("", "_std")),
        *(f"minority_{name}{ours}" for name in ("precision", "recall", "density", "coverage")),
        "minority_near_copies",
        f"minority_class_fidelity{ours}",
    }
    assert not any("fid_" in name or "kid" in name for name in names)


def test_fid_is_inceptions_alone() -> None:
    numbers = dict.fromkeys(
        (
            "frechet", "frechet_infinity", "kernel", "kernel_std", "precision", "recall",
            "density", "coverage", "near_copies",
        ),
        0.5,
    )  # fmt: skip

    def named(extractor: str) -> set[str]:
        scores = GroupScores(extractor=extractor, num_images=9, num_reference=9, **numbers)
        return set(scores.named("all"))

    fids = {"all_fid", "all_fid_infinity", "all_kid", "all_kid_std"}
    assert fids < named(inception.FID_FEATURES)
    assert "all_recall[inception-2048]" in named(inception.FID_FEATURES)
    for other in ("inception-2048-01234567", "trained-64", "pixel-32"):
        assert not fids & named(other)
        assert f"all_frechet[{other}]" in named(other)


def test_scores_refuse(world: World) -> None:
    images, labels = world.others.images, world.others.labels
    message = (
        "evaluation.num_images: a Frechet distance of d=64 features needs at least 65 images, "
        "got 64"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        world.score(images[:64], labels[:64])
    assert np.isfinite(world.score(images[:65], labels[:65]).frechet_infinity)
    with pytest.raises(ValueError, match=exactly("labels must have shape (100,), got (99,)")):
        world.score(images[:100], labels[:99])
    options = {"reference": world.reference(), "rng": RNG(0)}
    pixels = PixelExtractor.fit(world.public.images, num_components=2)
    with pytest.raises(ValueError, match=r"^features of pixel-2 .* reference features of trained"):
        score_group(images, labels, training=images, extractor=pixels, **options)
    reference = GroupReference.of(world.test, range(10), pixels, cache=world.cache)
    with pytest.raises(ValueError, match=r"recall with k=3 needs at least 4 images, got 3$"):
        score_group(
            images[:3], labels[:3], reference=reference, training=images, extractor=pixels,
            rng=RNG(0),
        )  # fmt: skip
    message = "near-copies need at least 2 training images of the client, got 1"
    with pytest.raises(ValueError, match=exactly(message)):
        score_group(images, labels, training=images[:1], extractor=world.network, **options)


@pytest.mark.slow
def test_two_thousand_against_two_thousand_is_fast(tmp_path: Path) -> None:
    images = RNG(0).integers(0, 256, size=(3, 2000, 3, 16, 16), dtype=np.uint8)
    pixels = PixelExtractor.fit(images[0], num_components=64)
    labels = np.zeros(2000, np.int64)
    test = ImageSet(images=images[1], labels=labels, class_names=("0",), background=0.0)
    reference = GroupReference.of(test, (0,), pixels, cache=tmp_path)
    started = time.process_time()
    score_group(
        images[2], labels, reference=reference, training=images[0], extractor=pixels, rng=RNG(0)
    )
    assert time.process_time() - started < 10


# --- downstream -----------------------------------------------------------------------------


@pytest.mark.slow
def test_downstream_scores_of_real_shuffled_and_one_sided_images(world: World) -> None:
    test = world.test

    def scores(images: ImageSet, labels: NDArray[np.int64], seed: int = 0) -> DownstreamScores:
        return classifier_scores(
            images.images, labels, test.images, test.labels, num_classes=10, seed=seed,
            num_steps=100,
        )  # fmt: skip

    real = scores(world.public, world.public.labels)
    assert real.accuracy > 0.9
    assert real.worst_group_accuracy == min(real.per_class.values())
    sizes = [int((test.labels == label).sum()) for label in range(10)]
    mean = np.average([real.per_class[label] for label in range(10)], weights=sizes)
    assert real.accuracy == pytest.approx(mean)
    assert real == scores(world.public, world.public.labels)
    assert real != scores(world.public, world.public.labels, seed=1)
    shuffled = scores(world.public, RNG(0).permutation(world.public.labels))
    assert shuffled.accuracy < 0.3
    without = world.public.subset(np.flatnonzero(world.public.labels != 7))
    no_seven = scores(without, without.labels)
    assert no_seven.worst_group_accuracy == no_seven.per_class[7] == 0.0
    assert no_seven.accuracy > 0.8
    assert no_seven.named("pfdm")["pfdm_downstream_worst_group"] == 0.0


def test_downstream_refuses(world: World) -> None:
    images, labels = world.own.images, world.own.labels
    with pytest.raises(ValueError, match=r"^test_images must be at least 1 of shape \(1, 8, 8\)"):
        classifier_scores(images, labels, images[..., :4], labels, num_classes=10, seed=0)
    with pytest.raises(ValueError, match=r"^test_labels must have shape \(200,\), got \(199,\)$"):
        classifier_scores(images, labels, images, labels[1:], num_classes=10, seed=0)
    message = "downstream classifier: labels must be in [0, 4), got 9"
    with pytest.raises(ValueError, match=exactly(message)):
        classifier_scores(images, labels, images, labels, num_classes=4, seed=0)
