"""Class Gaussians as a classifier against scipy's dense normals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.evaluation import gaussian_classifier
from fedpdm.evaluation.gaussian_classifier import GaussianClassifier, as_classifier
from tests.support.gaussian_toys import PIXELS, SIDE, dense_covariance, gaussians_of

SCHEDULE = make_schedule("linear")
SHIFT = -0.25


def classifier(*, num_classes: int = 3, spare: int = 0) -> GaussianClassifier:
    g = gaussians_of(num_classes, weights=True)
    spec = ImageSpec(channels=1, resolution=SIDE, num_classes=num_classes + spare, shift=SHIFT)
    return GaussianClassifier(denoiser=GaussianDenoiser(g, SCHEDULE), spec=spec)


def pictures(count: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(60, 200, (count, 1, SIDE, SIDE)).astype(np.uint8)


@pytest.mark.parametrize("abar", [1.0, 0.6, None])
@pytest.mark.parametrize("prior", ["even", "counted"])
def test_log_probabilities_are_those_of_dense_normals(prior: str, abar: float | None) -> None:
    made, images = classifier(), pictures()
    g = made.denoiser.gaussians
    level = SCHEDULE.alpha_bar(150) if abar is None else abar
    x = images.reshape(-1, PIXELS) / 127.5 - 1.0 - SHIFT
    wider = np.eye(PIXELS) * (1.0 - level) / level  # of x itself, not of sqrt(abar) x
    shares = (g.weights / g.weights.sum()).numpy() if prior == "counted" else np.ones(3) / 3
    joint = np.stack(
        [
            multivariate_normal(g.means[k].numpy(), dense_covariance(g, k) + wider).logpdf(x)
            + math.log(shares[k])
            for k in range(3)
        ],
        axis=1,
    )
    expected = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
    found = made.log_probabilities(images, prior=prior, abar=abar)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(made.labels(images, prior=prior, abar=abar), expected.argmax(axis=1))
    assert len(set(expected.argmax(axis=1))) > 1


def test_a_class_that_nobody_holds_is_never_it() -> None:
    made = classifier(spare=2)
    found = made.log_probabilities(pictures())
    assert found.shape == (40, 5)
    assert np.isneginf(found[:, 3:]).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, rtol=1e-9)


def test_images_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made, images = classifier(), pictures()
    whole = made.log_probabilities(images)
    monkeypatch.setattr(gaussian_classifier, "_BATCH", 7)
    np.testing.assert_allclose(made.log_probabilities(images), whole, rtol=1e-9)
    assert made.log_probabilities(images[:0]).shape == (0, 3)


def test_it_reads_what_the_gaussians_draw() -> None:
    made = classifier()
    labels = torch.arange(3).repeat(200)
    drawn = made.denoiser.gaussians.draw(labels, generator=torch.Generator().manual_seed(0))
    pixels = ((drawn.view(-1, 1, SIDE, SIDE) + SHIFT + 1.0) * 127.5).round().clamp(0, 255)
    images = pixels.to(torch.uint8).numpy()
    assert np.mean(made.labels(images, abar=1.0) == labels.numpy()) > 0.95
    assert np.mean(made.labels(images) == labels.numpy()) > 0.8


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (pictures(), {"prior": "flat"}, "prior must be one of even, counted, got 'flat'"),
        (pictures(), {"abar": 0.0}, r"abar must be in \(0, 1\], got 0"),
        (pictures(), {"abar": math.nan}, r"abar must be in \(0, 1\], got nan"),
        (pictures().astype(np.float32), {}, r"images must be uint8 .* got float32"),
        (pictures()[:, :, 1:], {}, r"C, H, W = \(1, 4, 4\), got uint8 \(40, 1, 3, 4\)"),
    ],
)
def test_what_cannot_be_read_is_refused(
    images: np.ndarray, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        classifier().log_probabilities(images, **options)


def test_another_shared_model_is_no_classifier() -> None:
    spec = dataclasses.replace(classifier().spec, shift=0.0)
    with pytest.raises(ValueError, match=r"must be class Gaussians .* got NoneType"):
        as_classifier(None, spec)
    made = as_classifier(classifier().denoiser, spec)
    assert made.spec is spec
