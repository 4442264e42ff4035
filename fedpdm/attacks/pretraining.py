"""The attacker's own model: a denoiser trained on a public set that looks like the private one.

Fashion-MNIST against MNIST, say. The attacker knows the release's parameters, so the images are
shifted and clipped as the client's are, and noise levels are drawn from [1, t0]. Labels are not
used: the classes of the public set are others.
"""

from __future__ import annotations

import numpy as np
import torch

from fedpdm.attacks.membership.targets import AttackTarget
from fedpdm.data import ImageSet, normalize
from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser, DenoiserSpec
from fedpdm.diffusion.objectives import denoising_loss
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.diffusion.training import OptimizerSettings, Progress, Trainer, TrainReport
from fedpdm.diffusion.weights import load_named
from fedpdm.privacy.mechanism import clip_l2
from fedpdm.privacy.types import ReleaseParameters

__all__ = ["pretrain"]


def pretrain(
    images: ImageSet,
    spec: DenoiserSpec,
    parameters: ReleaseParameters,
    *,
    schedule: NoiseSchedule,
    settings: OptimizerSettings,
    generator: torch.Generator,
    device: torch.device,
    weighting: str = "v",
    progress: Progress | None = None,
) -> tuple[AttackTarget, TrainReport]:
    """Train for `settings.total_steps` steps; the target has the EMA weights.

    Args:
        images: public, of the spec's resolution and channels.
        spec: architecture; its number of classes is not used.
        parameters: of the release that is to be attacked.
        schedule: the release's.
        generator: on `device`; drives the initial weights, batches, levels and noise.

    Returns:
        (target, report); the target answers with clipped images, for t in [1, t0].

    Raises:
        ValueError: for images of another size, or a schedule that is not the release's.
        FloatingPointError: as `Trainer.train`.
    """
    shape = (spec.channels, spec.resolution, spec.resolution)
    if images.images.shape[1:] != shape:
        raise ValueError(f"images must be of shape {shape}, got {images.images.shape[1:]}")
    abar = schedule.alpha_bar(parameters.t0)
    if not np.isclose(abar, parameters.alpha_bar, rtol=1e-9):
        raise ValueError(
            f"schedule must have alpha_bar {parameters.alpha_bar:g} at t0, the release's, "
            f"got {abar:g}"
        )
    with torch.random.fork_rng(devices=[]):
        seed = torch.randint(2**62, (1,), generator=generator, device=device)
        torch.manual_seed(int(seed))
        denoiser = Denoiser(spec, schedule)
    trainer = Trainer(denoiser, settings, device=device)
    pixels = torch.tensor(images.images, device=device)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x_0 = normalize(pixels[indices], shift=parameters.shift)
        return denoising_loss(
            trainer.model,
            schedule,
            clip_l2(x_0, clip_norm=parameters.clip_norm),
            labels=torch.full((len(indices),), NO_LABEL, device=device),
            t_max=parameters.t0,
            weighting=weighting,
            generator=generator,
        )

    report = trainer.train(
        loss,
        sample_weights=torch.ones(len(images), dtype=torch.float64),
        num_steps=settings.total_steps,
        generator=generator,
        progress=progress,
        what="pretrained attacker",
    )
    load_named(trainer.weights(), trainer.ema(), what="EMA weights")
    model = trainer.model.eval()
    target = AttackTarget(
        denoiser=model,
        schedule=schedule,
        t_range=(1, parameters.t0),
        parameters=tuple(model.network.parameters()),
        labels_known=False,
        device=device,
    )
    return target, report
