"""Two-stage sampling: the coarse denoiser from pure noise down to t0, the fine one to 0.

Paper's Algorithm 2, in the two forms of docs/method.md section 3:

* `truncated`: one chain over all T levels. The denoiser that is asked changes at t0, the
  scheduler does not notice, so any few-step diffusers scheduler runs across the hand-over.
* `noise_to_noise` (the paper's two chains): the coarse model samples an x_tilde with a complete
  chain, then the fine model runs the chain of the first t0 betas.

Both denoisers answer with x0_hat, so schedulers run with `prediction_type="sample"`.
diffusers' timestep k is the state after k + 1 steps of noise: t = k + 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = [
    "CHAINS",
    "SCHEDULERS",
    "SamplerOutput",
    "make_scheduler",
    "refine",
    "sample",
    "sample_in_batches",
]


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """Samples of the two-stage sampler.

    `images` is float32 (N, C, H, W) in the shifted scale of the models; `coarse` is the last
    clean-image estimate of the coarse model, same shape, None where no coarse step was taken;
    `num_coarse_calls` and `num_fine_calls` count denoiser evaluations of one batch.
    """

    images: torch.Tensor
    coarse: torch.Tensor | None
    num_coarse_calls: int
    num_fine_calls: int


CHAINS = ("truncated", "noise_to_noise")

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}),
    # DDIM is first-order DPM-Solver++ (Lu et al. 2022). diffusers' own DDIMScheduler steps by
    # T // num_steps, which leaves noise in the samples where num_steps does not divide T.
    "ddim": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"},
    ),
    "dpm_solver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
}


def make_scheduler(name: str, betas: np.ndarray) -> Any:
    """A diffusers scheduler (by the names in `SCHEDULERS`, or any diffusers class name) on `betas`.

    `betas` is float64 (T,). `ValueError` for an unknown name.
    """
    class_name, options = SCHEDULERS.get(name, (name, {}))
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or not class_name.endswith("Scheduler"):
        raise ValueError(
            f"sampling.scheduler must be one of {', '.join(SCHEDULERS)} or a diffusers scheduler "
            f"class, got {name!r}"
        )
    if "clip_sample" in inspect.signature(scheduler_class).parameters:
        options = {"clip_sample": False, **options}  # shifted images do not lie in [-1, 1]
    try:
        return scheduler_class(
            num_train_timesteps=len(betas),
            trained_betas=betas.astype(np.float32),
            prediction_type="sample",
            timestep_spacing="trailing",
            **options,
        )
    except (TypeError, ImportError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"sampling.scheduler {name!r} cannot be used here: {line}") from None


def _guided(
    denoiser: DenoisingFunction,
    x_t: torch.Tensor,
    t: torch.Tensor,
    *,
    labels: torch.Tensor,
    guidance: float,
    clipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Classifier-free guidance in x0 space: null + guidance (conditional - null)."""
    if guidance == 1.0:
        return denoiser(x_t, t, labels=labels, clipped=clipped)
    both = denoiser(
        torch.cat([x_t, x_t]),
        torch.cat([t, t]),
        labels=torch.cat([labels, torch.full_like(labels, NO_LABEL)]),
        clipped=None if clipped is None else torch.cat([clipped, clipped]),
    )
    conditional, null = both.chunk(2)
    return null + guidance * (conditional - null)


def _run_chain(
    ask: Callable[[torch.Tensor, int], torch.Tensor],
    x: torch.Tensor,
    scheduler: Any,
    *,
    num_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Run `scheduler` over its whole range from x; `ask(x, t)` answers x0_hat at level t."""
    scheduler.set_timesteps(min(num_steps, scheduler.config.num_train_timesteps))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    # Schedulers in sigma space want x_t / sqrt(abar_t); the others scale by 1.
    x = x / scheduler.scale_model_input(torch.ones_like(x), scheduler.timesteps[0])
    for timestep in scheduler.timesteps:
        x0_hat = ask(scheduler.scale_model_input(x, timestep), round(float(timestep)) + 1)
        x = scheduler.step(x0_hat, timestep, x, **extra).prev_sample
    return x


@torch.no_grad()
def sample(
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    x_T: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    t0: int,
    labels: torch.Tensor,
    generator: torch.Generator,
    scheduler: str = "ddim",
    num_steps: int = 50,
    chain: str = "truncated",
    guidance: float = 1.0,
    flag_unclipped: bool = True,
    coarse_share: torch.Tensor | None = None,
) -> SamplerOutput:
    """Sample with `coarse` above t0 and `fine` at and below it.

    Args:
        coarse: x0 denoiser for t > t0; None: `fine` alone at all t (training alone).
        fine: x0 denoiser for t <= t0; None: the coarse model continues (the global attacker).
        x_T: float32 (N, C, H, W), pure noise.
        t0: hand-over in [0, T] (the release's t0).
        labels: int (N,), `NO_LABEL` for unconditional.
        num_steps: steps of the scheduler in all; T means every step.
        chain: one of `CHAINS`; with `noise_to_noise`, `num_steps` is shared between the two
            chains in the ratio T : t0.
        guidance: classifier-free guidance weight, 1 for none.
        flag_unclipped: pass the fine model's clipped flag, unset.
        coarse_share: float (K + 1,) in [0, 1], by label and at last for no label: above t0 the
            answer is this share of the coarse model's and the rest of the fine model's (which must
            know all t). Default: the coarse model's alone. `truncated` only.

    Raises:
        ValueError: no denoiser at all, t0 or num_steps out of range, unknown chain or scheduler, a
            share with another chain.
    """
    T = schedule.num_steps
    if coarse is None and fine is None:
        raise ValueError("sample needs a coarse or a fine denoiser")
    if not 0 <= t0 <= T:
        raise ValueError(f"t0 must be in [0, {T}], got {t0}")
    if num_steps < 1:
        raise ValueError(f"sampling.num_steps must be at least 1, got {num_steps}")
    if chain not in CHAINS:
        raise ValueError(f"chain must be one of {', '.join(CHAINS)}, got {chain!r}")
    if coarse_share is not None and chain != "truncated":
        raise ValueError(f"coarse_share needs the chain truncated, got {chain!r}")
    unclipped = torch.zeros(len(x_T), dtype=torch.bool, device=x_T.device)
    share: torch.Tensor | None = None
    if coarse_share is not None:
        place = torch.where(labels == NO_LABEL, len(coarse_share) - 1, labels)
        share = coarse_share.to(x_T)[place].view(-1, *[1] * (x_T.ndim - 1))
    calls = {"coarse": 0, "fine": 0}
    last_coarse: torch.Tensor | None = None

    def ask_coarse(x: torch.Tensor, level: int) -> torch.Tensor:
        nonlocal last_coarse
        assert coarse is not None
        calls["coarse"] += 1
        t = torch.full((len(x),), level, device=x.device)
        last_coarse = _guided(coarse, x, t, labels=labels, guidance=guidance)
        return last_coarse

    def ask_fine(x: torch.Tensor, level: int) -> torch.Tensor:
        assert fine is not None
        calls["fine"] += 1
        t = torch.full((len(x),), level, device=x.device)
        flag = unclipped if flag_unclipped else None
        return _guided(fine, x, t, labels=labels, guidance=guidance, clipped=flag)

    def ask_either(x: torch.Tensor, level: int) -> torch.Tensor:
        use_coarse = coarse is not None and (level > t0 or fine is None)
        if not use_coarse:
            return ask_fine(x, level)
        if share is None or fine is None:
            return ask_coarse(x, level)
        return torch.lerp(ask_fine(x, level), ask_coarse(x, level), share)

    if chain == "truncated" or coarse is None:
        full = make_scheduler(scheduler, schedule.betas)
        x = _run_chain(ask_either, x_T, full, num_steps=num_steps, generator=generator)
    else:
        enough = num_steps >= T + t0
        coarse_steps = T if enough else max(1, round(num_steps * T / (T + t0)))
        full = make_scheduler(scheduler, schedule.betas)
        x = _run_chain(ask_coarse, x_T, full, num_steps=coarse_steps, generator=generator)
        if fine is not None and t0 > 0:
            fine_steps = max(1, num_steps - coarse_steps)
            head = make_scheduler(scheduler, schedule.betas[:t0])
            x = _run_chain(ask_fine, x, head, num_steps=fine_steps, generator=generator)
        if last_coarse is not None:
            last_coarse = last_coarse / schedule.alpha_bar(t0) ** 0.5
    return SamplerOutput(
        images=x,
        coarse=last_coarse,
        num_coarse_calls=calls["coarse"],
        num_fine_calls=calls["fine"],
    )


@torch.no_grad()
def refine(
    fine: DenoisingFunction,
    x_t: torch.Tensor,
    *,
    t: int,
    schedule: NoiseSchedule,
    labels: torch.Tensor,
    generator: torch.Generator,
    scheduler: str = "ddim",
    num_steps: int = 50,
    guidance: float = 1.0,
    flag_unclipped: bool = True,
) -> torch.Tensor:
    """The fine stage by itself: x_t float32 (N, C, H, W) at level t in [0, T] down to 0.

    Of noised real images this is what the fine stage makes of a perfect coarse model's samples.
    """
    if not 0 <= t <= schedule.num_steps:
        raise ValueError(f"t must be in [0, {schedule.num_steps}], got {t}")
    if t == 0:
        return x_t
    flag = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device) if flag_unclipped else None

    def ask(x: torch.Tensor, level: int) -> torch.Tensor:
        levels = torch.full((len(x),), level, device=x.device)
        return _guided(fine, x, levels, labels=labels, guidance=guidance, clipped=flag)

    head = make_scheduler(scheduler, schedule.betas[:t])
    return _run_chain(ask, x_t, head, num_steps=num_steps, generator=generator)


def sample_in_batches(
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    *,
    image_shape: tuple[int, int, int],
    labels: torch.Tensor,
    generator: torch.Generator,
    batch_size: int = 256,
    **options: Any,
) -> SamplerOutput:
    """`sample` for any number of labels (int (N,)), `batch_size` at a time, from fresh noise.

    `image_shape` is (C, H, W); `options` are `sample`'s.
    """
    outputs = []
    for part in labels.split(batch_size):
        x_T = torch.randn((len(part), *image_shape), generator=generator, device=labels.device)
        outputs.append(sample(coarse, fine, x_T, labels=part, generator=generator, **options))
    estimates = [output.coarse for output in outputs if output.coarse is not None]
    return SamplerOutput(
        images=torch.cat([output.images for output in outputs]),
        coarse=torch.cat(estimates) if estimates else None,
        num_coarse_calls=max(output.num_coarse_calls for output in outputs),
        num_fine_calls=max(output.num_fine_calls for output in outputs),
    )
