"""Runs of class statistics on images that nobody would choose: each ends as it should, and an
image is in each sum once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.config import RunConfig
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.privacy.mechanism import StatisticsParameters
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.engines.test_statistics_runs import PARTS, config_of
from tests.support.release_toys import DELTA

# labels of the images of a set of three classes, whether all pixels are equal, clients, and more
CASES: dict[str, tuple[list[int], bool, int, dict[str, Any]]] = {
    "a class that nobody holds": ([0, 2] * 8, False, 2, {}),
    "one image each": ([0, 1], False, 2, {}),
    "one class": ([1] * 12, False, 2, {}),
    "all images equal": ([0] * 9, True, 1, {}),
    "fewer images than directions": ([0, 1, 2] * 4, False, 2, {}),
    "no direction above the edge": ([0, 1, 2] * 10, False, 2, {"epsilon": 0.5}),
}


def run_of(folder: Path, case: str) -> RunConfig:
    labels, equal, num_clients, privacy = CASES[case]
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    if equal:
        images[:] = images[:1]
    np.savez(
        folder / "own.npz", images=images, labels=np.array(labels), class_names=["a", "b", "c"],
        images_test=images[:2], labels_test=np.array(labels[:2]),
    )  # fmt: skip
    return config_of(
        data={
            "name": "npz",
            "root": str(folder / "own.npz"),
            "max_images": None,
            "holdout_fraction": 0.0,
        },
        partition={"kind": "iid", "num_clients": num_clients},
        fine={"steps_per_round": 1},
        privacy=privacy,
        evaluation={"image_metrics": False},
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_as_it_should(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(tmp_path, case)
    run_in_process(config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    labels, equal, num_clients, _ = CASES[case]
    tensors = read_tensors(run.root / "coarse.safetensors")[0]
    assert tensors["classes"].tolist() == sorted(set(labels))
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert all(bool(t.isfinite().all()) for t in floats)
    said = (run.root / "log.txt").read_text()
    none = "no direction stands out of the noise at this epsilon; classes have their means and one"
    assert (none in said) == (tensors["directions"].shape[1] == 0)
    if case == "no direction above the edge":
        assert none in said
        assert float(tensors["rest"].min()) > 0.0
    expected = 1 if equal else len(labels)
    for part in PARTS:
        kept = run.load_uploads(part=part)
        assert len(kept) == num_clients
        assert sum(int(t["counts"].sum()) for t, _ in kept) == expected
    for client in range(num_clients):
        store = ReleaseStore(run.client_path(client))
        stages = []
        for record in store.ledger().releases():
            assert isinstance(record.parameters, StatisticsParameters)
            stages.append(record.parameters.stage)
        assert stages == list(PARTS)
        paid = store.spent(delta=DELTA)
        assert paid.largest == pytest.approx(config.privacy.epsilon, rel=1e-6)
        assert len(paid.distribution) == 1
    drawn = open_synthesizer(run, 0).sample(np.array(sorted(set(labels))), seed=0)
    assert drawn.shape == (len(set(labels)), 3, 8, 8)
    unlabelled = open_synthesizer(run, 0)
    assert unlabelled.coarse is not None
    x = torch.zeros(1, 3, 8, 8)
    answer = unlabelled.coarse(x, torch.tensor([900]), labels=torch.tensor([1]))
    assert bool(answer.isfinite().all())  # also of a class that nobody holds
