"""What a federation costs beyond its gradient steps: the in-process engine over a bare loop.

The bare loop takes the steps that the clients take, with the same losses, batches and models, but
with one coarse and one fine trainer that live from the first step to the last: no messages, no
stores, no checkpoints, no evaluation.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpdm.config import RunConfig

__all__ = ["federation_in_process", "many_clients"]

ROUNDS = 10


def federation_in_process() -> dict[str, Any]:
    """Wall time of 4 clients x 10 rounds in process, over the same steps in one bare loop."""
    config = _config(num_clients=4, steps=10)
    _run(_config(num_clients=4, steps=1))  # loads what is loaded once
    ratios, ours, bare = [], [], []
    for _ in range(2):
        before = _bare_loop(config)
        ours.append(_run(config))
        bare.append((before + _bare_loop(config)) / 2)
        ratios.append(ours[-1] / bare[-1])
    return {
        "ratio": statistics.median(ratios),
        "seconds": statistics.median(ours),
        "bare_seconds": statistics.median(bare),
        "ratios": ratios,
    }


def many_clients() -> dict[str, Any]:
    """Wall time per client and step of 128 clients over that of 4, both 10 rounds in process."""
    steps = 4
    _run(_config(num_clients=4, steps=1))
    few, many = [], []
    for _ in range(3):
        few.append(_run(_config(num_clients=4, steps=steps)) / 4)
    many.append(_run(_config(num_clients=128, steps=steps)) / 128)
    seconds = statistics.median(few)
    return {
        "ratio": many[0] / seconds,
        "ms_per_step": 1e3 * many[0] / (2 * steps * ROUNDS),
        "ms_per_step_of_4": 1e3 * seconds / (2 * steps * ROUNDS),
    }


def _config(*, num_clients: int, steps: int) -> RunConfig:
    """Digits as in the demo, `steps` coarse and fine steps per round, metrics at the end only."""
    from fedpdm.config import config_from_mapping

    training = {"preset": "micro", "steps_per_round": steps, "batch_size": 32}
    return config_from_mapping(
        {
            "name": "bench",
            "run": {"rounds": ROUNDS, "device": "cpu"},
            "data": {"name": "digits"},
            "partition": {"kind": "iid", "num_clients": num_clients},
            "privacy": {"epsilon": 10, "clip_norm": 8},
            "coarse": training,
            "fine": training,
            "evaluation": {"every": ROUNDS, "image_metrics": False},
            "sampling": {"num_steps": 2, "per_class": 1},
        }
    )


def _run(config: RunConfig) -> float:
    """Seconds of a whole run."""
    from fedpdm.engines.inprocess import run_in_process

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        run_in_process(config, Path(folder) / "run")
        return time.perf_counter() - started


def _bare_loop(config: RunConfig) -> float:
    """Seconds of all clients' gradient steps in one loop per model."""
    import numpy as np
    import torch

    from fedpdm.batches import coarse_batch_loss, fine_batch_loss
    from fedpdm.build import (
        build_denoiser,
        build_image_spec,
        build_optimizer_settings,
        build_release_plan,
        build_schedule,
        load_split,
    )
    from fedpdm.data import normalize
    from fedpdm.mechanism import release
    from fedpdm.noise import SeededNoise
    from fedpdm.training import Trainer

    images = load_split(config, "train")
    spec, schedule = build_image_spec(config, images), build_schedule(config)
    plan = build_release_plan(config, schedule, spec)
    labels = torch.tensor(images.labels)
    released = release(
        normalize(torch.tensor(images.images), shift=plan.shift), labels, schedule=schedule,
        t0=plan.t0, clip_norm=plan.clip_norm, shift=plan.shift,
        noise=SeededNoise(np.random.SeedSequence(0)),
    )  # fmt: skip
    device = torch.device("cpu")
    steps = config.coarse.steps_per_round * config.partition.num_clients * ROUNDS
    started = time.perf_counter()
    for role in ("coarse", "fine"):
        model = build_denoiser(config, role, spec=spec, schedule=schedule)
        trainer = Trainer(model, build_optimizer_settings(config, role), device=device)
        if role == "coarse":
            loss = coarse_batch_loss(
                config, model, schedule, released, training=True, device=device
            )
        else:
            loss = fine_batch_loss(
                config, model, schedule, plan, images=images.images.copy(),
                labels=images.labels.copy(), device=device,
            )  # fmt: skip
        trainer.train(
            loss,
            sample_weights=torch.ones(len(labels), dtype=torch.float64),
            num_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
    return time.perf_counter() - started
