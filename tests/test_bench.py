"""The benchmarks compare like with like."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench import federation
from bench.classifier import main
from bench.federation import _bare_loop, _config, _run
from fedpdm.diffusion.training import Trainer


@pytest.mark.slow
def test_the_bare_loop_takes_the_steps_of_the_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[bool, int]] = []
    train = Trainer.train

    def counting(trainer: Trainer[Any], loss: Any, **options: Any) -> Any:
        report = train(trainer, loss, **options)
        taken.append((trainer.model.spec.knows_clipping, report.num_images))
        return report

    monkeypatch.setattr(Trainer, "train", counting)
    monkeypatch.setattr(federation, "ROUNDS", 3)
    config = _config(num_clients=3, steps=2)
    config = dataclasses.replace(
        config,
        coarse=dataclasses.replace(config.coarse, preset="nano"),
        fine=dataclasses.replace(config.fine, preset="nano"),
    )
    assert _bare_loop(config) > 0
    bare = {fine: sum(n for kind, n in taken if kind == fine) for fine in (True, False)}
    taken.clear()
    assert _run(config) > 0
    federated = {fine: sum(n for kind, n in taken if kind == fine) for fine in (True, False)}
    assert bare == federated == {True: 3 * 2 * 3 * 32, False: 3 * 2 * 3 * 32}


@pytest.mark.slow
def test_the_classifier_of_class_gaussians_by_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    """On digits: right far more often than chance, and less often at a smaller budget."""
    assert main(["--quick"]) == 0
    head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["epsilon", "dimensions", "right"]
    right = {(float(epsilon), int(count)): float(share) for epsilon, count, share in lines}
    assert right.keys() == {(10.0, 64), (10.0, 20), (1.0, 64), (1.0, 20)}
    assert right[10.0, 64] > 0.8
    for count in (64, 20):
        assert right[1.0, count] < right[10.0, count]
