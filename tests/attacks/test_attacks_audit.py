"""The audit passes a correct mechanism, again and again, and catches each planted fault."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpdm.attacks.auditing import AuditReport, audit
from fedpdm.attacks.bounds import epsilon_of_mu
from fedpdm.attacks.canaries import draw_game, score_game
from fedpdm.privacy.types import ReleasedDataset
from tests.support.attack_paths import STEPS, KnownNoise, Path

DELTA = 1e-5
SHAPE = (1, 8, 8)


def run(
    *paths: Path,
    seed: int = 0,
    num_canaries: int = 300,
    shape: tuple[int, int, int] = SHAPE,
    recorded: int = 1,
    replays: int = 0,
    claimed: float | None = None,
    suspects: tuple[KnownNoise, ...] = (),
) -> AuditReport:
    """One upload by each path, the last of them sent again `replays` times."""
    rng = np.random.default_rng(seed)
    used = paths or (Path(),)
    game = draw_game(num_canaries, shape=shape, rng=rng)
    uploads = [path.release(game.images, rng) for path in used]
    uploads += [dataclasses.replace(uploads[-1], x_tilde=uploads[-1].x_tilde.clone())] * replays
    mu = math.hypot(*(path.mu for path in used[:recorded]))
    return audit(
        game,
        uploads,
        claimed_epsilon=claimed or epsilon_of_mu(mu, delta=DELTA),
        delta=DELTA,
        recorded=recorded,
        suspects=suspects,
    )


def failed(report: AuditReport) -> set[str]:
    assert report.passed == all(finding.passed for finding in report.findings)
    return {finding.name for finding in report.findings if not finding.passed}


def test_a_correct_path_passes_and_the_numbers_are_right() -> None:
    report = run(num_canaries=2000)
    assert report.passed
    assert (report.num_uploads, report.num_distinct, report.recorded) == (1, 1, 1)
    assert report.implied_epsilon == pytest.approx(report.claimed_epsilon)
    assert report.distance_ratio == pytest.approx(1.0)
    assert report.reached_mu == pytest.approx(2.0, rel=1e-5)
    assert report.expected_accuracy == pytest.approx(0.8413, abs=1e-4)
    assert report.accuracy == pytest.approx(0.8413, abs=0.035)
    assert 2.0 < report.epsilon_steinke < report.epsilon_gaussian < report.epsilon_independent
    assert 0.8 < report.epsilon_independent / report.claimed_epsilon < 1.0
    assert report.image_shape == SHAPE
    json.dumps(dataclasses.asdict(report))


@pytest.mark.slow
def test_false_alarms_are_rare() -> None:
    """200 honest audits of many kinds: a rate of 1% of alarms would show with chance 0.87."""
    shapes = [(1, 8, 8), (3, 4, 4), (1, 4, 4), (1, 3, 3)]
    clips = {64: 4.0, 48: 20.0, 16: 2.0, 9: 1.0}  # 20: nothing is clipped
    for seed in range(200):
        shape = shapes[seed % 4]
        path = Path(
            clip_norm=clips[math.prod(shape)],
            mu=(0.3, 1.0, 2.0, 6.0)[seed // 4 % 4],
            shift=(0.0, -1.0, 0.5)[seed % 3],
        )
        twice = (path, dataclasses.replace(path, mu=1.0)) if seed % 5 == 0 else (path,)
        report = run(
            *twice,
            seed=seed,
            num_canaries=(3, 40, 120)[seed // 2 % 3],
            shape=shape,
            recorded=len(twice),
            replays=seed % 2,
            suspects=(KnownNoise(10_000 + seed),) if seed % 7 == 0 else (),
        )
        assert failed(report) == set(), (seed, report.findings)


@pytest.mark.slow
def test_false_alarms_of_large_images() -> None:
    for seed in range(8):
        path = Path(clip_norm=10.0, mu=2.0)
        assert failed(run(path, seed=seed, shape=(3, 32, 32), num_canaries=200)) == set()


def copied_to(target: int, source: int, factor: float = 1.0) -> Callable[[Any], Any]:
    def change(z: np.ndarray) -> np.ndarray:
        z = z.copy()
        z[target] = factor * z[source]
        return z

    return change


def silent(z: np.ndarray) -> np.ndarray:
    z = z.copy()
    z[17] = 0.0
    return z


def flat_noise(z: np.ndarray) -> np.ndarray:
    """Uniform noise of the right variance."""
    return math.sqrt(12.0) * (np.argsort(np.argsort(z.ravel())) / z.size - 0.5).reshape(z.shape)


def one_channel(z: np.ndarray) -> np.ndarray:
    """The same noise in both halves of the image."""
    half = z.shape[1] // 2
    return np.concatenate([z[:, :half], z[:, :half]], axis=1)


FAULTS = [
    ("half the noise", Path(noise_scale=0.5), "noise energy"),
    ("2% less noise", Path(noise_scale=0.97), "noise energy"),
    ("twice the noise", Path(noise_scale=2.0), "noise energy"),
    ("clipping skipped", Path(real_clip_norm=1e9), "image in the noise"),
    ("clipping at 1.5 C", Path(real_clip_norm=6.0), "image in the noise"),
    ("clipping at C / 2", Path(real_clip_norm=2.0), "image in the noise"),
    ("noise reused by one pair", Path(change=copied_to(211, 40)), "noise reused"),
    ("its negative", Path(change=copied_to(3, 299, -1.0)), "noise reused"),
    ("no noise on one image", Path(change=silent), "noise energy of each image"),
    ("uniform noise", Path(change=flat_noise), "noise shape"),
    ("noise shared by pixels", Path(change=one_channel), "noise shared by pixels"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "name"), [row[1:] for row in FAULTS], ids=[r[0] for r in FAULTS])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_faults_are_caught(path: Path, name: str, seed: int) -> None:
    assert name in failed(run(path, seed=seed))


@pytest.mark.slow
def test_what_a_local_fault_does_not_touch_still_passes() -> None:
    assert failed(run(Path(change=copied_to(211, 40)))) == {"noise reused"}
    assert failed(run(Path(change=silent))) >= {"noise energy of each image"}
    assert failed(run(Path(change=flat_noise))) == {"noise shape"}


def test_half_the_noise_is_seen_by_the_guesses_too() -> None:
    """Without looking at the noise: 97.7% right where 84.1% are allowed."""
    report = run(Path(noise_scale=0.5))
    assert "guesses" in failed(report)
    assert report.epsilon_independent > report.claimed_epsilon
    strong = run(Path(noise_scale=0.05), num_canaries=2000, claimed=1.0)
    assert {"lower bound (Steinke)", "lower bound (Gaussian DP)"} <= failed(strong)
    assert strong.guesses.num_right == strong.guesses.num_guesses
    assert strong.guesses.most_steinke_epsilon == strong.epsilon_steinke
    assert strong.guesses.most_gaussian_mu == strong.guesses.gaussian_mu


def test_noise_reused_across_uploads_of_different_images() -> None:
    kept: list[np.ndarray] = []

    def remember(z: np.ndarray) -> np.ndarray:
        kept.append(z)
        return z

    def reuse(z: np.ndarray) -> np.ndarray:
        return np.concatenate([z[:250], kept[0][100:101], z[251:]])

    assert failed(run(Path(change=remember), Path(mu=2.0), recorded=2)) == set()
    kept.clear()
    again = run(Path(change=remember), Path(change=reuse), recorded=2)
    assert failed(again) == {"noise reused"}


def test_same_noise_at_another_level_of_the_same_images() -> None:
    """x_tilde at two levels with one z gives the image away exactly."""
    kept: list[np.ndarray] = []

    def remember(z: np.ndarray) -> np.ndarray:
        kept.append(z)
        return kept[0]

    report = run(Path(change=remember), Path(mu=1.0, change=remember), recorded=2)
    assert failed(report) == {"noise reused"}


def test_a_second_release_must_be_recorded() -> None:
    assert failed(run(Path(), Path(), recorded=1)) >= {"ledger", "claim"}
    both = run(Path(), Path(), recorded=2)
    assert both.passed
    assert both.reached_mu == pytest.approx(2.0 * math.sqrt(2.0), rel=1e-5)
    assert both.accuracy > run(Path()).accuracy


def test_a_replay_tells_nothing_new() -> None:
    once, replayed = run(), run(replays=3)
    assert replayed.passed
    assert (replayed.num_uploads, replayed.num_distinct) == (4, 1)
    assert replayed.guesses == once.guesses
    assert replayed.reached_mu == once.reached_mu


def test_one_image_noised_again_is_enough() -> None:
    rng = np.random.default_rng(0)
    game = draw_game(50, shape=SHAPE, rng=rng)
    first, other = (Path().release(game.images, rng) for _ in range(2))
    x_tilde = first.x_tilde.clone()
    x_tilde[31] = other.x_tilde[31]
    uploads = [first, dataclasses.replace(first, x_tilde=x_tilde)]
    played = score_game(game, uploads)
    assert played.num_distinct.tolist() == [1] * 31 + [2] + [1] * 18
    assert played.mu[31] == pytest.approx(math.sqrt(8.0), rel=1e-5)
    assert failed(judged(game, uploads)) == {"ledger", "claim"}


def judged(game: Any, uploads: list[ReleasedDataset], **given: Any) -> AuditReport:
    options = {"claimed_epsilon": 10.0, "delta": DELTA, "recorded": 1, **given}
    return audit(game, uploads, **options)


def test_a_known_seed_is_caught() -> None:
    def known(z: np.ndarray) -> np.ndarray:
        return np.random.default_rng(77).standard_normal(z.shape)

    suspects = (KnownNoise(76), KnownNoise(77))
    report = run(Path(change=known), suspects=suspects)
    assert failed(report) == {"noise known to others"}
    wrong = [finding for finding in report.findings if not finding.passed]
    assert len(wrong) == 1
    assert wrong[0].seen.startswith("seed 77: largest correlation")
    assert failed(run(Path(change=known), suspects=suspects[:1])) == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda z: np.random.default_rng(77).standard_normal(z.shape)[::-1],
        lambda z: -np.random.default_rng(77).standard_normal(z.shape),
        lambda z: 0.1 * np.random.default_rng(77).standard_normal(z.shape) + math.sqrt(0.99) * z,
        lambda z: np.concatenate(
            [z[:-1], np.random.default_rng(77).standard_normal((1, z.shape[1]))]
        ),
    ],
    ids=["other order", "negative", "a hundredth of the variance", "one image"],
)
def test_a_known_seed_in_disguise(change: Callable[[Any], Any]) -> None:
    report = run(Path(change=change), suspects=(KnownNoise(77),))
    assert failed(report) == {"noise known to others"}


def test_a_known_stream_that_runs_on_after_a_restart() -> None:
    stream = np.random.default_rng(77)
    path = Path(change=lambda z: stream.standard_normal(z.shape))
    clean = Path()
    report = run(clean, path, recorded=2, suspects=(KnownNoise(77),))
    assert failed(report) == {"noise known to others"}


def test_claims_that_are_too_small() -> None:
    assert failed(run(claimed=9.9)) == {"claim"}
    assert failed(run(claimed=12.0)) == set()
    assert "guesses" in failed(run(claimed=1.0))


def test_canaries_are_distinct_and_antipodal() -> None:
    rng = np.random.default_rng(5)
    for shape, count in (((1, 8, 8), 500), ((1, 2, 2), 8), ((3, 1, 1), 4), ((3, 32, 32), 100)):
        game = draw_game(count, shape=shape, rng=rng)
        both = np.concatenate([game.first, game.second]).reshape(2 * count, -1)
        assert len(np.unique(both, axis=0)) == 2 * count
        assert set(np.unique(both)) == {0, 255}
        assert (game.first ^ game.second == 255).all()
        given = np.where(game.secret[:, None, None, None], game.second, game.first)
        assert (game.images.images == given).all()
        assert len(game.images.distinct()) == count
    game = draw_game(4000, shape=SHAPE, rng=rng)
    assert abs(game.secret.mean() - 0.5) < 0.05
    assert abs(game.first.mean() / 255 - 0.5) < 0.02


def test_distance_is_the_true_one_around_black() -> None:
    """Around black a pattern and its inverse are orthogonal: sqrt(2) C apart, not 2 C."""
    path = Path(shift=-1.0)
    report = run(path)
    assert report.distance_ratio == pytest.approx(math.sqrt(0.5), abs=0.01)
    assert report.reached_mu == pytest.approx(math.sqrt(2.0), abs=0.02)
    assert report.accuracy == pytest.approx(report.expected_accuracy, abs=0.1)


def test_grid_of_the_tests_is_that_of_the_noise() -> None:
    noise = np.empty((4, 64), dtype=np.float32)
    KnownNoise(1).fill(noise)
    assert (noise == np.rint(noise)).all()
    assert noise.std() == pytest.approx(STEPS, rel=0.2)


def test_bad_input() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"num_canaries must be in \[1, 8\] for 4 pixels, got 9"):
        draw_game(9, shape=(1, 2, 2), rng=rng)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\) with C 1 or 3"):
        draw_game(9, shape=(2, 8, 8), rng=rng)
    game = draw_game(10, shape=SHAPE, rng=rng)
    upload = Path().release(game.images, rng)
    with pytest.raises(ValueError, match="uploads must hold at least 1 release, got 0"):
        judged(game, [])
    short = Path().release(game.images.subset(np.arange(9)), rng)
    with pytest.raises(ValueError, match=r"uploads\[1\] must release one row per image"):
        judged(game, [upload, short])
    with pytest.raises(ValueError, match="recorded must be at least 0, got -1"):
        judged(game, [upload], recorded=-1)
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got inf"):
        judged(game, [upload], claimed_epsilon=math.inf)
    with pytest.raises(ValueError, match="delta must be in"):
        judged(game, [upload], delta=0.0)
    with pytest.raises(ValueError, match="confidence must be in"):
        judged(game, [upload], confidence=1.0)
