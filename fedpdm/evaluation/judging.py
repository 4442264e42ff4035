"""All scores of generated images of one class group, against real images that no client holds.

Give real images as `generated` (of other clients, or public ones) and the scores are the floor that
no model can beat. A Frechet distance rewards copying, so recall, coverage and the share of
near-copies stand beside it. All are statistics of raw images: no guarantee covers them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data import ImageSet
from fedpdm.evaluation.features import (
    FeatureExtractor,
    ReferenceFeatures,
    TrainedFeatures,
    reference_features,
)
from fedpdm.evaluation.features.inception import FID_FEATURES
from fedpdm.evaluation.metrics import (
    FrechetReference,
    frechet_at_infinity,
    kernel_distance_of_subsets,
    manifold_scores,
    near_copy_fraction,
)

__all__ = ["GroupReference", "GroupScores", "check_counts", "reference_rows", "score_group"]

K_PRECISION: Final = 3
K_DENSITY: Final = 5
COPY_NEIGHBORS: Final = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupReference:
    """Real images of one class group as an extractor sees them.

    Attributes:
        classes: the group's classes.
        features: of its images, at least 6.
    """

    classes: tuple[int, ...]
    features: ReferenceFeatures

    @classmethod
    def of(
        cls,
        images: ImageSet,
        classes: Sequence[int],
        extractor: FeatureExtractor,
        *,
        cache: Path | None = None,
    ) -> GroupReference:
        """The group's images out of a reference set, whose features are computed once and cached.

        Raises:
            ValueError: if the set has fewer than 6 images of these classes.
        """
        chosen = reference_rows(images.labels, classes)
        features = reference_features(images.images, extractor, cache=cache)
        return cls(classes=tuple(classes), features=features.rows(chosen))

    @functools.cached_property
    def frechet(self) -> FrechetReference:
        """The group's Gaussian; its covariance is decomposed at the first use."""
        return FrechetReference(self.features.statistics)


def reference_rows(labels: NDArray[np.int64], classes: Sequence[int]) -> NDArray[np.intp]:
    """Positions of the images of these classes; `ValueError` if they are fewer than 6."""
    chosen = np.flatnonzero(np.isin(labels, tuple(classes)))
    if len(chosen) <= K_DENSITY:
        raise ValueError(
            f"evaluation.num_reference: classes {tuple(classes)} need at least "
            f"{K_DENSITY + 1} reference images, got {len(chosen)}"
        )
    return chosen


def check_counts(*, num_generated: int, num_training: int, width: int) -> None:
    """`ValueError`, one line, if so few images cannot be scored with features of this width.

    `num_generated` are the images to score, `num_training` the client's own.
    """
    needed, why = width + 1, f"a Frechet distance of d={width} features"
    if needed < K_PRECISION + 1:
        needed, why = K_PRECISION + 1, f"recall with k={K_PRECISION}"
    if num_generated < needed:
        raise ValueError(
            f"evaluation.num_images: {why} needs at least {needed} images, got {num_generated}"
        )
    if num_training < 2:
        raise ValueError(
            f"near-copies need at least 2 training images of the client, got {num_training}"
        )


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """What generated images of a group are worth.

    Attributes:
        extractor: name of the features behind every score but the last two.
        num_images, num_reference: numbers of generated and of reference images.
        frechet: at `num_images`, and so larger than at infinitely many; FID where the extractor
            is FID's Inception.
        frechet_infinity: extrapolated (`metrics.frechet_at_infinity`).
        kernel, kernel_std: mean and spread over subsets (KID for Inception features).
        precision, recall: Kynkaanniemi et al. 2019, k = 3.
        density, coverage: Naeem et al. 2020, k = 5.
        near_copies: share whose nearest training image is at most half as far as the 50 nearest
            are on average, in pixels (Carlini et al. 2023). Of real images it is not 0 where images
            of a class are much alike: about a tenth for colour MNIST. Compare with the floor.
        class_fidelity: share that the classifier gives the wanted label; None without one.
        classifier: its name; None without one.
    """

    extractor: str
    num_images: int
    num_reference: int
    frechet: float
    frechet_infinity: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    near_copies: float
    class_fidelity: float | None = None
    classifier: str | None = None

    def named(self, prefix: str) -> dict[str, float]:
        """Flat names; each says which features the number was computed with.

        `minority_frechet[trained-64]`, and `minority_fid`, `minority_kid` of FID's Inception alone.
        """
        features = f"[{self.extractor}]"
        own = {"frechet": f"frechet{features}", "kernel": f"kernel{features}"}
        own |= {"infinity": f"frechet_infinity{features}", "std": f"kernel_std{features}"}
        if self.extractor == FID_FEATURES:
            own = {"frechet": "fid", "infinity": "fid_infinity", "kernel": "kid", "std": "kid_std"}
        values = {
            own["frechet"]: self.frechet,
            own["infinity"]: self.frechet_infinity,
            own["kernel"]: self.kernel,
            own["std"]: self.kernel_std,
            f"precision{features}": self.precision,
            f"recall{features}": self.recall,
            f"density{features}": self.density,
            f"coverage{features}": self.coverage,
            "near_copies": self.near_copies,
        }
        if self.class_fidelity is not None:
            values[f"class_fidelity[{self.classifier}]"] = self.class_fidelity
        return {f"{prefix}_{name}": value for name, value in values.items()}


def score_group(
    generated: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    reference: GroupReference,
    training: NDArray[np.uint8],
    extractor: FeatureExtractor,
    classifier: TrainedFeatures | None = None,
    rng: np.random.Generator,
) -> GroupScores:
    """Score images of one group; about a second for 2,000 against 2,000 with 64 features.

    Args:
        generated: (N, C, H, W) uint8, N at least d + 1 for features of d values.
        labels: (N,) int64, the class that each was asked to be.
        reference: of the same extractor.
        training: (M, C, H, W) uint8, all the client's training images, of any class, M >= 2: what
            its model could have copied.
        classifier: judges whether an image is of the class it was asked to be.
        rng: draws subsets.

    Raises:
        ValueError: for too few images, an extractor that is not the reference's, or arrays that
            do not fit together; one line.
    """
    _check(generated, labels, reference=reference, training=training, extractor=extractor)
    features = extractor(generated)
    real = reference.features.features
    manifolds = manifold_scores(real, features, k=K_PRECISION, k_density=K_DENSITY)
    kernel = kernel_distance_of_subsets(features, real, rng=rng)
    return GroupScores(
        extractor=extractor.name,
        num_images=len(generated),
        num_reference=len(real),
        frechet=reference.frechet.distance(features),
        frechet_infinity=frechet_at_infinity(features, reference.frechet, rng=rng).value,
        kernel=kernel.mean,
        kernel_std=kernel.std,
        precision=manifolds.precision,
        recall=manifolds.recall,
        density=manifolds.density,
        coverage=manifolds.coverage,
        near_copies=near_copy_fraction(generated, training, n=min(COPY_NEIGHBORS, len(training))),
        class_fidelity=(
            None if classifier is None else float((classifier.classify(generated) == labels).mean())
        ),
        classifier=None if classifier is None else classifier.name,
    )


def _check(
    generated: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    reference: GroupReference,
    training: NDArray[np.uint8],
    extractor: FeatureExtractor,
) -> None:
    theirs = reference.features
    if (extractor.name, extractor.digest) != (theirs.extractor_name, theirs.extractor_digest):
        raise ValueError(
            f"features of {extractor.name} ({extractor.digest[:8]}) cannot be compared with "
            f"reference features of {theirs.extractor_name} ({theirs.extractor_digest[:8]})"
        )
    check_counts(
        num_generated=len(generated),
        num_training=len(training),
        width=theirs.features.shape[1],
    )
    if labels.shape != (len(generated),):
        raise ValueError(f"labels must have shape ({len(generated)},), got {labels.shape}")
