"""A class as a mixture: what rounds of components cost, how far an image moves them, and what the
server makes of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from fedpdm import wire
from fedpdm.config import ConfigError, RunConfig, config_from_mapping, config_to_json
from fedpdm.diffusion.gaussian import ClassGaussians
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.components import class_mixtures, first_centers, move, told_before
from fedpdm.privacy.estimation import class_gaussians, class_means, pooled_directions
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
    ReleaseSource,
    StatisticsParameters,
    event_of,
    parameter_fields,
    read_release_metadata,
    release_metadata,
    statistics,
)
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.sums import component_stage
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.turning import total_of
from tests.privacy.test_statistics_estimation import PIXELS as WIDE
from tests.privacy.test_statistics_estimation import SHAPE, draw, parameters, sent, shown
from tests.support.release_toys import DELTA, image_set
from tests.support.statistics_toys import (
    CLASSES,
    COMPONENTS,
    MECHANISM,
    ONE_SIGMA,
    PIXELS,
    NoNoise,
    largest_move,
    made,
    moved,
    public,
    rounds,
    seeded,
    source,
    source_of,
    statistics_config,
)

Q, J = 4, 3  # directions and components of the estimates below


# --- What they cost, and how far an image moves them -------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
@pytest.mark.parametrize("moves", [1, 3])
def test_all_rounds_together_spend_the_budget_and_no_more(epsilon: float, moves: int) -> None:
    planned = rounds(
        epsilon=epsilon, components=COMPONENTS, component_rounds=moves, components_share=0.3
    )
    assert [each.stage for each in planned[3:]] == [component_stage(n + 1) for n in range(moves)]
    spent = epsilon_spent([event_of(each) for each in planned], delta=DELTA)
    assert epsilon * (1.0 - 1e-9) < spent <= epsilon
    squares = np.array([each.mu**2 for each in planned])
    expected = [0.12, 0.28, 0.3, *[0.3 / moves] * moves]
    np.testing.assert_allclose(squares / squares.sum(), expected, rtol=1e-9)
    loss = privacy_loss_distribution.from_gaussian_mechanism(1.0 / planned[0].mu)
    for each in planned[1:]:
        loss = loss.compose(privacy_loss_distribution.from_gaussian_mechanism(1.0 / each.mu))
    assert loss.get_epsilon_for_delta(DELTA) == pytest.approx(epsilon, rel=3e-3)


def last(**changes: Any) -> StatisticsParameters:
    return rounds(components=COMPONENTS, **changes)[-1]


@pytest.mark.parametrize("epsilon", [10.0, 1.0])
def test_no_pair_of_images_moves_a_sum_further_than_the_bound(epsilon: float) -> None:
    parameters = last(epsilon=epsilon)
    found = largest_move(MECHANISM, parameters)
    assert 0.99 * parameters.sensitivity <= found <= parameters.sensitivity
    assert 0.99 * parameters.mu < parameters.sensitivity / GRID <= parameters.mu
    assert event_of(parameters).noise_multiplier == 1.0 / parameters.mu


def test_pairs_in_one_component_and_in_two_keep_to_the_same_bound() -> None:
    """In one |a - b| <= 2 C_r, from one to another sqrt(|a|^2 + |b|^2 + 2 C_r^2): both reach it."""
    parameters = last()
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, (3000, PIXELS)) * 255
    b = np.where(rng.random((3000, 1)) < 0.5, 255 - a, rng.integers(0, 2, (3000, PIXELS)) * 255)
    square = moved(MECHANISM, a, b, parameters)
    places = [
        MECHANISM.contributions(source(each), parameters, public()["directions"].numpy())
        .reshape(3000, COMPONENTS, -1)[:, :, -1]
        .argmax(axis=1)
        for each in (a, b)
    ]
    same = places[0] == places[1]
    assert 100 < same.sum() < 2900
    for kind in (same, ~same):
        found = math.sqrt(square[kind].max())
        assert 0.9 * parameters.sensitivity < found <= parameters.sensitivity


@pytest.mark.parametrize("fault", ["no clipping", "counts that weigh twice"])
def test_faults_pass_the_bound(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = last()
    if fault == "no clipping":
        monkeypatch.setattr(
            statistics, "whole_vectors",
            lambda x, *, steps, limit: np.rint(x * steps).astype(np.int64),
        )  # fmt: skip
    else:
        twice = property(lambda self: 2 * math.isqrt(self.limit))
        monkeypatch.setattr(StatisticsParameters, "weight", twice)
    assert largest_move(MECHANISM, parameters, generations=20) > 1.3 * parameters.sensitivity


# --- Whole numbers, noise ----------------------------------------------------------------------


def test_sums_are_those_of_each_image_at_its_nearest_centre() -> None:
    parameters, images = last(), image_set(11)
    got = made(MECHANISM, source_of(images), parameters, NoNoise())
    assert got.shape == (CLASSES, COMPONENTS * 6)
    given = public()
    x = images.images.reshape(11, -1) / 127.5 - 1.0 - parameters.shift
    x = x @ cosine_basis((1, 4, 4), PIXELS).T - given["means"].double().numpy()[images.labels]
    z = x @ given["directions"].double().numpy().T
    z /= np.maximum(1.0, np.linalg.norm(z, axis=1, keepdims=True) / parameters.clip_norm)
    centers = given["centers"].double().numpy().reshape(CLASSES, COMPONENTS, 5)
    expected = np.zeros((CLASSES, COMPONENTS, 6))
    for vector, k in zip(z, images.labels, strict=True):
        j = int(np.argmin([np.linalg.norm(vector - center) for center in centers[k]]))
        expected[k, j] += [*vector * parameters.steps, parameters.weight]
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=11 * 2.0)
    counts = got.reshape(expected.shape)[..., -1]
    np.testing.assert_array_equal(counts, expected[..., -1])  # whole


def test_every_number_has_its_own_noise_also_where_no_image_is() -> None:
    """Which component an image is nearest to depends on its pixels, so no number shows."""
    parameters, images = last(), image_set(6, labels=2)
    exact = made(MECHANISM, source_of(images), parameters, NoNoise())
    errors = np.array(
        [made(MECHANISM, source_of(images), parameters, seeded(at)) - exact for at in range(300)]
    )
    np.testing.assert_allclose(errors[:, :2].std(axis=0), ONE_SIGMA, rtol=0.2)
    assert (errors[:, 2] == 0).all()  # no client's class: no sum
    flat = errors[:, :2].reshape(300, -1)[:, :30]
    assert np.abs(np.corrcoef(flat.T) - np.eye(30)).max() < 0.3


def test_what_a_server_tells_is_checked() -> None:
    parameters, images = last(), image_set(6)
    for bad, words in (
        (None, "the server's centers are missing"),
        (torch.zeros(2, 5), r"centers must be finite, 9 x 5, got \(2, 5\)"),
        (torch.full((9, 5), math.nan), "centers must be finite"),
    ):
        told = {**public(), "centers": bad} if bad is not None else dict(public())
        if bad is None:
            del told["centers"]
        with pytest.raises(ValueError, match=words):
            made(MECHANISM, dataclasses.replace(source_of(images), public=told), parameters,
                 NoNoise())  # fmt: skip


@pytest.mark.parametrize("fault", ["absurd", "count", "shape", "places", "claim"])
def test_hostile_sums_are_refused_by_the_wire(fault: str) -> None:
    parameters = last()
    parts = [p.copy() for p in MECHANISM.make(source_of(image_set(9)), parameters, seeded(0))]
    tensors = {
        name: torch.from_numpy(part)[None]
        for name, part in zip(MECHANISM.names, parts, strict=True)
    }
    good = MECHANISM.restore(
        tensors, parameters=parameters, event=event_of(parameters),
        noise_source=seeded(0).description, seeded=True, check_values=True,
    )  # fmt: skip
    sums = good.sums.clone()
    sums[0, 1, -1 if fault == "count" else 3] += 1 << 40
    changes: dict[str, Any] = {
        "absurd": {"sums": sums},
        "count": {"sums": sums},
        "shape": {"sums": good.sums[:, :, 1:]},
        "places": {"parameters": dataclasses.replace(parameters, components=10**9)},
        "claim": {"parameters": dataclasses.replace(parameters, mu=parameters.mu / 2)},
    }[fault]
    words = {"claim": "does not follow"}.get(fault, "must be")
    message = wire.encode_release(dataclasses.replace(good, **changes), client_id=0)
    with pytest.raises(wire.WireError, match=words) as error:
        wire.decode_release(message, who="client 0", mechanism="statistics")
    assert "\n" not in str(error.value)
    again = wire.decode_release(
        wire.encode_release(good, client_id=0), who="client 0", mechanism="statistics"
    )
    assert isinstance(again, ReleasedStatistics)
    assert torch.equal(again.sums, good.sums)


# --- Records, settings -------------------------------------------------------------------------


def test_records_of_one_gaussian_are_what_they_were() -> None:
    planned = rounds(components=COMPONENTS)
    for each in planned:
        fields = parameter_fields(each)
        assert ("components" in fields) is each.moves
        written = release_metadata(each, event_of(each), noise_source="seeded", seeded=False)
        assert ("components" in written) is each.moves
        assert read_release_metadata(written) == (each, event_of(each))
    written = release_metadata(
        planned[-1], event_of(planned[-1]), noise_source="seeded", seeded=False
    )
    for name, value, words in (
        ("stage", "components-0", "stage must be one of means, pooled, classes, components-N"),
        ("components", "1", "components must be 1, or more in components-N, got 1"),
        ("stage", "classes", "components must be 1, or more in components-N, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            read_release_metadata({**written, name: value})


def test_settings_are_checked_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^statistics\.components: must be at least 1, got 0$"):
        statistics_config(components=0)
    with pytest.raises(ConfigError, match=r"^statistics\.components: must be at most 100, got 101"):
        statistics_config(components=101)
    words = r"^run\.rounds: must be at least 6 .*\(3 and statistics\.component_rounds = 3\), got 5$"
    with pytest.raises(ConfigError, match=words):
        statistics_config(components=2, rounds=5)
    words = r"^statistics: means_share, pooled_share and components_share must sum to less than 1,"
    with pytest.raises(ConfigError, match=words):
        statistics_config(components=2, components_share=0.6, rounds=6)
    one = statistics_config(components_share=0.6)  # without components it is not asked for
    assert one.statistics.shares == (0.12, 0.28, 1.0 - 0.12 - 0.28)


def test_a_config_with_one_component_is_the_one_of_before() -> None:
    plain = RunConfig()
    assert config_to_json(plain) == config_to_json(
        config_from_mapping({"statistics": {"components": 1, "component_rounds": 3}})
    )
    assert "component" not in config_to_json(plain)


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
