"""What a federation costs beyond its gradient steps: the in-process engine over a bare loop.

The bare loop takes the steps that the clients take, with the same losses, batches and models, but
with one coarse and one fine trainer that live from the first step to the last: no messages, no
stores, no checkpoints, no evaluation.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpdm.config import RunConfig

__all__ = ["federation_in_process", "federation_in_ray", "many_clients"]

ROUNDS = 10


def federation_in_process() -> dict[str, Any]:
    """Wall time of 4 clients x 10 rounds in process, over the same steps in one bare loop.

    20 coarse and 20 fine steps per client and round, a fifth of the default. A quarter of the bare
    loop runs before and a quarter after the federation.
    """
    config = _config(num_clients=4, steps=20)
    _run(_config(num_clients=4, steps=1))  # loads what is loaded once
    before = _bare_loop(config, share=0.25)
    seconds = _run(config)
    bare = 2 * (before + _bare_loop(config, share=0.25))
    return {"ratio": seconds / bare, "seconds": seconds, "bare_seconds": bare}


def federation_in_ray() -> dict[str, Any]:
    """Wall time of rounds 2 to 10 of 4 clients in Ray, over the same steps in bare loops.

    As many bare loops run side by side as Ray has actors. The first round is start-up: actors
    import, load data and noise it.
    """
    import multiprocessing

    from fedpdm.engines.flower import run_with_flower

    actors = min(2, os.cpu_count() or 1)
    config = _config(num_clients=4, steps=20)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "run"
        started = time.perf_counter()
        run_with_flower(config, out, num_cpus=actors)
        whole = time.perf_counter() - started
        rounds = json.loads((out / "metrics.json").read_text())["rounds"]
    seconds = sum(record["seconds"] for record in rounds[1:])
    with multiprocessing.get_context("spawn").Pool(actors) as pool:
        pool.starmap(_bare_loop, [(config, 0.01)] * actors)
        bare = statistics.mean(pool.starmap(_bare_loop, [(config, 0.25)] * actors))
    bare *= (ROUNDS - 1) / ROUNDS / (0.25 * actors)
    return {
        "ratio": seconds / bare,
        "seconds": seconds,
        "bare_seconds": bare,
        "start_up_seconds": whole - seconds,
        "actors": actors,
    }


def many_clients() -> dict[str, Any]:
    """Wall time per client and step of 128 clients over that of 4, both 10 rounds in process."""
    options = {"steps": 1, "batch_size": 8}
    _run(_config(num_clients=4, **options))
    few = [_run(_config(num_clients=4, **options)) / 4 for _ in range(2)]
    many = _run(_config(num_clients=128, **options)) / 128
    few.append(_run(_config(num_clients=4, **options)) / 4)
    seconds = statistics.median(few)
    return {
        "ratio": many / seconds,
        "ms_per_client_round": 1e3 * many / ROUNDS,
        "ms_per_client_round_of_4": 1e3 * seconds / ROUNDS,
    }


def _config(*, num_clients: int, steps: int, batch_size: int = 32) -> RunConfig:
    """Digits as in the demo, `steps` coarse and fine steps per round, metrics at the end only."""
    from fedpdm.config import config_from_mapping

    training = {"preset": "micro", "steps_per_round": steps, "batch_size": batch_size}
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


def _bare_loop(config: RunConfig, share: float = 1.0) -> float:
    """Seconds of all clients' gradient steps, or a share of them, in one loop per model."""
    import numpy as np
    import torch

    from fedpdm.data import normalize
    from fedpdm.data.loading import load_split
    from fedpdm.diffusion.training import Trainer
    from fedpdm.privacy.mechanism import release
    from fedpdm.privacy.noise import SeededNoise
    from fedpdm.setup.build import build_denoiser, build_optimizer_settings
    from fedpdm.setup.losses import coarse_batch_loss, fine_batch_loss
    from fedpdm.setup.run_setup import set_up

    images = load_split(config, "train")
    setup = set_up(config, images)
    plan = setup.release_plan
    labels = torch.tensor(images.labels)
    released = release(
        normalize(torch.tensor(images.images), shift=plan.shift), labels, schedule=setup.schedule,
        t0=plan.t0, clip_norm=plan.clip_norm, shift=plan.shift,
        noise=SeededNoise(np.random.SeedSequence(0)),
    )  # fmt: skip
    device = torch.device("cpu")
    torch.set_num_threads(config.run.threads)
    whole = config.coarse.steps_per_round * config.partition.num_clients * ROUNDS
    steps = max(1, round(share * whole))
    started = time.perf_counter()
    for role in ("coarse", "fine"):
        model = build_denoiser(setup, role)
        trainer = Trainer(model, build_optimizer_settings(config, role), device=device)
        if role == "coarse":
            loss = coarse_batch_loss(setup, model, released, training=True, device=device)
        else:
            loss = fine_batch_loss(
                setup, model, images=images.images.copy(), labels=images.labels.copy(),
                device=device,
            )  # fmt: skip
        trainer.train(
            loss,
            sample_weights=torch.ones(len(labels), dtype=torch.float64),
            num_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
    return time.perf_counter() - started
