"""`fedpdm attack audit` and `linkage` of class statistics: they pass, and see every fault."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpdm.privacy.planning
from fedpdm.attacks.sum_canaries import (
    auditors_public,
    distinct_sums,
    draw_sum_game,
    opposites,
)
from fedpdm.attacks.sum_linkage import auc_of_mu, link_sums
from fedpdm.cli import main
from fedpdm.data import ImageSet, load_image_set
from fedpdm.engines.one_client import attack_config, upload_sums
from fedpdm.privacy.mechanism import (
    ClassStatistics,
    ReleasedStatistics,
    ReleaseSource,
    SystemNoise,
    statistics,
)
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.releases import ReleaseStore, store
from tests.support.attack_commands import (
    HalfNoise,
    HalfSeeded,
    SameNoise,
    SameSeeded,
    caught,
    failed,
    last_line,
    run,
    with_known_seeds,
)
from tests.support.sum_toys import config_of, made, planned_of, view_of

SHAPE = (1, 8, 8)
AUDIT = [
    "attack", "audit", "--release", "statistics", "--shape", "1x8x8", "--canaries", "200",
    "--clip-norm", "6", "--seed", "4", "--json",
]  # fmt: skip
LINKAGE = [
    "attack", "linkage", "--release", "statistics", "--clip-norm", "6", "--images", "6",
    "--repeats", "40", "--seed", "4", "--json",
]  # fmt: skip


def unclipped(x: np.ndarray, *, steps: float, limit: int) -> np.ndarray:
    return np.rint(x * steps).astype(np.int64)


# --- The right path -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_audit_passes_and_proves_a_good_part(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*AUDIT, "--canaries", "1500", "--out", str(tmp_path), "--seeded", "1"]
    code, facts = run(arguments, capsys)
    assert (code, failed(facts)) == (0, set())
    assert facts["claimed_epsilon"] == pytest.approx(10.0)
    assert facts["num_uploads"] == 6  # two runs
    assert facts["num_distinct"] == facts["recorded"] == 3
    assert 0.95 < facts["distance_ratio"] < 0.97  # sqrt(0.94), less what rounding costs
    assert facts["reached_mu"] == pytest.approx(facts["distance_ratio"] * 2.0004, rel=1e-3)
    assert facts["accuracy"] == pytest.approx(facts["expected_accuracy"], abs=0.04)
    assert 2.0 < facts["epsilon_steinke"] < facts["epsilon_gaussian"]
    assert 6.0 < facts["epsilon_independent"] < 10.0
    assert json.loads((tmp_path / "audit.json").read_text()) == facts


@pytest.mark.slow
def test_the_audit_takes_components(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = run([*AUDIT, "--components", "3", "--seeded", "1"], capsys)
    assert (code, failed(facts)) == (0, set())
    assert facts["claimed_epsilon"] == pytest.approx(10.0)
    assert facts["num_distinct"] == facts["recorded"] == 6
    assert 0.9 < facts["distance_ratio"] < 0.92  # sqrt(0.84): pairs are in one component


@pytest.mark.slow
def test_linkage_asks_of_a_pair_at_two_centres() -> None:
    config = attack_config(
        epsilon=10.0, t0=None, delta=1e-5, clip_norm=6.0, shift=0.0, schedule="linear",
        num_steps=1000, seed=0, statistics_of=64, components=3,
    )  # fmt: skip
    pair = opposites(SHAPE)
    others = draw_sum_game(5, shape=SHAPE, rng=np.random.default_rng(3)).images
    rounds = planned_of(config, others)
    public = auditors_public(rounds[-1], SHAPE, pair)
    seeds = iter(range(10**6))

    def obtain(images: ImageSet) -> list[ReleasedStatistics]:
        given = ReleaseSource(images=images.images, labels=images.labels, public=public)
        return [made(given, each, next(seeds)) for each in rounds]

    found = link_sums(others, pair, obtain, public, rounds, num_releases=200).summary
    assert found.agrees
    assert 0.95 < found.reached_mu / found.mu < 0.975
    for (stage, distance, *_), planned in zip(found.rounds[3:], rounds[3:], strict=True):
        assert stage == planned.stage
        assert 0.97 * planned.mu < distance <= planned.mu


@pytest.mark.slow
def test_linkage_agrees_with_theory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, facts = run([*LINKAGE, "--seeded", "1", "--out", str(tmp_path)], capsys)
    assert code == 0
    assert facts["auc_low"] <= facts["auc_analytic"] <= facts["auc_high"]
    assert facts["worst_auc"] == pytest.approx(0.9214, abs=1e-4)  # docs/privacy.md: Phi(mu/sqrt 2)
    assert facts["worst_auc"] - 0.02 < facts["auc_analytic"] < facts["worst_auc"]
    assert [stage for stage, *_ in facts["rounds"]] == ["means", "pooled", "classes"]
    whole = math.hypot(*(distance for _, distance, *_ in facts["rounds"]))
    assert facts["reached_mu"] == pytest.approx(whole)
    assert json.loads((tmp_path / "linkage.json").read_text()) == facts
    assert (tmp_path / "linkage.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (1, 7, 7), (3, 8, 8), (1, 28, 28)])
def test_canaries_are_orthogonal_and_as_far_apart_as_can_be(shape: tuple[int, int, int]) -> None:
    size = math.prod(shape)
    game = draw_sum_game(size, shape=shape, rng=np.random.default_rng(0))
    assert game.images.num_classes > 1
    rounds = planned_of(config_of(shape, clip_norm=0.4 * math.sqrt(size)), game.images)
    own = game.images.labels == 0
    x = game.first[own].reshape(own.sum(), -1) / 127.5 - 1.0
    y = game.second[own].reshape(own.sum(), -1) / 127.5 - 1.0
    products = np.concatenate([x, y]) @ np.concatenate([x, y]).T
    off = np.abs(products - np.diag(np.diag(products))).max()
    assert off < 1e-3 * np.diag(products).min()
    public = auditors_public(rounds[0], shape)
    for parameters in rounds:
        view = view_of(parameters, shape, public)
        a, b = (view.vectors(side, game.images.labels) for side in (game.first, game.second))
        distance = np.sqrt(view.squared_distance(a, b)) / GRID
        most = parameters.mu * (math.sqrt(0.5) if parameters.stage == "means" else 1.0)
        assert (distance <= parameters.mu * (1.0 + 1e-9)).all()
        assert (np.abs(distance / most - 1.0) < 0.05).all(), parameters.stage


# --- Planted faults -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("components", ["1", "2"])
@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [(HalfNoise, {"noise energy", "guesses"}), (SameNoise, {"noise reused"})],
    ids=["half the noise", "the same noise"],
)
def test_bad_noise_is_caught(
    fault: type[SystemNoise],
    caught_by: set[str],
    components: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fedpdm.privacy.planning, "SystemNoise", fault)
    more = ["--components", components, "--canaries", "400"]
    assert caught_by <= caught([*AUDIT, *more], capsys)[0]


def test_skipped_clipping_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(statistics, "whole_vectors", unclipped)
    assert {"image in the noise"} <= caught(AUDIT, capsys)[0]


def test_an_image_in_two_sums_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store that makes new sums of images that it has released."""
    remembers, real = store.matching_releases, ReleaseStore.obtain
    number, blind = iter(range(100)), [False]

    def obtain(self: ReleaseStore, *given: Any, **options: Any) -> Any:
        blind[0] = next(number) >= 3  # in the second run
        return real(self, *given, **options)

    def matching(*given: Any) -> Any:
        was, blind[0] = blind[0], False
        return [] if was else remembers(*given)

    monkeypatch.setattr(ReleaseStore, "obtain", obtain)
    monkeypatch.setattr(store, "matching_releases", matching)
    names, facts = caught(AUDIT, capsys)
    assert "claim" in names
    assert facts["num_distinct"] > 3


def test_an_unrecorded_second_sum_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = ReleaseStore.obtain, iter(range(100))

    def forgetful(self: ReleaseStore, *given: Any, **options: Any) -> Any:
        if next(calls) == 3:  # between the two runs
            (self.root / "ledger.jsonl").unlink()
            shutil.rmtree(self.root / "releases")
        return real(self, *given, **options)

    monkeypatch.setattr(ReleaseStore, "obtain", forgetful)
    monkeypatch.setattr(store, "check_traces", lambda *_: None)  # the store's own defence
    names, facts = caught(AUDIT, capsys)
    assert {"ledger", "claim"} <= names
    assert (facts["num_distinct"], facts["recorded"]) == (6, 3)


def test_an_image_that_counts_twice_in_one_sum_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = ClassStatistics.exact_sums
    monkeypatch.setattr(ClassStatistics, "exact_sums", lambda *given: 2 * exact(*given))
    assert {"image in the noise"} <= caught(AUDIT, capsys)[0]


@pytest.mark.slow
def test_a_known_seed_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    answers = with_known_seeds(AUDIT, capsys)
    assert answers == [(1, {"noise known to others"}), (0, set())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "repeats"),
    [("half the noise", "60"), ("no clipping", "20"), ("the same noise", "20")],
)
def test_linkage_sees_faults(
    fault: str,
    repeats: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fault == "no clipping":
        monkeypatch.setattr(statistics, "whole_vectors", unclipped)
    else:
        noise = HalfSeeded if fault == "half the noise" else SameSeeded
        monkeypatch.setattr(fedpdm.privacy.planning, "SeededNoise", noise)
    code, facts = run([*LINKAGE, "--repeats", repeats, "--epsilon", "3", "--seeded", "3"], capsys)
    assert code == 1
    assert facts["auc_low"] > facts["auc_analytic"]


@pytest.mark.slow
@pytest.mark.parametrize(("times", "releases"), [(1, 300), (3, 150)])
def test_linkage_sees_an_image_in_more_sums_than_planned(times: int, releases: int) -> None:
    """By the mechanism itself, hundreds of times; once is as theory says, three times is more."""
    config = config_of(SHAPE, epsilon=3.0)
    others = draw_sum_game(5, shape=SHAPE, rng=np.random.default_rng(3)).images
    rounds = planned_of(config, others)
    public = auditors_public(rounds[0], SHAPE)
    seeds = iter(range(10**6))

    def obtain(images: ImageSet) -> list[ReleasedStatistics]:
        given = ReleaseSource(images=images.images, labels=images.labels, public=public)
        return [made(given, each, next(seeds)) for each in rounds for _ in range(times)]

    found = link_sums(
        others, opposites(SHAPE), obtain, public, rounds, num_releases=releases
    ).summary
    assert found.agrees is (times == 1)
    if times == 1:
        assert found.auc_low < found.worst_auc
        for _, _, measured, analytic in found.rounds:
            assert measured == pytest.approx(analytic, abs=0.07)
    else:
        assert found.auc_low > found.worst_auc


# --- Details --------------------------------------------------------------------------------


def test_a_replay_is_no_second_sum(tmp_path: Path) -> None:
    game = draw_sum_game(40, shape=SHAPE, rng=np.random.default_rng(0))
    config = config_of(SHAPE)
    rounds = planned_of(config, game.images)
    public = auditors_public(rounds[0], SHAPE)
    uploads, kept = upload_sums(config, game.images, tmp_path, public=public, runs=2)
    assert (len(uploads), len(distinct_sums(uploads))) == (6, 3)
    assert len(kept.ledger().releases()) == 3
    with pytest.raises(ValueError, match="num_releases must be at least 2, got 1"):
        link_sums(game.images, opposites(SHAPE), lambda _: uploads, public, rounds, num_releases=1)
    assert auc_of_mu(0.0) == 0.5


def test_equal_images_are_refused(tmp_path: Path) -> None:
    digits = load_image_set("digits", split="test")
    with pytest.raises(ValueError, match="images must be distinct"):
        upload_sums(config_of((3, 8, 8)), digits.subset(np.array([1, 2, 1])), tmp_path, public={})


@pytest.mark.slow
def test_the_text_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AUDIT[:-1], "--seeded", "1", "--known-seed", "1"]) == 1
    text = capsys.readouterr().out
    assert "LEAKS MORE THAN" in text
    assert "ok   counts: each of 3 sums says that it has 200 images" in text
    main([*LINKAGE[:-1], "--repeats", "3", "--seeded", "1"])
    text = capsys.readouterr().out
    assert "3 releases of each of two sets of 6 images of digits that differ in one" in text
    assert "AUC of classes alone" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["linkage", "--pairs", "5"], "--pairs: is for images; with --release statistics give"),
        (["linkage", "--images", "0"], "--images: must be at least 1, got 0"),
        (["linkage", "--repeats", "1"], "num_releases must be at least 2, got 1"),
        (["audit", "--components", "0"], "statistics.components: must be at least 1, got 0"),
        (["audit", "--release", "images", "--components", "2"], "--components: is for --release"),
        (["linkage", "--t0", "600"], "privacy.epsilon: release statistics needs it"),
        (["audit", "--canaries", "0"], "num_canaries must be at least 1, got 0"),
        (["audit", "--shape", "2x8x8"], "shape must be (C, H, W) of at least 4 values"),
        (["audit", "--release", "sums"], "invalid choice: 'sums'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *rest = arguments
    code, said = last_line(["attack", kind, "--release", "statistics", *rest], capsys)
    assert code == 2
    assert line in said
