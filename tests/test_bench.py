"""The benchmarks compare like with like."""

from __future__ import annotations

from typing import Any

import pytest

from bench.federation import _bare_loop, _config, _run
from fedpdm.diffusion.training import Trainer


def test_the_bare_loop_takes_the_steps_of_the_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[bool, int]] = []
    train = Trainer.train

    def counting(trainer: Trainer[Any], loss: Any, **options: Any) -> Any:
        report = train(trainer, loss, **options)
        taken.append((trainer.model.spec.knows_clipping, report.num_images))
        return report

    monkeypatch.setattr(Trainer, "train", counting)
    config = _config(num_clients=3, steps=2)
    assert _bare_loop(config) > 0
    bare = {fine: sum(n for kind, n in taken if kind == fine) for fine in (True, False)}
    taken.clear()
    assert _run(config) > 0
    federated = {fine: sum(n for kind, n in taken if kind == fine) for fine in (True, False)}
    assert bare == federated == {True: 3 * 2 * 10 * 32, False: 3 * 2 * 10 * 32}
