"""Whole runs in which a class is a mixture: ledger, statement, and all who read the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedpdm
from fedpdm.attacks.jobs.sum_attacks import open_sums, sum_linkage_job
from fedpdm.attacks.sum_linkage import auc_of_mu
from fedpdm.config import RunConfig
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.mechanism import ReleasedStatistics, restore_release
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.publishing.export import export_pipeline, load_pipeline
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from strategies.gaussians import CoarseGaussians
from tests.engines.test_statistics_runs import config_of, final, stage_of
from tests.support.release_toys import DELTA

PARTS = ("means", "pooled", "classes", "components-1", "components-2")
KEYS: dict[str, Any] = {"components": 3, "component_rounds": 2}


def mixed(num_clients: int = 2, **sections: Any) -> RunConfig:
    given = {
        "run": {"rounds": 6},
        "statistics": KEYS,
        "partition": {"num_clients": num_clients},
        "fine": {"steps_per_round": 1},
        "evaluation": {"image_metrics": False},
        "privacy": {"epsilon": 1000.0},  # or so few images tell nothing
    }
    return config_of(**{**given, **sections})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("components") / "run"
    run_in_process(mixed(), out)
    return out


@pytest.mark.slow
def test_each_image_is_in_the_sum_of_each_round_once(finished: Path) -> None:
    for client in range(2):
        store = ReleaseStore(RunDirectory(finished).client_path(client))
        records = store.ledger().releases()
        assert [stage_of(record) for record in records] == list(PARTS)
        digests = [
            sorted(map(bytes, read_tensors(store.root / "releases" / r.file)[0]["digests"].numpy()))
            for r in records
        ]
        assert all(each == digests[0] for each in digests)
        spent = store.spent(delta=DELTA)
        assert [count for _, count in spent.distribution] == [len(digests[0])]
        assert spent.largest == pytest.approx(1000.0, rel=1e-9)


def test_the_run_says_what_was_sent(finished: Path) -> None:
    privacy = json.loads((finished / "privacy.json").read_text())
    assert privacy["releases_per_image"] == 5
    assert "of each class are divided into 3 groups of similar ones" in privacy["released"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert "classes" not in metrics["rounds"][2]
    assert metrics["rounds"][4]["classes"] == 10
    assert 1 <= metrics["rounds"][4]["components"] <= 30
    assert metrics["rounds"][5]["bytes_up"] == 0


def test_everybody_reads_the_mixture(finished: Path, tmp_path: Path) -> None:
    """Sampler, classifier, and the pipeline without fedpdm: the same Gaussians."""
    one = open_synthesizer(RunDirectory(finished), 0)
    assert isinstance(one.coarse, GaussianDenoiser)
    g = one.coarse.gaussians
    assert g.classes.tolist() == np.repeat(np.arange(10), 3).tolist()
    apart = (g.means[0] - g.means[1]).norm()
    assert float(apart) > 1e-3
    assert one.sample(np.array([3, -1, 7]), seed=1).shape == (3, 3, 8, 8)
    images = one.own.images.images[:20]
    found = fedpdm.gaussian_classifier(finished).log_probabilities(images)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, rtol=1e-9)
    out = export_pipeline(RunDirectory(finished), client_id=0, out=tmp_path / "pipeline")
    pipeline = load_pipeline(out)
    card = " ".join((out / "README.md").read_text().split())
    assert "10 classes and a mixture of Gaussians for each class, from personalised" in card
    labels = torch.tensor([1, 4, 4, 9])
    assert pipeline.gaussians is not None
    theirs = pipeline.gaussians.draw(labels, torch.Generator().manual_seed(0))
    ours = g.draw(labels, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    posterior = pipeline.gaussians.log_posterior(ours, labels, 0.7)
    wanted = g.log_class_posterior(0.7**0.5 * ours.double(), 10, 0.7, even=True)
    torch.testing.assert_close(posterior, wanted[torch.arange(4), labels], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_crash_sends_the_same_sums_and_ends_in_the_same_mixture(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = CoarseGaussians.merge

    def die(self: CoarseGaussians, now: int) -> Any:
        if now == 4:
            raise KeyboardInterrupt
        return merge(self, now)

    with monkeypatch.context() as broken:
        broken.setattr(CoarseGaussians, "merge", die)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(mixed(), tmp_path / "run")
    run_in_process(mixed(), tmp_path / "run", resume=True)
    first, second = final(finished), final(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)
    ledger = ReleaseStore(RunDirectory(tmp_path / "run").client_path(0)).ledger()
    assert [stage_of(record) for record in ledger.releases()] == list(PARTS)


@pytest.mark.slow
def test_too_many_components_are_said_and_stay_at_the_mean(tmp_path: Path) -> None:
    run_in_process(mixed(privacy={"epsilon": 1.0}), tmp_path / "run")
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "30 of 30 components have fewer images than noise may show" in said
    means = final(tmp_path / "run")["means"].view(10, 3, -1)
    torch.testing.assert_close(means, means[:, :1].expand_as(means))


@pytest.mark.slow
def test_totals_alone_give_the_same_mixture(tmp_path: Path) -> None:
    for name, secure in (("plain", {}), ("secure", {"secure": True, "max_examples": 500})):
        run_in_process(mixed(3, aggregation=secure), tmp_path / name)
    for part in PARTS:
        (total,), single = (
            [restore_release(*u) for u in RunDirectory(tmp_path / name).load_uploads(part=part)]
            for name in ("secure", "plain")
        )
        assert isinstance(total, ReleasedStatistics)
        each = [s.sums[0] for s in single if isinstance(s, ReleasedStatistics)]
        if part == "components-2":  # told after decimals of float32 that sums differ by
            assert total.sums.shape[1:] == each[0].shape
        else:
            assert torch.equal(total.sums[0], torch.stack(each).sum(dim=0)), part
    first, second = final(tmp_path / "plain"), final(tmp_path / "secure")
    for name in ("means", "weights"):
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-2)


def test_the_sums_are_attacked_by_linkage(finished: Path) -> None:
    run = RunDirectory(finished)
    one, other = (open_synthesizer(run, client) for client in range(2))
    sums = open_sums(run, one)
    assert [view.parameters.stage for view, _ in sums.views] == list(PARTS)
    job = sum_linkage_job(sums, other.own.images, label="client 0", settings={}, seed=0)
    found = job.attack(lambda *_: None)["linkage"]
    assert found["distance_quantiles"][2] <= found["mu"] * (1.0 + 1e-9)
    assert found["auc_analytic"] <= auc_of_mu(found["mu"])
