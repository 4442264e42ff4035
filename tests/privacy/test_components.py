"""Rounds of components: what they cost, how far an image moves them, what of them is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution

from fedpdm import wire
from fedpdm.config import ConfigError, RunConfig, config_from_mapping, config_to_json
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
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

# --- What they cost, and how far an image moves them -------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
