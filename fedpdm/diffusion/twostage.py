"""Two-stage sampling: the coarse denoiser from pure noise down to t0, the fine one to 0.

Paper's Algorithm 2, in the two forms of docs/method.md section 3:

* `truncated`: one chain over all T levels. The denoiser that is asked changes at t0, the
  scheduler does not notice, so any few-step diffusers scheduler runs across the hand-over.
* `noise_to_noise` (the paper's two chains): the coarse model samples an x_tilde with a complete
  chain, then the fine model runs the chain of the first t0 betas.

With one model alone, it does all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpdm.diffusion.combined import Guided, HandOver, Mixed, Unclipped, Unlabelled, Watched
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.sampling import chain_length, sample
from fedpdm.diffusion.schedule import NoiseSchedule

__all__ = [
    "CHAINS",
    "SamplerOutput",
    "SamplerSettings",
    "Stage",
    "as_asked",
    "hand_over",
    "refine",
    "refining",
    "run_stages",
    "sample_in_batches",
    "sample_two_stage",
    "stages",
    "steps_of",
]

CHAINS = ("truncated", "noise_to_noise")


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerSettings:
    """How a coarse and a fine model sample together.

    Attributes:
        t0: hand-over in [0, T] (the release's t0).
        scheduler: as `fedpdm.diffusion.sampling.make_scheduler`.
        num_steps: steps of the scheduler in all; T means every step.
        chain: one of `CHAINS`; with `noise_to_noise`, `num_steps` is shared between the two
            chains in the ratio T : t0.
        guidance: classifier-free guidance weight, 1 for none.
        coarse_share: float (K + 1,) in [0, 1], by label and at last for no label: above t0 the
            answer is this share of the coarse model's and the rest of the fine model's (which must
            know all t). Default: the coarse model's alone. `truncated` only.
        fine_labels: whether the fine model is told the labels below a coarse model.
        candidates: with class Gaussians, images drawn for each one that is kept
            (`fedpdm.diffusion.from_gaussians`).
        own_classes: with class Gaussians, labels that the fine model draws alone, from pure noise
            and with labels.
        batch_size: images that are drawn at a time.
        watch: told at each step of a chain how many images it denoised.

    Raises:
        ValueError: t0 or num_steps out of range, unknown chain, a share or no labels with a chain
            that is not `truncated`.
    """

    schedule: NoiseSchedule
    t0: int
    scheduler: str = "ddim"
    num_steps: int = 50
    chain: str = "truncated"
    guidance: float = 1.0
    coarse_share: Tensor | None = None
    fine_labels: bool = True
    candidates: int = 1
    own_classes: tuple[int, ...] = ()
    batch_size: int = 256
    watch: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        T = self.schedule.num_steps
        if not 0 <= self.t0 <= T:
            raise ValueError(f"t0 must be in [0, {T}], got {self.t0}")
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps must be at least 1, got {self.num_steps}")
        if self.candidates < 1:
            raise ValueError(f"sampling.candidates must be at least 1, got {self.candidates}")
        if self.chain not in CHAINS:
            raise ValueError(f"chain must be one of {', '.join(CHAINS)}, got {self.chain!r}")
        if self.coarse_share is not None and self.chain != "truncated":
            raise ValueError(f"coarse_share needs the chain truncated, got {self.chain!r}")
        if not self.fine_labels and self.chain != "truncated":
            raise ValueError(f"fine_labels: false needs the chain truncated, got {self.chain!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One chain: `denoiser` from level `start` down to 0 in `num_steps` steps.

    It draws images times `scale`: 1, but sqrt(abar_t0) for a chain of releases.
    """

    denoiser: DenoisingFunction
    start: int
    num_steps: int
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerOutput:
    """`images` are float32 (N, C, H, W) in the shifted scale of the models; `coarse` is the last
    clean-image estimate of the coarse model, same shape, None where no coarse step was taken."""

    images: Tensor
    coarse: Tensor | None


def hand_over(
    coarse: DenoisingFunction, fine: DenoisingFunction, settings: SamplerSettings
) -> DenoisingFunction:
    """The coarse model above t0, mixed with the fine one by `coarse_share`; below, the fine one,
    with labels or without."""
    share = settings.coarse_share
    above = coarse if share is None else Mixed(coarse, fine, share)
    return HandOver(above, _below(fine, settings), settings.t0)


def _below(fine: DenoisingFunction, settings: SamplerSettings) -> DenoisingFunction:
    """The fine model as it is asked below a coarse one."""
    return fine if settings.fine_labels else Unlabelled(fine)


def as_asked(
    coarse: DenoisingFunction | None, fine: DenoisingFunction | None, settings: SamplerSettings
) -> tuple[DenoisingFunction | None, DenoisingFunction | None]:
    """Both models under guidance, the fine one's clipped flag unset."""
    return (
        None if coarse is None else Guided(coarse, settings.guidance),
        None if fine is None else Guided(Unclipped(fine), settings.guidance),
    )


def stages(
    coarse: DenoisingFunction | None, fine: DenoisingFunction | None, settings: SamplerSettings
) -> tuple[Stage, ...]:
    """The chains to run one after the other, of models `as_asked`.

    `ValueError` without any model.
    """
    T, t0, num_steps = settings.schedule.num_steps, settings.t0, settings.num_steps
    if coarse is None:
        if fine is None:
            raise ValueError("sample needs a coarse or a fine denoiser")
        return (Stage(denoiser=fine, start=T, num_steps=num_steps),)
    if settings.chain == "truncated":
        denoiser = coarse if fine is None else hand_over(coarse, fine, settings)
        return (Stage(denoiser=denoiser, start=T, num_steps=num_steps),)
    steps = T if num_steps >= T + t0 else max(1, round(num_steps * T / (T + t0)))
    scale = settings.schedule.alpha_bar(t0) ** 0.5
    releases = Stage(denoiser=coarse, start=T, num_steps=steps, scale=scale)
    if fine is None or t0 == 0:
        return (releases,)
    return releases, Stage(denoiser=fine, start=t0, num_steps=max(1, num_steps - steps))


def run_stages(
    chains: Sequence[Stage],
    x: Tensor,
    settings: SamplerSettings,
    *,
    labels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """One chain after the other, each from where the one before it ended."""
    for stage in chains:
        x = sample(
            _watched(stage.denoiser, settings.watch),
            x,
            labels=labels,
            schedule=settings.schedule,
            generator=generator,
            t=stage.start,
            scheduler=settings.scheduler,
            num_steps=stage.num_steps,
        )
    return x


def _watched(denoiser: DenoisingFunction, watch: Callable[[int], None] | None) -> DenoisingFunction:
    return Watched(denoiser, lambda x_t, t, x0_hat: watch(len(x_t))) if watch else denoiser


def steps_of(chains: Sequence[Stage], settings: SamplerSettings) -> int:
    """Steps that `run_stages` takes for an image."""
    options = {"scheduler": settings.scheduler}
    return sum(
        chain_length(settings.schedule, t=each.start, num_steps=each.num_steps, **options)
        for each in chains
    )


def sample_two_stage(
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    x_T: Tensor,
    settings: SamplerSettings,
    *,
    labels: Tensor,
    generator: torch.Generator,
) -> SamplerOutput:
    """Sample with `coarse` above t0 and `fine` at and below it.

    Args:
        coarse: x0 denoiser for t > t0; None: `fine` alone at all t (training alone).
        fine: x0 denoiser for t <= t0; None: the coarse model continues (the global attacker).
        x_T: float32 (N, C, H, W), pure noise.
        labels: int (N,), `NO_LABEL` for unconditional.

    Raises:
        ValueError: no denoiser at all, or an unknown scheduler.
    """
    above, below = as_asked(coarse, fine, settings)
    last: deque[Tensor] = deque(maxlen=1)
    if above is not None:
        above = Watched(above, lambda x_t, t, x0_hat: last.append(x0_hat))
    chains = stages(above, below, settings)
    images = run_stages(chains, x_T, settings, labels=labels, generator=generator)
    return SamplerOutput(images=images, coarse=last[0] / chains[0].scale if last else None)


def sample_in_batches(
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    settings: SamplerSettings,
    *,
    image_shape: tuple[int, int, int],
    labels: Tensor,
    generator: torch.Generator,
) -> SamplerOutput:
    """`sample_two_stage` for any number of labels (int (N,)), in batches, from fresh noise.

    `image_shape` is (C, H, W).
    """
    outputs = []
    for part in labels.split(settings.batch_size):
        x_T = torch.randn((len(part), *image_shape), generator=generator, device=labels.device)
        outputs.append(
            sample_two_stage(coarse, fine, x_T, settings, labels=part, generator=generator)
        )
    estimates = [output.coarse for output in outputs if output.coarse is not None]
    return SamplerOutput(
        images=torch.cat([output.images for output in outputs]),
        coarse=torch.cat(estimates) if estimates else None,
    )


def refining(fine: DenoisingFunction | None, settings: SamplerSettings, *, t: int) -> Stage:
    """The chain of the fine model alone, of one `as_asked`, from level t on: with labels or without
    as below a coarse model."""
    if fine is None:
        raise ValueError("refining needs a fine denoiser")
    return Stage(denoiser=_below(fine, settings), start=t, num_steps=settings.num_steps)


def refine(
    fine: DenoisingFunction,
    x_t: Tensor,
    settings: SamplerSettings,
    *,
    t: int,
    labels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The fine stage by itself: x_t float32 (N, C, H, W) at level t in [0, T] down to 0, told the
    labels as below a coarse model.

    Of noised real images this is what the fine stage makes of a perfect coarse model's samples.
    """
    _, below = as_asked(None, fine, settings)
    stage = refining(below, settings, t=t)
    return run_stages([stage], x_t, settings, labels=labels, generator=generator)
