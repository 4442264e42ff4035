"""From clients' sums to class Gaussians, against the exact statistics of their images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.privacy.estimation import class_gaussians, class_means, pooled_directions
from fedpdm.privacy.mechanism import (
    ClassStatistics,
    ReleasedStatistics,
    ReleaseSource,
    StatisticsParameters,
)
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.statistics import STAGES
from fedpdm.privacy.mechanism.whole import unpack_symmetric
from fedpdm.privacy.noise import GRID
from tests.support.statistics_toys import seeded

SHAPE, PIXELS, CLASSES = (1, 5, 5), 25, 3
MECHANISM = ClassStatistics()


def parameters(*, mu: float, clip_norm: float = 6.0, directions: int = 4) -> Any:
    return tuple(
        StatisticsParameters(
            stage=stage, mu=mu, clip_norm=clip_norm, dimensions=PIXELS, directions=directions,
            num_classes=CLASSES, shift=0.0, grid=GRID,
        )
        for stage in STAGES
    )  # fmt: skip


def draw(count: int, *, seed: int, labels: np.ndarray | None = None) -> ReleaseSource:
    """Images around three means, with four directions of which class 2 has its own."""
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(99)
    means = world.normal(size=(CLASSES, PIXELS)) * 0.25
    frame = np.linalg.qr(world.normal(size=(PIXELS, PIXELS)))[0]
    y = rng.integers(0, CLASSES, count) if labels is None else labels
    scale = np.where(y[:, None] == 2, [0.9, 0.3, 0.5, 0.2], [0.3, 0.9, 0.5, 0.2])
    x = means[y] + (rng.normal(size=(count, 4)) * scale) @ frame[:4]
    x += rng.normal(size=x.shape) * 0.05
    pixels = np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return ReleaseSource(images=pixels.reshape(-1, *SHAPE), labels=y.astype(np.int64))


def sent(
    given: ReleaseSource, made_with: StatisticsParameters, *, client: int, public: Any = None
) -> ReleasedStatistics:
    source = dataclasses.replace(given, public=public or {})
    parts = [a.copy() for a in MECHANISM.make(source, made_with, seeded(client + 1000))]
    tensors = {
        name: torch.from_numpy(part)[None]
        for name, part in zip(MECHANISM.names, parts, strict=True)
    }
    return MECHANISM.restore(
        tensors, parameters=made_with, event=MECHANISM.event(made_with), noise_source="",
        seeded=True, check_values=True,
    )  # fmt: skip


def three_rounds(
    clients: list[ReleaseSource], made_with: Any
) -> tuple[Any, Any, list[ReleasedStatistics], ClassGaussians]:
    first = [sent(c, made_with[0], client=m) for m, c in enumerate(clients)]
    means = class_means(first)
    public = means.public()
    second = [sent(c, made_with[1], client=10 + m, public=public) for m, c in enumerate(clients)]
    pooled = pooled_directions(second)
    public = public | pooled.public(made_with[2].directions)
    third = [sent(c, made_with[2], client=20 + m, public=public) for m, c in enumerate(clients)]
    return means, pooled, third, class_gaussians(means, pooled, third, image_shape=SHAPE)


def shown(given: ReleaseSource) -> np.ndarray:
    return given.images.reshape(len(given.images), -1) / 127.5 - 1.0


def covariance(g: ClassGaussians, j: int) -> np.ndarray:
    v = g.directions[j].numpy()
    rest = float(g.rest[j])
    return v.T @ np.diag(g.variances[j].numpy() - rest) @ v + rest * np.eye(PIXELS)


def test_with_next_to_no_noise_the_gaussians_are_those_of_the_images() -> None:
    clients = [draw(2500, seed=s) for s in (1, 2)]
    x = np.concatenate([shown(c) for c in clients])
    y = np.concatenate([c.labels for c in clients])
    means, pooled, _, g = three_rounds(clients, parameters(mu=300.0))
    np.testing.assert_array_equal(means.counts, np.bincount(y))
    assert len(pooled.directions) >= 4
    for k in range(CLASSES):
        of_class = x[y == k]
        np.testing.assert_allclose(g.means[k], of_class.mean(axis=0), atol=2e-3)
        exact = np.cov(of_class.T, bias=True)
        assert np.abs(covariance(g, k) - exact).max() < 0.05 * np.abs(exact).max() + 2e-3
    np.testing.assert_array_equal(g.weights, np.bincount(y))
    right = g.log_class_joint(torch.from_numpy(x[:500]), CLASSES).argmax(dim=1).numpy() == y[:500]
    assert right.mean() > 0.95


def test_noise_of_the_means_is_that_of_one_sum_per_client() -> None:
    made_with = parameters(mu=0.7)
    clients = [draw(400, seed=s) for s in range(3)]
    errors = []
    for at in range(40):
        releases = [sent(c, made_with[0], client=100 * at + m) for m, c in enumerate(clients)]
        total = sum(r.sums[0].double().numpy() for r in releases)
        exact = sum(MECHANISM.exact_sums(c, made_with[0], np.zeros((0, 25))) for c in clients)
        errors.append((total - exact) / made_with[0].steps)
    expected = np.sqrt(3.0) * made_with[0].sigma
    assert np.std(errors) == pytest.approx(expected, rel=0.05)
    assert made_with[0].sigma == pytest.approx(2.0 * 6.0 / 0.7, rel=1e-3)


def test_a_class_that_drowns_in_its_noise_has_the_mean_of_all() -> None:
    given = draw(3000, seed=4, labels=np.repeat([0, 1, 2], [1499, 1499, 2]))
    means = class_means([sent(given, parameters(mu=0.5)[0], client=0)])
    x = shown(given) @ cosine_basis(SHAPE, PIXELS).T
    grand = x.mean(axis=0)
    assert np.linalg.norm(means.means[2] - grand) < np.linalg.norm(grand)
    of_class = x[given.labels == 0].mean(axis=0)
    assert np.linalg.norm(means.means[0] - of_class) < 0.1 * np.linalg.norm(of_class)


def test_the_edge_is_where_the_spectrum_of_noise_ends() -> None:
    p, clients = 60, 3
    made_with = dataclasses.replace(parameters(mu=1.0)[1], dimensions=p)
    rng = np.random.default_rng(0)
    tops = []
    for _ in range(10):
        packed = rng.normal(size=(clients, made_with.size(p))).sum(axis=0) * GRID
        values = np.linalg.eigvalsh(unpack_symmetric(packed, p) / made_with.steps**2 / 100.0)
        tops.append(values[-1])
    edge = np.sqrt(2.0 * p * clients) * made_with.sigma / 100.0
    assert np.mean(tops) == pytest.approx(edge, rel=0.06)
    by_hand = 2 * np.sqrt(p * clients / 2) * np.sqrt(2) * 6.0**2 / (1.0 * 100)  # STATISTICS.md 2
    assert edge == pytest.approx(by_hand, rel=2e-3)


def test_eigenvalues_above_the_edge_are_freed_of_what_noise_adds() -> None:
    """Clients of 700 images at a mu where two directions stand out of the noise, three do not."""
    truth = parameters(mu=300.0)
    clients = [draw(700, seed=s) for s in (5, 6)]
    exact = three_rounds(clients, truth)[1].variances[:2]
    made_with = parameters(mu=2.0)
    found, raw = [], []
    means = class_means([sent(c, truth[0], client=m) for m, c in enumerate(clients)]).public()
    for at in range(12):
        second = [
            sent(c, made_with[1], client=50 * at + m, public=means) for m, c in enumerate(clients)
        ]
        pooled = pooled_directions(second)
        assert 1 <= len(pooled.directions) <= 4
        found.append(pooled.variances[0])
        raw.append(pooled.variances[0] + (pooled.edge / 2.0) ** 2 / pooled.variances[0])
    assert abs(np.mean(found) - exact[0]) < abs(np.mean(raw) - exact[0])
    assert np.mean(found) == pytest.approx(exact[0], rel=0.2)


def test_privacy_costs_little_with_many_images_and_class_moments_tell_classes_apart() -> None:
    clients = [draw(6000, seed=s) for s in (7, 8)]
    y = np.concatenate([c.labels for c in clients])
    x = np.concatenate([shown(c) for c in clients])
    _, pooled, _, g = three_rounds(clients, parameters(mu=1.1))
    common = class_gaussians(*three_rounds(clients, parameters(mu=1.1))[:2], [], image_shape=SHAPE)
    gaps, without = [], []
    for k in range(CLASSES):
        exact = np.cov(x[y == k].T, bias=True)
        gaps.append(np.linalg.norm(covariance(g, k) - exact) / np.linalg.norm(exact))
        without.append(np.linalg.norm(covariance(common, k) - exact) / np.linalg.norm(exact))
    assert max(gaps) < 0.35
    assert gaps[2] < 0.6 * without[2]
    assert len(pooled.directions) >= 2


def test_nothing_above_the_edge_leaves_the_means() -> None:
    clients = [draw(30, seed=9)]
    means, pooled, third, g = three_rounds(clients, parameters(mu=0.3))
    assert np.linalg.norm(means.means, axis=1).max() < 2.0  # the sum's noise has a norm of 12
    assert pooled.directions.shape == (0, PIXELS)
    assert pooled.public(4)["directions"].shape == (0, PIXELS)
    assert g.directions.shape == (3, 0, PIXELS)
    assert float(g.rest.min()) > 0
    assert not third[0].directions.any()


@pytest.mark.parametrize(
    "case",
    ["one image", "one image in all", "one class", "equal images", "class of nobody", "p above N"],
)
def test_bad_input_gives_gaussians_that_can_be_used(case: str) -> None:
    given = draw(40, seed=10)
    if case == "one image":
        clients = [draw(1, seed=11), given]
    elif case == "one image in all":
        clients = [draw(1, seed=11)]
    elif case == "p above N":  # 25 directions of 8 images
        clients = [draw(5, seed=11), draw(3, seed=12)]
    elif case == "one class":
        clients = [draw(20, seed=11, labels=np.ones(20, dtype=np.int64)), given]
    elif case == "equal images":
        same = np.repeat(given.images[:1], 40, axis=0)
        clients = [dataclasses.replace(given, images=same)]
    else:
        clients = [draw(40, seed=11, labels=np.arange(40) % 2)]
    for mu in (0.5, 300.0):
        *_, g = three_rounds(clients, parameters(mu=mu))
        held = sorted(set(np.concatenate([c.labels for c in clients]).tolist()))
        assert g.classes.tolist() == held
        drawn = g.draw(g.classes, generator=torch.Generator().manual_seed(0))
        assert bool(drawn.isfinite().all())


def test_sums_with_other_directions_are_turned_to_these() -> None:
    """A client that released its class moments in an earlier run sends those, not new ones."""
    made_with = parameters(mu=300.0)
    clients = [draw(1500, seed=s) for s in (12, 13)]
    means, pooled, third, expected = three_rounds(clients, made_with)
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    other = {
        **means.public(),
        "directions": torch.from_numpy(turn @ pooled.directions[:4]).float(),
    }
    late = sent(clients[1], made_with[2], client=70, public=other)
    g = class_gaussians(means, pooled, [third[0], late], image_shape=SHAPE)
    for j in range(CLASSES):
        np.testing.assert_allclose(covariance(g, j), covariance(expected, j), atol=5e-3)
    wrong = dataclasses.replace(late, directions=third[1].directions)  # if that were overlooked
    spoilt = class_gaussians(means, pooled, [third[0], wrong], image_shape=SHAPE)
    assert np.abs(covariance(spoilt, 0) - covariance(expected, 0)).max() > 0.03


def test_sums_of_two_times_count_as_two_with_noise_each() -> None:
    made_with = parameters(mu=1.0)
    a, b = (sent(draw(500, seed=s), made_with[0], client=s) for s in (14, 15))
    together = dataclasses.replace(
        a,
        counts=torch.cat([a.counts, b.counts]),
        sums=torch.cat([a.sums, b.sums]),
        directions=torch.cat([a.directions, b.directions]),
    )
    one, two = class_means([together]), class_means([a, b])
    np.testing.assert_allclose(one.means, two.means)
    np.testing.assert_array_equal(one.counts, two.counts)


def test_sums_that_do_not_belong_together_are_refused() -> None:
    made_with = parameters(mu=1.0)
    good = sent(draw(50, seed=16), made_with[0], client=0)
    other = sent(draw(50, seed=16), parameters(mu=1.5)[0], client=0)
    for bad, words in (
        ([], "no sums were collected"),
        ([good, other], "with other settings"),
        ([dataclasses.replace(good, counts=0 * good.counts)], "no sum has an image"),
    ):
        with pytest.raises(ValueError, match=f"means: .*{words}"):
            class_means(bad)
    with pytest.raises(ValueError, match="pooled: sums of another round"):
        pooled_directions([good])
