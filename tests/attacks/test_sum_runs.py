"""`fedpdm attack RUN` on a run of class statistics: what is attacked, what is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.attacks.jobs.plan import chosen_attacks, plan_run
from fedpdm.attacks.jobs.running import run_attack_jobs
from fedpdm.attacks.jobs.sum_attacks import known_but_one, open_sums
from fedpdm.attacks.sum_linkage import auc_of_mu
from fedpdm.cli import main
from fedpdm.config import ConfigError
from fedpdm.data import normalize
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.mechanism import clip_l2
from fedpdm.reporting.page import read_run, write_report
from fedpdm.storage.run_directory import RunDirectory
from tests.engines.test_statistics_runs import config_of

HALVES: dict[str, dict[str, Any]] = {
    "data": {"holdout_fraction": 0.5, "max_images": 200},
    "sampling": {"handover": 150, "fine_labels": False, "candidates": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attacked") / "run"
    run_in_process(config_of(**HALVES), out)
    return out


def jobs_of(run: Path, names: str, said: list[str], out: Path, **options: Any) -> list[Any]:
    return plan_run(
        RunDirectory(run), clients=[0], attacks=chosen_attacks(names), out=out, seed=0,
        num_subjects=40, num_samples=12, num_uploads=12, say=said.append, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_attacks_the_gaussians_and_the_sums(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--subjects", "40", "--samples", "12", "--uploads", "12", "--out", str(out)]
    groups = "loss,pia,secmi,gsa,memorisation,linkage,reconstruction,collusion"
    assert main(["attack", str(finished), "--attacks", groups, *given]) == 0
    found = {
        each["name"]: each for each in json.loads((out / "attacks.json").read_text())["attacks"]
    }
    assert {"loss on coarse", "pia on coarse", "secmi on coarse", "gsa on fine, client 0",
            "memorisation by coarse", "linkage of sums of client 0",
            "reconstruction of sums of client 0", "collusion, pia against client 0",
            "publishing, reconstruction of sums of client 0"} <= found.keys()  # fmt: skip
    assert "gsa on coarse" not in found
    linked = found["linkage of sums of client 0"]["linkage"]
    assert linked["worst_auc"] == pytest.approx(auc_of_mu(2.0004), abs=1e-4)
    assert 0.5 < linked["auc_analytic"] < linked["worst_auc"]
    assert linked["distance_quantiles"][2] <= linked["mu"] * (1.0 + 1e-9)
    scores = found["linkage of sums of client 0"]["scores"]["auc"]
    assert scores["low"] - 0.1 < linked["auc_analytic"] < scores["high"] + 0.1
    summary = (out / "summary.md").read_text()
    assert "| client 0 | linkage of sums |" in summary
    assert "An attacker who knows all images of a client but one" in summary
    assert summary.count("an upload is what a noised class sum says of one of its images") == 3
    page = write_report(
        [read_run(finished, attacks=out)], tmp_path / "page.html", say=lambda _: None
    ).read_text()
    assert "linkage of sums" in page
    assert page.count("An attacker who knows all images of a client but one asks") == 1
    assert page.count("an upload is what a noised class sum says of one of its images") == 3
    assert "class Gaussians, computed by the server from noised sums (each client&#39;s)" in page
    assert "down to t = 150, then the fine model" in page
    assert "Then one table is sent for all images together" in page


def test_what_needs_gradients_is_left_out_by_name(finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    names = [job.name for job in jobs_of(finished, "gsa", said, tmp_path)]
    assert names == ["gsa on fine, client 0", "gsa on combined, client 0"]
    assert said == [
        "gsa on coarse is left out: it needs gradients, and class Gaussians are computed, not "
        "trained"
    ]


def test_what_is_left_of_a_sum_is_a_release_of_the_last_image(finished: Path) -> None:
    """`CLIP(x, C)` under the noise that the sum has, and a little more for the run's levels."""
    one = open_synthesizer(RunDirectory(finished), 0)
    sums = open_sums(RunDirectory(finished), one)
    view, held = sums.means
    rows = np.sort(held)[:40]
    released = known_but_one(sums, one, rows, rng=np.random.default_rng(0))
    assert released is not None
    parameters = released.parameters
    assert parameters.clip_norm == view.parameters.clip_norm
    assert view.parameters.sigma <= parameters.sigma < 1.05 * view.parameters.sigma
    x = normalize(sums.images.images[rows], shift=parameters.shift)
    clipped = clip_l2(x, clip_norm=parameters.clip_norm)
    noise = released.x_tilde / parameters.alpha_bar**0.5 - clipped
    assert float(noise.std()) == pytest.approx(parameters.sigma, rel=0.1)
    assert torch.equal(released.labels, torch.from_numpy(sums.images.labels[rows]))
    # Every image of a class has the same noise: there is one sum.
    same = released.labels == released.labels[0]
    assert float(torch.corrcoef(noise[same].flatten(1))[0, 1:].min()) > 0.95
    alone = [v.parameters.stage for v, _ in sums.views]
    assert alone == ["means", "pooled", "classes"]


@pytest.mark.slow
def test_sums_that_are_not_this_runs_are_one_line(finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="has not sent all sums; if the run kept its releases"):
        jobs_of(finished, "linkage", said, tmp_path, releases=tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(finished / "clients" / "1", other / "0")
    with pytest.raises(ValueError, match="images in its sums are not client 0's"):
        jobs_of(finished, "linkage", said, tmp_path, releases=other)


@pytest.mark.slow
def test_too_much_noise_to_reconstruct_from_is_said(tmp_path: Path) -> None:
    config = config_of(**HALVES, privacy={"epsilon": 0.3}, fine={"steps_per_round": 1})
    run_in_process(config, tmp_path / "run")
    said: list[str] = []
    jobs = jobs_of(tmp_path / "run", "linkage,reconstruction", said, tmp_path / "out")
    assert [job.name for job in jobs] == ["linkage of sums of client 0"]
    assert said[0].startswith("reconstruction of client 0 left out: the noise of its class sums, ")
    (done,) = run_attack_jobs(jobs, tmp_path / "out", say=said.append)
    assert math.isclose(done.result["linkage"]["mu"], 0.0893, rel_tol=0.05)


def test_a_public_set_is_of_no_use_here(finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    public = open_synthesizer(RunDirectory(finished), 1).own.images
    jobs_of(finished, "reconstruction", said, tmp_path, public=public)
    assert said == [
        "--public is left out: class statistics have no network for an attacker to train"
    ]
    with pytest.raises(ConfigError, match="--attacks: must be of"):
        chosen_attacks("sums")
