"""What the server makes of sums by component: Lloyd's algorithm, moments, fallbacks, densities."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.privacy.components import class_mixtures, first_centers, move, told_before
from fedpdm.privacy.estimation import class_gaussians, class_means, pooled_directions
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
    ReleaseSource,
    StatisticsParameters,
)
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.sums import component_stage
from fedpdm.privacy.turning import total_of
from tests.privacy.test_statistics_estimation import PIXELS as WIDE
from tests.privacy.test_statistics_estimation import SHAPE, draw, parameters, sent, shown
from tests.support.statistics_toys import (
    CLASSES,
)

Q, J = 4, 3  # directions and components of the estimates below


# --- What the server makes of them -------------------------------------------------------------


def bent(count: int, *, seed: int) -> ReleaseSource:
    """Images of three classes; class 1 lies in three heaps far from each other."""
    given = draw(count, seed=seed)
    rng = np.random.default_rng(seed + 50)
    world = np.random.default_rng(7).normal(size=(J, WIDE)) * 0.3
    heap = rng.integers(0, J, count)
    x = shown(given) * 0.4 + np.where(given.labels[:, None] == 1, world[heap], 0.0)
    pixels = np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return ReleaseSource(images=pixels.reshape(-1, *SHAPE), labels=given.labels)


def with_moves(mu: float, *, moves: int = 3) -> tuple[StatisticsParameters, ...]:
    first = parameters(mu=mu, directions=Q)
    return *first, *(
        dataclasses.replace(first[0], stage=component_stage(n + 1), components=J)
        for n in range(moves)
    )


class Server:
    """All rounds of some clients, and what is told before each."""

    def __init__(self, clients: list[ReleaseSource], planned: Any) -> None:
        self.planned, self.told = planned, [{}]
        self.kept: dict[str, list[ReleasedStatistics]] = {}
        for number, stage in enumerate(planned):
            if number:
                self.told.append(told_before(stage, self.sums))
            self.kept[stage.stage] = [
                sent(c, stage, client=20 * number + m, public=self.told[-1])
                for m, c in enumerate(clients)
            ]
        self.pooled = pooled_directions(self.sums("pooled"))
        self.leading = self.pooled.directions[:Q]

    def sums(self, stage: str) -> list[ReleasedStatistics]:
        return self.kept[stage]

    def centers(self, number: int) -> np.ndarray:
        told = self.told[number]["centers"].double().numpy()
        return told.reshape(CLASSES, J, Q)[..., : len(self.leading)]

    def moved(self) -> Any:
        name = self.planned[-1].stage
        return move(self.sums(name), name, self.leading, self.centers(len(self.planned) - 1))

    def gaussians(self, *, single: bool = False) -> ClassGaussians:
        mixtures = None if single else class_mixtures(self.moved())
        return class_gaussians(
            class_means(self.sums("means")), self.pooled, self.sums("classes"),
            image_shape=SHAPE, mixtures=mixtures,
        )  # fmt: skip


def moments(g: ClassGaussians, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a class of one Gaussian or many."""
    own = [j for j in range(len(g.classes)) if int(g.classes[j]) == k]
    share = g.weights[own].numpy() / g.weights[own].sum().numpy()
    means = g.means[own].numpy()
    mean = share @ means
    spread = (means - mean).T @ (share[:, None] * (means - mean))
    return mean, spread + sum(s * dense(g, j) for s, j in zip(share, own, strict=True))


def dense(g: ClassGaussians, j: int) -> np.ndarray:
    v, rest = g.directions[j].numpy(), float(g.rest[j])
    size = v.shape[1]
    return v.T @ np.diag(g.variances[j].numpy() - rest) @ v + rest * np.eye(size)


def test_without_noise_centres_move_as_in_lloyds_algorithm() -> None:
    clients = [bent(1500, seed=s) for s in (1, 2)]
    server = Server(clients, with_moves(300.0))
    means = server.told[-1]["means"].double().numpy()
    x = np.concatenate([shown(c) for c in clients]) @ cosine_basis(SHAPE, WIDE).T
    y = np.concatenate([c.labels for c in clients])
    z = (x - means[y]) @ server.leading.T
    centers = server.centers(3)
    np.testing.assert_allclose(
        centers, first_centers(server.pooled, server.sums("classes"), server.planned[3]), atol=1e-5
    )
    for number in range(4, 6):
        for k in range(CLASSES):
            own = z[y == k]
            near = np.linalg.norm(own[:, None] - centers[k], axis=2).argmin(axis=1)
            for j in range(J):
                if (near == j).sum() > 5:
                    centers[k, j] = own[near == j].mean(axis=0)
        np.testing.assert_allclose(server.centers(number), centers, atol=0.02)


def test_the_mixture_has_the_classes_moments_and_tells_heaps_apart() -> None:
    clients = [bent(3000, seed=s) for s in (1, 2)]
    server = Server(clients, with_moves(300.0))
    one, many = server.gaussians(single=True), server.gaussians()
    assert many.classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for k in range(CLASSES):
        (mean, cov), (wanted, whole) = moments(many, k), moments(one, k)
        np.testing.assert_allclose(mean, wanted, atol=1e-9)
        assert np.abs(cov - whole).max() < 0.02 * np.abs(whole).max()
        assert float(many.weights[3 * k : 3 * k + 3].sum()) == pytest.approx(float(one.weights[k]))
    x = np.concatenate([shown(c) for c in clients])
    y = np.concatenate([c.labels for c in clients])
    of_one = torch.from_numpy(x[y == 1])
    gain = many.log_class_joint(of_one, 3, even=True) - one.log_class_joint(of_one, 3, even=True)
    assert float(gain[:, 1].mean()) > 0.5  # nats an image of the class in heaps


def test_noise_takes_little_from_many_images() -> None:
    clients = [bent(6000, seed=s) for s in (1, 2)]
    noisy = Server(clients, with_moves(1.1)).gaussians()
    x, y = shown(clients[0]), clients[0].labels
    of_one = torch.from_numpy(x[y == 1])
    single = Server(clients, with_moves(1.1)).gaussians(single=True)
    gain = noisy.log_class_joint(of_one, 3, even=True) - single.log_class_joint(
        of_one, 3, even=True
    )
    assert float(gain[:, 1].mean()) > 0.3


@pytest.mark.parametrize("mu", [0.02, 0.1])
def test_components_that_drown_leave_the_one_gaussian(mu: float) -> None:
    clients = [bent(60, seed=1)]
    server = Server(clients, with_moves(mu))
    assert not server.moved().seen.any()
    one, many = server.gaussians(single=True), server.gaussians()
    x = torch.from_numpy(shown(clients[0]))
    for abar in (1.0, 0.5):
        torch.testing.assert_close(
            many.log_class_joint(x, 3, abar), one.log_class_joint(x, 3, abar), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("case", ["one image", "one class", "equal images", "a class leaves"])
def test_bad_input_gives_gaussians_that_can_be_used(case: str) -> None:
    given = bent(40, seed=10)
    if case == "one image":
        clients = [bent(1, seed=11)]
    elif case == "one class":
        clients = [dataclasses.replace(given, labels=np.ones(40, dtype=np.int64))]
    elif case == "equal images":
        same = np.repeat(given.images[:1], 40, axis=0)
        clients = [dataclasses.replace(given, images=same)]
    else:
        clients = [given, dataclasses.replace(given, labels=np.full(40, 2))]
    for mu in (0.5, 300.0):
        server = Server(clients, with_moves(mu))
        if case == "a class leaves":  # with a client, before components
            for stage in server.planned[3:]:
                server.kept[stage.stage] = server.kept[stage.stage][1:]
        g = server.gaussians()
        assert set(g.classes.tolist()) == set(np.concatenate([c.labels for c in clients]).tolist())
        drawn = g.draw(g.classes, generator=torch.Generator().manual_seed(0))
        assert bool(drawn.isfinite().all())


def test_sums_of_an_earlier_run_count_at_the_nearest_centre() -> None:
    """Made with another W and other centres; in plain runs by the server, else by the client."""
    clients = [bent(1500, seed=s) for s in (1, 2)]
    server = Server(clients, with_moves(300.0))
    stage, told = server.planned[-1], server.told[-1]
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(Q, Q)))[0]
    order = np.array([2, 0, 1])
    centers = server.centers(5)[:, order] @ turn.T
    other = {
        **told,
        "directions": torch.from_numpy(turn @ server.leading).float(),
        "centers": torch.from_numpy(centers.reshape(-1, Q)).float(),
    }
    late = sent(clients[1], stage, client=99, public=other)
    wanted, name = server.moved(), stage.stage
    first = server.sums(name)[0]
    found = move([first, late], name, server.leading, server.centers(5))
    assert wanted.seen.any()
    near = wanted.images > 100
    np.testing.assert_allclose(found.images[near], wanted.images[near], rtol=0.05)
    np.testing.assert_allclose(found.centers[near], wanted.centers[near], atol=0.05)
    total = total_of(late, told["directions"], told["centers"])
    again = move([first, total], name, server.leading, server.centers(5))
    np.testing.assert_allclose(again.images, found.images, rtol=1e-6)
    np.testing.assert_allclose(again.centers[near], found.centers[near], atol=1e-3)


# --- The mixture as a denoiser, against sums over a grid ---------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("abar", [0.9, 0.5, 0.05])
def test_denoiser_and_posteriors_are_those_of_a_sum_over_a_grid(abar: float) -> None:
    rng = np.random.default_rng(4)
    frames = np.array([np.linalg.qr(rng.normal(size=(2, 2)))[0][:1] for _ in range(5)])
    g = ClassGaussians(
        means=torch.from_numpy(rng.normal(size=(5, 2))),
        directions=torch.from_numpy(frames),
        variances=torch.from_numpy(rng.uniform(0.3, 0.8, (5, 1))),
        rest=torch.from_numpy(rng.uniform(0.1, 0.3, 5)),
        weights=torch.tensor([3.0, 1.0, 2.0, 2.0, 1.0]),
        classes=torch.tensor([0, 0, 0, 1, 1]),
    )
    axis = np.linspace(-7.0, 7.0, 561)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    logs = np.array(
        [multivariate_normal(g.means[j].numpy(), dense(g, j)).logpdf(points) for j in range(5)]
    )
    x_t = np.array([[0.4, -0.3], [1.5, 0.8], [-1.0, 2.0]])
    step, shares = (axis[1] - axis[0]) ** 2, np.log(g.weights.numpy() / 9.0)
    evidence = np.zeros((3, 2))
    for k, own in ((0, [0, 1, 2]), (1, [3, 4])):
        prior = logsumexp(logs[own] + shares[own, None], axis=0)
        for row, x in enumerate(x_t):
            away = np.square(x - math.sqrt(abar) * points).sum(axis=1) / (2.0 * (1.0 - abar))
            joint = prior - away
            weights = np.exp(joint - joint.max())
            expected = weights @ points / weights.sum()
            got = g.posterior_mean(
                torch.from_numpy(x)[None], torch.tensor([abar]), torch.tensor([k])
            )[0]
            np.testing.assert_allclose(got, expected, atol=2e-4)
            evidence[row, k] = logsumexp(joint) + math.log(step / (2 * math.pi * (1.0 - abar)))
    x = torch.from_numpy(x_t)
    np.testing.assert_allclose(g.log_class_joint(x, 2, abar), evidence, atol=1e-4)
    even = evidence - np.log([6.0 / 9.0, 3.0 / 9.0])
    np.testing.assert_allclose(
        g.log_class_posterior(x, 2, abar, even=True),
        even - logsumexp(even, axis=1, keepdims=True),
        atol=1e-4,
    )
