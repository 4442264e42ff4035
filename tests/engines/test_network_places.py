"""What a run of a private network says of itself, what goes on from it, what attacks it."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedpdm
from fedpdm.attacks.jobs.plan import chosen_attacks, plan_run
from fedpdm.attacks.jobs.running import run_attack_jobs
from fedpdm.config import ConfigError, run_digest
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.engines.inprocess import run_in_process
from fedpdm.engines.run_checks import check_models
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.reporting.page import read_run, write_report
from fedpdm.reporting.page.tables import summary_rows
from fedpdm.reporting.run_files import summarise
from fedpdm.setup.build import NETWORK, model_sizes, named_part
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.run_directory import RunDirectory
from tests.support.command_line import called
from tests.support.network_runs import ROUNDS, network_run

HALVES: dict[str, dict[str, Any]] = {"data": {"holdout_fraction": 0.5, "max_images": 200}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("network") / "run"
    run_in_process(network_run(**HALVES), out)
    return out


# What is said.


def test_the_first_lines_say_what_is_trained_and_on_how_much() -> None:
    setup = set_up(network_run(run={"rounds": 6}))
    size = f"{model_sizes(setup)['coarse'] / 1e6:.2f} M"
    *_, line = check_models(setup).lines(images=100)
    assert line.startswith(f"models: coarse network nano {size} for t = 100 to 300, fine nano ")
    assert "6 rounds of 4 fine steps: 3 of class statistics, then 3 steps of warm-up, " in line
    assert "2 of gradients, 1 of fine training alone" in line
    assert "Gaussians" not in line
    (warning,) = [w for w in check_models(setup).lines(images=4) if "WARNING" in w]
    assert warning == (
        "WARNING: network.sample_rate: 0.2 draws 0.8 of a client's 4 images a round, on average; "
        "most of its rounds are noise alone"
    )
    assert not [w for w in check_models(setup).lines() if "WARNING" in w]  # not known


def test_lines_of_rounds_say_how_much_of_a_gradient_is_noise(finished: Path) -> None:
    lines = re.findall(r"^.*round \d/5  .*$", (finished / "log.txt").read_text(), re.M)
    assert len(lines) == 5
    assert "warm-up loss" in lines[2]
    records = RunDirectory(finished).read_json("metrics.json")["rounds"]
    for line, record in zip(lines[-ROUNDS:], records[-ROUNDS:], strict=True):
        norm, noise = record["gradient_norm"], record["gradient_noise"]
        assert f"mean gradient {norm:.3g}, noise alone {noise:.3g}" in line
        assert re.search(r"\d+ s left$", line)
    assert "gradient" not in "".join(lines[:3])


def test_the_shared_model_is_sent_for_the_last_evaluation_alone(finished: Path) -> None:
    config = network_run(**HALVES)
    network = 4 * model_sizes(set_up(config))["coarse"] * config.partition.num_clients
    down = [r["bytes_down"] for r in RunDirectory(finished).read_json("metrics.json")["rounds"]]
    assert down[0] < 2000
    assert network <= down[3] < 1.1 * network + 20_000  # once, to be trained
    assert down[4] > 2 * network  # and once more, with the Gaussians, to be sampled


def test_summary_page_and_comparison_call_it_a_network(finished: Path, tmp_path: Path) -> None:
    words = summarise(RunDirectory(finished))
    assert "from a private network on, 'network' in fedpdm experiment." in words
    assert re.search(r", 2 rounds of gradients under noise of 0\.\d+ clip norms,", words)
    rows = dict(summary_rows(read_run(finished)))
    assert rows["shared model"] == "a network, of class Gaussians and 2 rounds of noised gradients"
    page = write_report(
        [read_run(finished)], tmp_path / "report.html", say=lambda _: None
    ).read_text()
    assert "a network, of class Gaussians and 2 rounds of noised gradients" in page
    assert "Every image pays for all rounds, drawn or not." in " ".join(page.split())


def test_the_ledger_has_the_plan_as_one_release(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = called(capsys, "ledger", finished)
    assert done.code == 0, done.err
    assert "gradients of 2 rounds, each of a share 0.2 of the images" in " ".join(done.out.split())


def test_its_gaussians_are_still_a_classifier_and_its_denoiser_samples(finished: Path) -> None:
    found = fedpdm.gaussian_classifier(finished).denoiser
    assert isinstance(found, NetworkAboveGaussians)
    images = fedpdm.sample(network_run(**HALVES), found, None, [0, 3], seed=1)
    assert images.shape == (2, 3, 8, 8)


# Further rounds, other settings.


def test_more_rounds_are_fine_training_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    before = RunDirectory(out)
    network, digest = named_part(before.load_shared(), NETWORK), run_digest(before.config())
    heads = [ReleaseStore(before.client_path(k)).ledger().head for k in (0, 1)]
    done = called(capsys, "run", "--resume", "--engine", "inprocess", "--out", out,
                  "--set", "run.rounds=6")  # fmt: skip
    assert done.code == 0, done.err
    assert "begun with 5 rounds, and goes on to 6" in done.out
    assert "fine learning rate" in done.out
    assert "coarse learning rate" not in done.out
    run = RunDirectory(out)
    assert run_digest(run.config()) == digest
    (plan,) = {set_up(run.config()).release_plan.gradients}
    assert plan is not None
    assert plan.run == digest  # or it would be another release
    for name, tensor in named_part(run.load_shared(), NETWORK).items():
        assert torch.equal(network[name], tensor), name
    assert [ReleaseStore(run.client_path(k)).ledger().head for k in (0, 1)] == heads
    assert "gradient_norm" not in run.read_json("metrics.json")["rounds"][-1]


def test_what_does_not_go_with_a_network_is_refused() -> None:
    for sections, words in (
        ({"aggregation": {"secure": True, "max_examples": 100}}, "aggregation.secure: must be "),
        ({"privacy": {"accounting": "paper"}}, "privacy.accounting: must be exact"),
        ({"network": {"lowest_t": 200}, "sampling": {"handover": 150}}, "sampling.handover: "),
        ({"network": {"highest_t": 100}, "sampling": {"handover": 150}}, "sampling.handover: "),
        ({"network": {"lowest_t": 200, "highest_t": 100}}, "network.lowest_t: "),
        ({"network": {"highest_t": 1001}}, "network.highest_t: must be at most"),
        ({"coarse": {"training": "federated"}}, "coarse.training: must be server with"),
    ):
        with pytest.raises(ConfigError, match=words):
            network_run(**sections)  # type: ignore[arg-type]


def test_a_share_that_leaves_the_network_nothing_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"nothing is left for subsampled rounds") as caught:
        set_up(network_run(network={"share": 1e-6}))
    assert "\n" not in str(caught.value)


# Attacks.


@pytest.mark.slow
def test_attacks_are_on_the_network_and_on_the_sums(finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    jobs = plan_run(
        RunDirectory(finished), clients=[0], out=tmp_path, seed=0,
        attacks=chosen_attacks("loss,gsa,memorisation,linkage,collusion"), num_subjects=40,
        num_samples=8, num_uploads=8, say=said.append,
    )  # fmt: skip
    names = [job.name for job in jobs]
    assert {"loss on coarse", "memorisation by coarse", "linkage of sums of client 0"} <= {*names}
    assert "linkage and reconstruction are of class statistics alone: gradients are not kept" in (
        said
    )
    done = {each.job.name: each.result for each in run_attack_jobs(jobs, tmp_path, say=said.append)}
    assert {*names} == done.keys()
    assert all(math.isfinite(found["auc"]) for found in done.values() if "auc" in found)
    one = open_synthesizer(RunDirectory(finished), 0)
    assert isinstance(one.coarse, NetworkAboveGaussians)
    assert one.draw_pixels(np.array([1]), generator=torch.Generator()).shape == (1, 3, 8, 8)
