"""Whole runs of a private network in this process: real clients, the real strategy, few steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.gradients import noised_gradient
from clients.training import LocalTraining
from fedpdm.config import RunConfig
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.mechanism import GradientParameters, ReleasedGradient
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.build import GAUSSIANS, NETWORK, build_gaussians, build_shared, named_part
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import StoreError, read_tensors
from fedpdm.storage.run_directory import RunDirectory
from strategies.network import CoarseNetwork
from strategies.roster import ClientFailure
from tests.support.federations import client_of
from tests.support.gradient_toys import first_weights, network_config
from tests.support.release_toys import DELTA

SUMS = ("means", "pooled", "classes")

ASKED = "clients.pfdm_client.noised_gradient"


def config_of(**sections: dict[str, Any]) -> RunConfig:
    """Three rounds of sums, two of gradients, one of fine steps alone."""
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 6},
        "data": {"max_images": 120},
        "network": {"rounds": 2},
        "evaluation": {"image_metrics": False},
    }
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return network_config(**given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("network") / "run"
    run_in_process(config_of(), out)
    return out


def final(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "coarse.safetensors")[0]


def same(first: Path, second: Path) -> bool:
    one, other = final(first), final(second)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def store_of(out: Path, client: int) -> ReleaseStore:
    return ReleaseStore(RunDirectory(out).client_path(client))


def last_round(store: ReleaseStore) -> int:
    (path,) = (store.root / "releases").glob("*.last")
    return int(read_tensors(path)[0]["round"])


# --- A run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_training_image_pays_once_for_all_rounds(finished: Path) -> None:
    for client in range(2):
        local = client_of(config_of(), finished, client).local
        train = local.held.images.subset(local.held.train)
        expected = sorted(bytes(row) for row in train.image_digests())
        *sums, plan = local.releases.ledger().releases()
        assert [record.parameters.stage for record in sums] == list(SUMS)  # type: ignore
        assert isinstance(plan.parameters, GradientParameters)
        assert plan.parameters.rounds == 2
        for record in (*sums, plan):
            kept = read_tensors(local.releases.root / "releases" / record.file)[0]
            assert sorted(bytes(row) for row in kept["digests"].numpy()) == expected
        assert kept["total"].tolist() == [0]  # the record says nothing of images
        spent = local.releases.spent(delta=DELTA)
        assert [count for _, count in spent.distribution] == [len(expected)]
        assert 9.99 < spent.largest <= 10.0
        assert last_round(local.releases) == 2


@pytest.mark.slow
def test_the_run_says_what_was_sent_and_what_it_cost(finished: Path) -> None:
    privacy = json.loads((finished / "privacy.json").read_text())
    assert 9.99 < privacy["epsilon"] <= 10.0
    assert privacy["epsilon"] == privacy["epsilon_of_this_release"]
    assert privacy["releases_per_image"] == 4
    assert (privacy["network_rounds"], privacy["sample_rate"]) == (2, 0.3)
    text = " ".join((finished / "privacy.txt").read_text().split())
    for words in (
        "in each of 2 rounds, some images are drawn by chance, each with a probability of 0.3",
        "Every image pays for all rounds, drawn or not.",
        "Then such a table is sent for each class",
    ):
        assert words in text
    rounds = json.loads((finished / "metrics.json").read_text())["rounds"]
    assert rounds[2]["warmup_steps"] == 2
    assert [each.get("network_steps") for each in rounds[3:]] == [1, 2, None]
    size = sum(w.numel() for w in named_part(final(finished), NETWORK).values())
    for each in rounds[3:5]:
        clients = [client["num_released"] for client in each["clients"]]
        plan = config_of().network
        noise = privacy["gradient_noise_multiplier"] * plan.clip_norm
        expected = noise * (2 * size) ** 0.5 / (plan.sample_rate * sum(clients))
        assert each["gradient_noise"] == pytest.approx(expected, rel=1e-6)
        # Hundreds of images cannot drown the noise of so many weights.
        assert each["gradient_norm"] == pytest.approx(expected, rel=0.1)
        assert 2 * 4 * size < each["bytes_up"] < 2 * (4 * size + 8192)
    assert rounds[5]["bytes_up"] == 0
    assert (finished / "samples.png").stat().st_size > 0


@pytest.mark.slow
def test_the_shared_model_is_a_network_above_class_gaussians(finished: Path) -> None:
    one = open_synthesizer(RunDirectory(finished), 0)
    assert isinstance(one.coarse, NetworkAboveGaussians)
    assert (one.coarse.lowest, one.coarse.highest) == (100, 300)
    assert one.settings.t0 == 150
    images = one.sample(np.array([3, 7]), seed=1)
    assert images.shape == (2, 3, 8, 8)
    again = open_synthesizer(RunDirectory(finished), 0).sample(np.array([3, 7]), seed=1)
    np.testing.assert_array_equal(images, again)
    gaussians = build_gaussians(set_up(config_of()), named_part(final(finished), GAUSSIANS))
    x, labels = torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    t = torch.tensor([99, 100, 301, 300])
    with torch.no_grad():
        answer = one.coarse(x, t, labels=labels)
        below = gaussians(x, t, labels=labels)
        above = one.coarse.network(x, t, labels=labels)
    for row, wanted in enumerate((below, above, below, above)):
        assert torch.allclose(answer[row], wanted[row], atol=1e-5)
    assert not torch.allclose(below[3], above[3], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update(other=w[NETWORK + "class_embedding.weight"]), "unexpected other"),
        (lambda w: w.pop(NETWORK + "class_embedding.weight"), "coarse weights: names do not match"),
        (lambda w: w.update({NETWORK + "x": torch.zeros(1)}), "coarse weights: names do not match"),
        (lambda w: w.pop(GAUSSIANS + "rest"), "class Gaussians: expected"),
        (lambda w: w.update({GAUSSIANS + "variances": -w[GAUSSIANS + "variances"]}),
         "variances must be positive"),
        (lambda w: w.update({n: v.double() for n, v in w.items() if n.startswith(NETWORK)}),
         "coarse weights: .* must be torch.float32"),
    ],
)  # fmt: skip
def test_what_is_no_shared_model_of_this_run_is_refused(
    finished: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    weights = dict(final(finished))
    assert isinstance(build_shared(set_up(config_of()), weights), GaussianDenoiser)
    change(weights)
    with pytest.raises(ValueError, match=words):
        build_shared(set_up(config_of()), weights)


# --- Crashes and clients that miss rounds ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("round", [3, 5])
def test_a_run_that_the_server_left_in_mid_plan_ends_as_if_it_had_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round: int
) -> None:
    """It dies after answers came, before it used them: in the warm-up, or in the plan."""
    merge = CoarseNetwork.merge

    def die(self: CoarseNetwork, now: int) -> Any:
        if now == round:
            raise KeyboardInterrupt
        return merge(self, now)

    with monkeypatch.context() as broken:
        broken.setattr(CoarseNetwork, "merge", die)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(config_of(), tmp_path / "run")
    monkeypatch.setattr(ASKED, once_a_round(noised_gradient))
    run_in_process(config_of(), tmp_path / "run", resume=True)
    assert same(finished, tmp_path / "run")
    for client in range(2):
        first, second = (store_of(out, client) for out in (finished, tmp_path / "run"))
        assert last_round(second) == 2
        assert len(second.ledger().releases()) == 4
        assert second.spent(delta=DELTA) == first.spent(delta=DELTA)


def once_a_round(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Fails where a client computes for a round that it has answered."""

    def watched(self: LocalTraining, number: int, weights: Any) -> Any:
        kept = list((self.local.releases.root / "releases").glob("*.last"))
        assert not kept or last_round(self.local.releases) < number
        return gradient(self, number, weights)

    return watched


@pytest.mark.slow
def test_a_client_that_dies_in_a_round_ends_as_if_it_had_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message is noised and kept, and it dies before it answers, or in its fine steps."""
    gradient, sent = noised_gradient, []

    def die(self: LocalTraining, number: int, weights: Any) -> Any:
        found = gradient(self, number, weights)
        sent.append(found)
        if self.local.client_id == 1 and number == 2 and len(sent) == 4:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as broken:
        broken.setattr(ASKED, die)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(config_of(), tmp_path / "run")
        run_in_process(config_of(), tmp_path / "run", resume=True)
    assert len(sent) == 5
    assert torch.equal(*(each.tensors()["total"] for each in sent[3:]))
    assert same(finished, tmp_path / "run")


@pytest.mark.slow
def test_a_client_that_misses_a_round_has_paid_and_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss(self: LocalTraining, number: int, weights: Any) -> ReleasedGradient:
        if self.local.client_id == 1 and number == 1:
            raise ValueError("away")
        return noised_gradient(self, number, weights)  # type: ignore[return-value]

    monkeypatch.setattr(ASKED, miss)
    run_in_process(config_of(aggregation={"on_failure": "skip"}), tmp_path / "run")
    rounds = json.loads((tmp_path / "run" / "metrics.json").read_text())["rounds"]
    assert [each.get("network_steps") for each in rounds] == [None] * 3 + [1, 2, None]
    assert [len(each["clients"]) for each in rounds] == [2, 2, 2, 1, 2, 2]
    # One client's noise over half the images is more noise in their mean.
    assert rounds[3]["gradient_noise"] > 1.3 * rounds[4]["gradient_noise"]
    for client in range(2):
        store = store_of(tmp_path / "run", client)
        assert last_round(store) == 2
        assert 9.99 < store.spent(delta=DELTA).largest <= 10.0
    work = client_of(config_of(aggregation={"on_failure": "skip"}), tmp_path / "run", 1).work
    with pytest.raises(StoreError, match="round 1 of the plan is over, the last was 2"):
        noised_gradient(work, 1, first_weights(work.setup))


@pytest.mark.slow
def test_a_coordinator_that_asks_for_more_than_the_plan_gets_nothing(finished: Path) -> None:
    work = client_of(config_of(), finished, 0).work
    weights, head = first_weights(work.setup), work.local.releases.ledger().head
    for number in (0, 3, 99):
        with pytest.raises(StoreError, match="all images have paid for these and no more"):
            noised_gradient(work, number, weights)
    assert work.local.releases.ledger().head == head
    assert last_round(work.local.releases) == 2


@pytest.mark.slow
def test_another_run_on_these_stores_is_another_release(finished: Path, tmp_path: Path) -> None:
    other = config_of(network={"lr": 0.01})
    heads = [store_of(finished, client).ledger().head for client in range(2)]
    with pytest.raises(ClientFailure, match="were released before with"):
        run_in_process(other, tmp_path / "run", releases=finished / "clients")
    assert [store_of(finished, client).ledger().head for client in range(2)] == heads


# --- Its ends ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_without_warm_up_begins_from_the_weights_of_a_new_network(tmp_path: Path) -> None:
    """Neither a warm-up nor statistics alone: with one round of gradients and none of fine."""
    config = config_of(run={"rounds": 4}, network={"warmup_steps": 0, "rounds": 1, "lr": 1e-3})
    run_in_process(config, tmp_path / "run")
    fresh, found = first_weights(set_up(config)), named_part(final(tmp_path / "run"), NETWORK)
    assert found.keys() == fresh.keys()
    moved = torch.cat([(found[name] - fresh[name]).flatten() for name in fresh])
    # Adam's first step is the learning rate; the average goes 9/11 of the way.
    assert float(moved.abs().median()) == pytest.approx(1e-3 * 9 / 11, rel=1e-2)
    rounds = json.loads((tmp_path / "run" / "metrics.json").read_text())["rounds"]
    assert (rounds[2]["warmup_steps"], rounds[3]["network_steps"]) == (0, 1)
