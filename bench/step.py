"""The training step: our coarse and fine steps against the loop of the usual example scripts."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


__all__ = ["training_step"]


def training_step() -> dict[str, Any]:
    """Images/s of our coarse and fine steps over a plain PyTorch loop, in turns.

    The plain loop has the same diffusers U-Net in float32, contiguous layout, unfused AdamW and a
    copied EMA. `tiny` at 16x16 on a CPU, `paper` at 32x32 on a GPU. Also the share of the measured
    matrix-multiplication peak that our steps' FLOPs reach, in the number format that they use.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fedpdm.diffusion.denoisers import Denoiser, DenoiserSpec
    from fedpdm.diffusion.objectives import denoising_loss, truncated_loss
    from fedpdm.diffusion.presets import PRESETS
    from fedpdm.diffusion.schedule import make_schedule
    from fedpdm.diffusion.training import OptimizerSettings, Trainer, select_device

    device = select_device()
    on_gpu = device.type == "cuda"
    side, batch, steps = (32, 128, 10) if on_gpu else (16, 32, 5)
    torch.manual_seed(0)
    schedule = make_schedule("linear")
    spec = DenoiserSpec(
        preset=PRESETS["paper" if on_gpu else "tiny"], resolution=side, channels=3, num_classes=10,
        prediction="epsilon", knows_clipping=False,
    )  # fmt: skip
    images = torch.randn(512, 3, side, side, device=device)
    labels = torch.randint(0, 10, (512,), device=device)
    settings = OptimizerSettings(lr=1e-4, batch_size=batch, total_steps=10_000)
    coarse, fine = (Denoiser(spec, schedule) for _ in range(2))
    plain = copy.deepcopy(fine.network).to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fine(torch.zeros(1, 3, side, side), torch.tensor([5]), labels=torch.tensor([0]))
    flops = 3 * batch * counter.get_total_flops()
    generator = torch.Generator(device).manual_seed(0)

    def fine_loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            fine, schedule, images[index], labels=labels[index], t_max=1000, weighting="snr",
            generator=generator,
        )  # fmt: skip

    def coarse_loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return truncated_loss(
            coarse, schedule, images[index], labels=labels[index], t0=600, generator=generator
        )

    trainers = [Trainer(model, settings, device=device) for model in (coarse, fine)]
    losses = (coarse_loss, fine_loss)

    def ours() -> None:
        for trainer, loss in zip(trainers, losses, strict=True):
            trainer.train(
                loss,
                sample_weights=torch.ones(512, dtype=torch.float64),
                num_steps=steps,
                generator=generator,
            )

    theirs = _plain_loop(plain, images, labels, schedule, batch=batch, steps=2 * steps)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    ours()
    theirs()
    for _ in range(7):
        for name, work in (("ours", ours), ("plain", theirs)):
            seconds[name].append(_timed(work, device))
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True)]
    count = 2 * steps * batch
    speed = 2 * steps * flops / statistics.median(seconds["ours"])
    peak = _matmul_peak(device, torch.bfloat16 if on_gpu else torch.float32)
    return {
        "ratio": statistics.median(ratios),
        "images_per_second": count / statistics.median(seconds["ours"]),
        "plain_images_per_second": count / statistics.median(seconds["plain"]),
        "gflop_per_image": flops / batch / 1e9,
        "share_of_matmul_peak": speed / peak,
        "matmul_peak_gflops": peak / 1e9,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def _plain_loop(
    network: Any,
    images: torch.Tensor,
    labels: torch.Tensor,
    schedule: Any,
    *,
    batch: int,
    steps: int,
) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=False, foreach=False)
    ema = copy.deepcopy(network)
    abar = torch.tensor(schedule.alphas_cumprod[1:], dtype=torch.float32, device=images.device)

    def run() -> None:
        for _ in range(steps):
            index = torch.randint(0, len(images), (batch,), device=images.device)
            t = torch.randint(0, 1000, (batch,), device=images.device)
            noise = torch.randn_like(images[index])
            a = abar[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * images[index] + (1 - a).sqrt() * noise
            predicted = network(x_t, t, class_labels=labels[index]).sample
            loss = torch.nn.functional.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for average, weight in zip(ema.parameters(), network.parameters(), strict=True):
                    average.mul_(0.999).add_(weight, alpha=0.001)

    return run


def _timed(work: Callable[[], object], device: torch.device) -> float:
    import torch

    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of square matrices."""
    import torch

    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(_timed(lambda: a @ b, device) for _ in range(8))
