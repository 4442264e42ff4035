"""Benchmarks of the release: pixels per second on one core, and memory."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["release_memory", "release_secure", "release_seeded"]


def release_seeded() -> dict[str, Any]:
    """MB/s of float32 input that a simulation releases."""
    import numpy as np

    from fedpdm.privacy.noise import SeededNoise

    return _speed(lambda: SeededNoise(np.random.SeedSequence(0)))


def release_secure() -> dict[str, Any]:
    """MB/s of float32 input that a deployed client releases."""
    from fedpdm.privacy.noise import SystemNoise

    return _speed(SystemNoise)


def _speed(noise: Callable[[], Any]) -> dict[str, Any]:
    """The best and the median of passes over 20,000 images of 3x32x32 on one core, and over memcpy.

    Clip, quantise, noise and write to memory; the noise table is made beforehand (0.7 s, once).
    """
    import numpy as np
    import torch

    from fedpdm.diffusion.schedule import make_schedule
    from fedpdm.privacy.mechanism import release

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    schedule = make_schedule("linear")
    images = torch.rand(20_000, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.zeros(len(images), dtype=torch.int64)
    target = np.empty_like(images.numpy())
    source = noise()
    seconds: dict[str, list[float]] = {"release": [], "copy": []}
    for _ in range(9):
        started = time.perf_counter()
        np.copyto(target, images.numpy())
        between = time.perf_counter()
        release(images, labels, schedule=schedule, t0=675, clip_norm=10.0, shift=0.0, noise=source)
        seconds["copy"].append(between - started)
        seconds["release"].append(time.perf_counter() - between)
    megabytes = images.numel() * 4 / 1e6
    best = {name: megabytes / min(values) for name, values in seconds.items()}
    return {
        "ratio": best["release"],
        "limit": best["copy"],
        "median_mb_per_second": megabytes / statistics.median(seconds["release"]),
        "memcpy_mb_per_second": best["copy"],
        "over_memcpy": best["release"] / best["copy"],
    }


def release_memory() -> dict[str, Any]:
    """Peak resident MB beyond the data while 50,000 images of 3x32x32 are released to disk."""
    import numpy as np

    from bench.memory import forget_peak, resident
    from fedpdm.data import ImageSet
    from fedpdm.diffusion.schedule import make_schedule
    from fedpdm.privacy.events import release_parameters
    from fedpdm.privacy.mechanism import SystemNoise
    from fedpdm.privacy.releases import ReleaseRequest, ReleaseStore

    rng = np.random.default_rng(0)
    images = ImageSet(
        images=rng.integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8),
        labels=rng.integers(0, 10, 50_000),
        class_names=tuple("0123456789"),
        background=0.0,
    )
    request = ReleaseRequest(
        client_id=0,
        parameters=release_parameters(make_schedule("linear"), t0=675, clip_norm=10.0, shift=0.0),
        delta=1e-5,
        noise=lambda _: SystemNoise(),
        simulation=False,
    )
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        started = time.perf_counter()
        released = ReleaseStore(Path(folder)).obtain(images, request)
        seconds = time.perf_counter() - started
        peak = resident("VmHWM")
        assert len(released.tensors()["labels"]) == len(images)
    return {"ratio": (peak - before) / 1e6, "seconds": seconds}
