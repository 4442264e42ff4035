"""Samples that begin with class Gaussians, against dense densities of torch and plain counting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal

from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.from_gaussians import (
    begin,
    likeliest,
    read_level,
    sample_from_gaussians,
    steps_from_gaussians,
)
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import SamplerSettings, sample_two_stage
from tests.diffusion.test_gaussian import covariance, gaussians, generator

SCHEDULE = make_schedule("linear")
SHAPE = (1, 2, 3)


def settings(**changes: Any) -> SamplerSettings:
    given: dict[str, Any] = {"t0": 150, "num_steps": 4, **changes}
    return SamplerSettings(schedule=SCHEDULE, **given)


class Recorder:
    """A fine model that answers with its question and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor, clipped: Any = None
    ) -> torch.Tensor:
        assert clipped is not None  # asked for whole images
        assert not bool(clipped.any())
        self.asked.append((x_t, t, labels))
        return x_t

    @property
    def rows(self) -> int:
        return sum(len(x_t) for x_t, _, _ in self.asked)


def log_densities(g: ClassGaussians, x: torch.Tensor, abar: float) -> torch.Tensor:
    """log p(sqrt(abar) x, class) by torch's dense normals, classes equally likely: (N, 4)."""
    eye = torch.eye(6, dtype=torch.float64)
    each = [
        MultivariateNormal(
            math.sqrt(abar) * g.means[j], abar * covariance(g, j) + (1.0 - abar) * eye
        ).log_prob(math.sqrt(abar) * x.flatten(1).double())
        for j in range(4)
    ]
    pair = torch.stack([each[0] + math.log(1 / 3), each[2] + math.log(2 / 3)]).logsumexp(dim=0)
    return torch.stack([pair, each[1], torch.full_like(pair, -math.inf), each[3]], dim=1)


def sampled(labels: torch.Tensor, **changes: Any) -> torch.Tensor:
    """With a fine model that gives back what it gets."""
    output = sample_from_gaussians(
        GaussianDenoiser(gaussians(), SCHEDULE), Recorder(), settings(**changes),
        image_shape=SHAPE, labels=labels, generator=generator(5),
    )  # fmt: skip
    assert output.images.shape == (len(labels), *SHAPE)
    return output.images


def test_it_begins_with_the_classs_gaussian_at_the_hand_over() -> None:
    g = gaussians()
    labels = torch.full((100_000,), 1)
    x_0, x = begin(g, settings(), image_shape=SHAPE, labels=labels, generator=generator())
    abar = SCHEDULE.alpha_bar(150)
    eye = torch.eye(6, dtype=torch.float64)
    for drawn, mean, cov in (
        (x_0, g.means[1], covariance(g, 1)),
        (x, math.sqrt(abar) * g.means[1], abar * covariance(g, 1) + (1 - abar) * eye),
    ):
        points = drawn.flatten(1).double()
        torch.testing.assert_close(points.mean(dim=0), mean, atol=0.03, rtol=0.0)
        torch.testing.assert_close(torch.cov(points.T), cov, atol=0.05, rtol=0.0)
    noise = (x - math.sqrt(abar) * x_0).flatten(1).double()
    torch.testing.assert_close(torch.cov(noise.T), (1 - abar) * eye, atol=0.02, rtol=0.0)


def test_a_class_that_nobody_holds_is_drawn_from_all() -> None:
    g = gaussians()
    weights = g.weights / g.weights.sum()
    for label in (2, NO_LABEL, 77):
        labels = torch.full((60_000,), label)
        x_0, _ = begin(g, settings(), image_shape=SHAPE, labels=labels, generator=generator())
        mean = x_0.flatten(1).double().mean(dim=0)
        torch.testing.assert_close(mean, weights @ g.means, atol=0.05, rtol=0.0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_candidate_is_kept_whose_class_is_likeliest(count: int) -> None:
    g, abar = gaussians(apart=0.5), read_level(SCHEDULE)
    labels = torch.tensor([0, 1, 3, 1, 0])
    images = torch.randn((5 * count, *SHAPE), generator=generator(3))
    posterior = log_densities(g, images, abar).log_softmax(dim=1)
    expected = []
    for row, label in enumerate(labels.tolist()):
        own = posterior[row * count : (row + 1) * count, label]
        expected.append(row * count + int(own.argmax()))
    assert likeliest(g, images, labels, count=count, abar=abar).tolist() == expected
    if count > 1:
        assert any(at % count for at in expected)  # not always the first
        wrong = likeliest(g, images, labels.roll(1), count=count, abar=abar).tolist()
        assert wrong != expected


def test_without_a_class_the_first_candidate_is_kept() -> None:
    g = gaussians()
    images = torch.randn((12, *SHAPE), generator=generator(3))
    labels = torch.tensor([2, NO_LABEL, 9])  # 2: a class without Gaussians
    assert likeliest(g, images, labels, count=4, abar=0.8).tolist() == [0, 4, 8]


def test_classes_are_read_at_a_seventh_of_the_chain() -> None:
    assert read_level(SCHEDULE) == SCHEDULE.alpha_bar(150)
    assert read_level(make_schedule("linear", num_steps=40)) == pytest.approx(
        float(make_schedule("linear", num_steps=40).alphas_cumprod[6])
    )
    assert read_level(make_schedule("linear", num_steps=2)) < 1.0


def test_more_candidates_are_more_often_of_their_class() -> None:
    """Of overlapping classes, judged by dense densities of the images as they are."""
    g = gaussians(apart=0.25)
    coarse, labels = GaussianDenoiser(g, SCHEDULE), torch.tensor([0, 1, 3]).repeat(1000)
    right = []
    for count in (1, 2, 4):
        x_0 = sample_from_gaussians(
            coarse, lambda x_t, t, *, labels, clipped=None: x_t, settings(candidates=count, t0=0),
            image_shape=SHAPE, labels=labels, generator=generator(2),
        ).images  # fmt: skip
        joint = log_densities(g, x_0, 0.999)
        right.append(float((joint.argmax(dim=1) == labels).double().mean()))
    assert right[0] + 0.05 < right[1] < right[2] - 0.02


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_the_fine_model_makes_all_steps_for_each_candidate(count: int, told: bool) -> None:
    fine = Recorder()
    labels = torch.tensor([0, 1, 3, NO_LABEL, 2])
    output = sample_from_gaussians(
        GaussianDenoiser(gaussians(), SCHEDULE), fine,
        settings(candidates=count, fine_labels=told, batch_size=6),
        image_shape=SHAPE, labels=labels, generator=generator(),
    )  # fmt: skip
    assert output.images.shape == (5, *SHAPE)
    assert fine.rows == 4 * 5 * count  # num_steps for every candidate
    assert max(len(x_t) for x_t, _, _ in fine.asked) <= 6
    assert max(int(t.max()) for _, t, _ in fine.asked) == 150
    seen = {label for _, _, given in fine.asked for label in given.tolist()}
    assert seen == (set(labels.tolist()) if told else {NO_LABEL})


def test_the_estimate_belongs_to_the_image_that_is_kept() -> None:
    """With a hand-over at 0 nothing is noised or refined: both are the draw."""
    labels = torch.tensor([0, 1, 3] * 30)
    output = sample_from_gaussians(
        GaussianDenoiser(gaussians(), SCHEDULE), Recorder(), settings(candidates=4, t0=0),
        image_shape=SHAPE, labels=labels, generator=generator(),
    )  # fmt: skip
    assert output.coarse is not None
    assert torch.equal(output.images, output.coarse)


def test_the_gaussians_alone_are_drawn_once_each() -> None:
    labels = torch.full((50_000,), 3)
    output = sample_from_gaussians(
        GaussianDenoiser(gaussians(), SCHEDULE), None, settings(candidates=4, batch_size=50_000),
        image_shape=SHAPE, labels=labels, generator=generator(),
    )  # fmt: skip
    points = output.images.flatten(1).double()
    expected = covariance(gaussians(), 3)
    torch.testing.assert_close(torch.cov(points.T), expected, atol=0.06, rtol=0.0)  # not the best


def test_equal_seeds_equal_images_and_a_share_goes_down_together() -> None:
    labels = torch.tensor([0, 1, 3, 1])
    assert torch.equal(sampled(labels), sampled(labels))
    assert not torch.equal(sampled(labels), sampled(labels, t0=200))
    fine = Recorder()
    mixed = sample_from_gaussians(
        GaussianDenoiser(gaussians(), SCHEDULE), fine,
        settings(coarse_share=torch.full((5,), 0.5), num_steps=20),
        image_shape=SHAPE, labels=labels, generator=generator(),
    )  # fmt: skip
    assert max(int(t.max()) for _, t, _ in fine.asked) == 1000  # asked from pure noise on
    assert mixed.coarse is not None
    assert bool(mixed.images.isfinite().all())


def test_own_classes_are_the_fine_models_alone() -> None:
    """From pure noise and with labels, one image each; the others as if asked for by themselves."""
    labels, fine = torch.tensor([1, 0, 3, 1, NO_LABEL]), Recorder()
    asked = settings(candidates=3, fine_labels=False, own_classes=(1,), batch_size=6)
    coarse = GaussianDenoiser(gaussians(), SCHEDULE)
    output = sample_from_gaussians(
        coarse, fine, asked, image_shape=SHAPE, labels=labels, generator=generator()
    )
    own = [(x_t, t, given) for x_t, t, given in fine.asked if int(t.max()) > 150]
    assert max(int(t.max()) for _, t, _ in own) == 1000
    assert {label for _, _, given in own for label in given.tolist()} == {1}
    assert fine.rows == 4 * (2 + 3 * 3)
    assert fine.rows == steps_from_gaussians(coarse, fine, asked, labels)
    shared = generator()
    x_T = torch.randn((2, *SHAPE), generator=shared)
    alone = sample_two_stage(
        None, Recorder(), x_T, asked, labels=labels[:1].expand(2), generator=shared
    ).images
    assert torch.equal(output.images[[0, 3]], alone)
    rest = sample_from_gaussians(
        coarse, Recorder(), dataclasses.replace(asked, own_classes=()), image_shape=SHAPE,
        labels=labels[[1, 2, 4]], generator=shared,
    )  # fmt: skip
    assert rest.coarse is not None
    assert output.coarse is not None
    assert torch.equal(output.images[[1, 2, 4]], rest.images)
    assert torch.equal(output.coarse[[1, 2, 4]], rest.coarse)
    assert not torch.equal(output.coarse[[0, 3]], output.images[[0, 3]])  # a draw
    every = dataclasses.replace(asked, own_classes=(0, 1, 3))
    all_own = sample_from_gaussians(
        coarse, Recorder(), every, image_shape=SHAPE, labels=labels[:4], generator=generator()
    )
    assert bool(all_own.images.isfinite().all())


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.candidates must be at least 1, got 0"):
        settings(candidates=0)
    assert dataclasses.replace(settings(), candidates=3).candidates == 3
