"""The sampler: one denoiser and a diffusers scheduler, from a noise level down to clean images.

Denoisers answer with x0_hat, so schedulers run with `prediction_type="sample"`. diffusers'
timestep k is the state after k + 1 steps of noise: t = k + 1. Which model answers at which level
is the denoiser's business (`fedpdm.diffusion.combined`); the scheduler does not notice.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = ["SCHEDULERS", "chain_length", "make_scheduler", "sample"]

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
    import diffusers  # it takes seconds

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


def chain_length(schedule: NoiseSchedule, *, t: int, scheduler: str, num_steps: int) -> int:
    """How often `sample` asks its denoiser from level t on."""
    return len(_chain(schedule, t, scheduler, num_steps).timesteps) if t else 0


def _chain(schedule: NoiseSchedule, t: int, scheduler: str, num_steps: int) -> Any:
    """The scheduler with its steps from t >= 1 down."""
    chain = make_scheduler(scheduler, schedule.betas[:t])
    chain.set_timesteps(min(num_steps, t))
    return chain


@torch.no_grad()
def sample(
    denoiser: DenoisingFunction,
    x_t: torch.Tensor,
    *,
    labels: torch.Tensor,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    t: int | None = None,
    scheduler: str = "ddim",
    num_steps: int = 50,
) -> torch.Tensor:
    """x_t float32 (N, *) at level t down to 0: clean images of that shape.

    Args:
        denoiser: asked at levels from t down to 1, at one level for all N in each call.
        labels: int (N,), `NO_LABEL` for none.
        generator: source of the scheduler's noise, on x_t's device.
        t: in [0, T]; default T, where x_t is pure noise. 0 gives x_t back.
        scheduler: as `make_scheduler`.
        num_steps: steps of the scheduler, at least 1; t or more means every step.

    Raises:
        ValueError: t or num_steps out of range, or an unknown scheduler.
    """
    T = schedule.num_steps
    start = T if t is None else t
    if not 0 <= start <= T:
        raise ValueError(f"t must be in [0, {T}], got {start}")
    if num_steps < 1:
        raise ValueError(f"sampling.num_steps must be at least 1, got {num_steps}")
    if start == 0:
        return x_t
    chain = _chain(schedule, start, scheduler, num_steps)
    takes_generator = "generator" in inspect.signature(chain.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    # Schedulers in sigma space want x_t / sqrt(abar_t); the others scale by 1.
    x = x_t / chain.scale_model_input(torch.ones_like(x_t), chain.timesteps[0])
    for timestep in chain.timesteps:
        level = torch.full((len(x),), round(float(timestep)) + 1, device=x.device)
        x0_hat = denoiser(chain.scale_model_input(x, timestep), level, labels=labels)
        x = chain.step(x0_hat, timestep, x, **extra).prev_sample
    return x
