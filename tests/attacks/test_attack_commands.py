"""`fedpdm attack` on the real release path: it passes, and every planted fault is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpdm.privacy.planning
from fedpdm.attacks import AuditReport, audit, draw_game
from fedpdm.cli import main
from fedpdm.config import RunConfig
from fedpdm.data import load_image_set
from fedpdm.engines.one_client import attack_config, upload_releases
from fedpdm.privacy.mechanism import SystemNoise, gaussian
from fedpdm.privacy.releases import ReleaseStore, store
from tests.support.attack_commands import (
    HalfNoise,
    SlightlyLess,
    caught,
    failed,
    last_line,
    run,
    with_known_seeds,
)

SMALL_AUDIT = ["attack", "audit", "--canaries", "1500", "--shape", "1x16x16", "--json"]


def paper_config() -> RunConfig:
    """The paper's own example, t0 = 690 and C = 10, with noise nobody can guess."""
    return attack_config(
        epsilon=None,
        t0=690,
        delta=1e-5,
        clip_norm=10.0,
        shift=0.0,
        schedule="linear",
        num_steps=1000,
        seed=None,
    )


class OnceReused(SystemNoise):
    """One pair of images among all has the same noise."""

    sign = 1.0
    done = False

    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        if not self.done and len(out) > 7:
            out[7] = self.sign * out[2]
            self.done = True


class OnceReusedBackwards(OnceReused):
    sign = -1.0


# --- The right path -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_audit_passes_and_proves_a_good_part(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--t0", "690", "--seed", "3", "--out", str(tmp_path)]
    code, facts = run([*SMALL_AUDIT, *arguments], capsys)
    assert (code, failed(facts)) == (0, set())
    assert facts["claimed_epsilon"] == pytest.approx(8.774, abs=5e-4)  # METHOD.md section 2
    assert facts["num_uploads"] == 2
    assert facts["num_distinct"] == facts["recorded"] == 1
    assert facts["distance_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert facts["epsilon_steinke"] < facts["claimed_epsilon"]
    assert facts["claimed_epsilon"] / 2 < facts["epsilon_independent"] < facts["claimed_epsilon"]
    assert json.loads((tmp_path / "audit.json").read_text()) == facts


@pytest.mark.slow
def test_linkage_agrees_with_theory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["attack", "linkage", "--data", "digits", "--t0", "690", "--json", "--seed", "5"]
    code, facts = run([*command, "--seeded", "1", "--out", str(tmp_path)], capsys)
    assert code == 0  # with the noise of the operating system: in 99 runs of a hundred
    assert facts["auc_low"] <= facts["auc_analytic"] <= facts["auc_high"]
    assert facts["worst_auc"] == pytest.approx(0.898, abs=5e-4)  # METHOD.md section 6
    assert json.loads((tmp_path / "linkage.json").read_text()) == facts
    assert (tmp_path / "linkage.png").read_bytes().startswith(b"\x89PNG")


def test_the_worst_case_is_reached_on_the_real_path(tmp_path: Path) -> None:
    """Antipodal canaries through a client: the AUC of METHOD.md section 6, end to end."""
    game = draw_game(4000, shape=(1, 16, 16), rng=np.random.default_rng(11))
    uploads, store = upload_releases(paper_config(), game.images, tmp_path)
    noise = config_sigma()
    y = uploads[0].x_tilde.double().flatten(1).numpy() / np.sqrt(uploads[0].parameters.alpha_bar)
    direction = game.first.reshape(4000, -1) / 127.5 - 1.0
    direction *= 10.0 / np.linalg.norm(direction, axis=1, keepdims=True)
    scores = 2.0 * np.einsum("ij,ij->i", y, direction) / noise**2
    first, second = scores[~game.secret], scores[game.secret]
    auc = float((first[:, None] > second[None, :]).mean())
    assert auc == pytest.approx(0.898, abs=4 * 0.5 / np.sqrt(4000))
    assert store.spent(delta=1e-5).largest == pytest.approx(8.774, abs=5e-4)


def config_sigma() -> float:
    """sigma at t0 = 690 of the linear schedule."""
    abar = float(np.prod(1.0 - np.linspace(1e-4, 0.02, 1000)[:690]))
    return float(np.sqrt((1.0 - abar) / abar))


# --- Planted faults -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (HalfNoise, {"noise energy", "guesses"}),
        (SlightlyLess, {"noise energy"}),
        (OnceReused, {"noise reused"}),
        (OnceReusedBackwards, {"noise reused"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_noise_is_caught(
    fault: type[SystemNoise],
    caught_by: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fedpdm.privacy.planning, "SystemNoise", fault)
    assert caught_by <= caught([*SMALL_AUDIT, "--seed", "4"], capsys)[0]


@pytest.mark.slow
def test_skipped_clipping_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unclipped(x: np.ndarray, *, bound: float, steps: float, out: np.ndarray) -> np.ndarray:
        return np.rint(x * np.float32(steps), out=out)

    monkeypatch.setattr(gaussian, "clip_to_grid", unclipped)
    assert {"image in the noise"} <= caught([*SMALL_AUDIT, "--seed", "4"], capsys)[0]


@pytest.mark.slow
def test_an_unrecorded_second_release_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ReleaseStore.obtain

    def forgetful(self: ReleaseStore, *given: Any, **options: Any) -> Any:
        (self.root / "ledger.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.root / "releases", ignore_errors=True)
        return real(self, *given, **options)

    monkeypatch.setattr(ReleaseStore, "obtain", forgetful)
    code = main([*SMALL_AUDIT, "--seed", "4"])
    assert (code, "a second release; restore it" in capsys.readouterr().err) == (2, True)
    monkeypatch.setattr(store, "check_traces", lambda *_: None)  # the store's own defence
    names, facts = caught([*SMALL_AUDIT, "--seed", "4"], capsys)
    assert {"ledger", "claim"} <= names
    assert (facts["num_distinct"], facts["recorded"]) == (2, 1)


@pytest.mark.slow
def test_a_known_seed_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    answers = with_known_seeds([*SMALL_AUDIT, "--seed", "4"], capsys)
    assert answers == [(1, {"noise known to others"}), (0, set())]


def test_linkage_sees_half_the_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fedpdm.privacy.planning, "SystemNoise", HalfNoise)
    code, facts = run(["attack", "linkage", "--data", "digits", "--json", "--seed", "5"], capsys)
    assert code == 1
    assert facts["auc_low"] > facts["auc_analytic"]


# --- False alarms, text, bad input ----------------------------------------------------------


def reports(folder: Path, count: int) -> Iterator[AuditReport]:
    for seed in range(count):
        game = draw_game(300, shape=(1, 16, 16), rng=np.random.default_rng(seed))
        uploads, store = upload_releases(paper_config(), game.images, folder / str(seed), rounds=2)
        yield audit(
            game,
            uploads,
            claimed_epsilon=store.spent(delta=1e-5).largest,
            delta=1e-5,
            recorded=len(store.ledger().releases()),
        )


@pytest.mark.slow
def test_no_false_alarms(tmp_path: Path) -> None:
    assert all(report.passed for report in reports(tmp_path, 12))


@pytest.mark.slow
def test_the_text_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL_AUDIT[:-1], "--seed", "4", "--seeded", "1", "--known-seed", "1"]) == 1
    text = capsys.readouterr().out
    assert "LEAKS MORE THAN" in text
    assert "FAIL noise known to others" in text
    linkage = ["attack", "linkage", "--data", "digits", "--pairs", "50", "--seed", "5"]
    assert main([*linkage, "--seeded", "1"]) == 0  # else one run in a hundred is outside
    text = capsys.readouterr().out
    assert "worst case" in text
    assert "50 pairs of digits (seed 5)" in text


@pytest.mark.slow
def test_the_audit_has_the_shape_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    audit = ["attack", "audit", "--canaries", "60", "--seed", "1", "--seeded", "1", "--json"]
    for more, shape in (
        (["--data", "digits"], [3, 8, 8]),
        (["--data", "digits", "--resolution", "4"], [3, 4, 4]),
        (["--data", "digits", "--shape", "1x4x4"], [1, 4, 4]),
        ([], [3, 32, 32]),
    ):
        main([*audit, *more])
        facts = json.loads(capsys.readouterr().out)
        assert facts["image_shape"] == shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["linkage", "--epsilon", "3", "--t0", "5"], "give --epsilon or --t0, not both"),
        (["linkage", "--data", "nothing"], "--data: must be a folder"),
        (["linkage", "--data", "digits", "--pairs", "0"], "num_pairs must be in [1, "),
        (["linkage", "--data", "digits", "--pairs", "9999"], "num_pairs must be in [1, "),
        (["linkage", "--epsilon", "-1"], "privacy.epsilon"),
        (["audit", "--delta", "1"], "privacy.delta"),
        (["audit", "--clip-norm", "0"], "privacy.clip_norm"),
        (["audit", "--t0", "1001"], "privacy.t0: must be at most schedule.num_steps = 1000"),
        (["audit", "--epsilon", "0.0001"], "privacy.epsilon 0.0001 cannot be reached"),
        (["audit", "--shape", "32"], "--shape: must be like 3x32x32, got '32'"),
        (["audit", "--shape", "2x8x8"], "shape must be (C, H, W) with C 1 or 3"),
        (["audit", "--canaries", "0"], "num_canaries must be in [1, "),
        (["audit", "--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["audit", "--seeded", "-1"], "--seeded: must be at least 0, got -1"),
        (["audit", "--known-seed", "-1"], "seed must be at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = last_line(["attack", *arguments], capsys)
    assert code == 2
    assert line in said
    assert said.startswith("fedpdm: ")


def test_equal_images_are_refused(tmp_path: Path) -> None:
    config = paper_config()
    digits = load_image_set("digits", split="test")
    with pytest.raises(ValueError, match="images must be distinct"):
        upload_releases(config, digits.subset(np.array([1, 2, 1])), tmp_path)
