"""The benchmarks. Each `measure` returns a mapping with at least `ratio`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.federation import federation_in_process, federation_in_ray, many_clients
from bench.large import large_model, secure_aggregation
from bench.memory import forget_peak, resident
from bench.quality import compute_to_quality
from bench.release import release_memory, release_secure, release_seeded
from bench.sampling import sampling
from bench.server import server_memory
from bench.step import training_step
from bench.wire import wire

__all__ = ["CASES", "Case"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A benchmark: what the ratio is, its target, and whether more is better.

    `limit` is what it cannot be better than, where that is known beforehand; a measurement may
    report its own.
    """

    what: str
    target: float
    better: str
    measure: Callable[[], dict[str, Any]]
    limit: float | None = None


def help_time() -> dict[str, Any]:
    """Wall seconds of `fedpdm --help`, and how many times a bare Python start that is."""

    def fastest(arguments: list[str]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - started)
        return min(times)

    ours = fastest(["-m", "fedpdm.cli", "--help"])
    return {"ratio": ours, "over_python_start": ours / fastest(["-c", "pass"])}


def client_memory() -> dict[str, Any]:
    """Peak resident memory that a client's round adds, over model + optimiser + EMA + data.

    A client with a quarter of CIFAR-10 (12,500 images of 32x32) and the `paper` U-Net (35.7 M
    parameters) as coarse and as fine model does one whole round: release, coarse steps, fine steps,
    state written, reply made. Batches of one image: activations grow with the batch, the rest does
    not. The two models are never in memory together, so one is counted.
    """
    import numpy as np
    import torch

    import fedpdm.config
    from clients.local import LocalClient
    from clients.pfdm_client import PFDMClient
    from fedpdm import wire
    from fedpdm.data import ImageSet
    from fedpdm.data.client_images import ClientImages
    from fedpdm.privacy.releases import ReleaseStore
    from fedpdm.setup.build import build_denoiser
    from fedpdm.setup.run_setup import set_up
    from fedpdm.storage.client_store import ClientStore

    training = {"preset": "paper", "steps_per_round": 2, "batch_size": 1}
    config = fedpdm.config.config_from_mapping(
        {"name": "memory", "data": {"name": "cifar10"}, "coarse": training, "fine": training}
    )
    count = 12_500
    rng = np.random.default_rng(0)
    images = ImageSet(
        images=rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8),
        labels=rng.integers(0, 10, count),
        class_names=tuple("0123456789"),
        background=0.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        local = LocalClient(
            setup=set_up(config, images),
            held=ClientImages(
                client_id=0,
                images=images,
                train=np.arange(count * 9 // 10),
                heldout=np.arange(count * 9 // 10, count),
                indices=None,
                majority=tuple(range(10)),
                minority=(),
            ),
            store=ClientStore(Path(folder)),
            releases=ReleaseStore(Path(folder)),
            raw_metrics=True,
            allow_new_release=False,
            reference=None,
        )
        client = PFDMClient(local)
        model = build_denoiser(local.setup, "coarse")
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        request = wire.encode_model(dict(model.network.named_parameters()))
        del model
        torch.nn.Conv2d(4, 4, 3)(torch.randn(1, 4, 8, 8)).sum().backward()  # start the libraries
        before = resident()
        forget_peak()
        answer = client.fit(request, {"round": 1, "phase": "coarse"})
        peak = resident("VmHWM")
    assert "error" not in answer[2], answer[2]
    data = images.images.nbytes * 5  # uint8 pixels (there before) and the float32 release
    added = peak - before + images.images.nbytes
    return {"ratio": added / (4 * weights + data), "peak_mb": added / 1e6}


CASES = {
    "training_step": Case(
        what="images/s of coarse and fine steps over a plain loop", target=1.05, better="higher",
        measure=training_step,
    ),
    "compute_to_quality": Case(
        what="FLOPs of a plain DDPM recipe over ours, same quality", target=4.0, better="higher",
        measure=compute_to_quality,
    ),
    "federation": Case(
        what="4 clients x 10 rounds in process over the same steps in a loop", target=1.05,
        limit=1.0, better="lower", measure=federation_in_process,
    ),
    "federation_ray": Case(
        what="the same in Ray after start-up, over loops in as many processes", target=1.15,
        limit=1.0, better="lower", measure=federation_in_ray,
    ),
    "many_clients": Case(
        what="time per client and step, 128 clients over 4", target=1.10, limit=1.0,
        better="lower", measure=many_clients,
    ),
    "server_memory": Case(
        what="peak of a server with 128 clients, in model copies", target=4.0, limit=2.0,
        better="lower", measure=server_memory,
    ),
    "sampling": Case(
        what="denoiser calls of T + t0 ancestral steps over ours, same FID", target=20.0,
        better="higher", measure=sampling,
    ),
    "wire": Case(
        what="bytes of plain float32 FedAvg over ours, same coarse loss", target=50.0,
        better="higher", measure=wire,
    ),
    "large_model": Case(
        what="bytes of a large coarse update in float32 over bfloat16", target=1.99,
        limit=2.0, better="higher", measure=large_model,
    ),
    "secure_aggregation": Case(
        what="bytes that clients send in a secure round over a plain one", target=2.05,
        better="lower", measure=secure_aggregation,
    ),
    "release_seeded": Case(
        what="MB/s of float32 released, one core, seeded", target=300.0, better="higher",
        measure=release_seeded,
    ),
    "release_secure": Case(
        what="MB/s of float32 released, one core, secure", target=60.0, better="higher",
        measure=release_secure,
    ),
    "release_memory": Case(
        what="peak MB beyond the data, 50,000 CIFAR images released", target=300.0, better="lower",
        measure=release_memory,
    ),
    "help_time": Case(
        what="seconds for fedpdm --help", target=1.0, better="lower", measure=help_time
    ),
    "client_memory": Case(
        what="peak memory over model + optimiser + EMA + data", target=1.3, limit=1.0,
        better="lower", measure=client_memory,
    ),
}  # fmt: skip
