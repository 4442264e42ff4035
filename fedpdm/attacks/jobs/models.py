"""A run's models as targets: coarse, fine, both in one chain, or a baseline's shared model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.membership import AttackTarget
from fedpdm.data import normalize
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.combined import ImagesFromReleases
from fedpdm.diffusion.denoisers import Denoiser, DenoisingFunction
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import hand_over
from fedpdm.evaluation.synthesis import Synthesizer
from fedpdm.privacy.mechanism import clip_l2

__all__ = ["ModelTarget", "reconstructor_of", "run_targets"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTarget:
    """A target, and the scale of its images: pixels minus `shift`, clipped to `clip_norm` if given,
    times `scale`."""

    name: str
    target: AttackTarget
    shift: float
    clip_norm: float | None = None
    scale: float = 1.0

    def inputs(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (N, C, H, W) as float32, as the model saw (or best knows) them."""
        x_0 = normalize(images, shift=self.shift)
        if self.clip_norm is not None:
            x_0 = clip_l2(x_0, clip_norm=self.clip_norm)
        return x_0 * self.scale


def run_targets(opened: Synthesizer) -> dict[str, ModelTarget]:
    """The targets that a client of a run offers, by name: coarse, fine, combined, shared."""
    config, settings = opened.config, opened.settings
    schedule, t0, T = settings.schedule, settings.t0, settings.schedule.num_steps
    clip_norm, two_chains = config.privacy.clip_norm, settings.chain == "noise_to_noise"
    found: dict[str, ModelTarget] = {}
    network = opened.coarse if isinstance(opened.coarse, NetworkAboveGaussians) else None
    shared = opened.coarse if network is None else network.network

    def add(
        name: str, denoiser: DenoisingFunction, t_range: tuple[int, int], **extra: float
    ) -> None:
        models = (shared, opened.fine) if name == "combined" else (denoiser,)
        parameters = [p for m in models if isinstance(m, Denoiser) for p in m.network.parameters()]
        target = AttackTarget(
            denoiser=denoiser,
            schedule=schedule,
            t_range=t_range,
            parameters=tuple(parameters),
            device=opened.device,
        )
        found[name] = ModelTarget(name=name, target=target, shift=opened.spec.shift, **extra)

    if opened.coarse is not None and not config.kind.releases:
        add("shared", opened.coarse, (1, T))
        return found
    if opened.coarse is not None and two_chains:
        scale = schedule.alpha_bar(t0) ** 0.5
        add("coarse", opened.coarse, (1, T), clip_norm=clip_norm, scale=scale)
    elif network is not None:  # trained on whole images
        add("coarse", network.network, (network.lowest, network.highest))
    elif opened.coarse is not None:
        lowest = 1 if isinstance(opened.coarse, GaussianDenoiser) else t0 + 1  # it answers anywhere
        add("coarse", opened.coarse, (lowest, T), clip_norm=clip_norm)
    if opened.fine is not None:
        add("fine", opened.fine, (1, T if config.fine.t_range == "all" else t0))
    if opened.coarse is not None and opened.fine is not None:
        above: DenoisingFunction = opened.coarse
        if two_chains:
            above = ImagesFromReleases(opened.coarse, schedule, t0)
        add("combined", hand_over(above, opened.fine, settings), (1, T))
    return found


def reconstructor_of(
    name: str, opened: Synthesizer, role: str, *, t0: int | None = None
) -> Reconstructor:
    """A model of a run as an attacker of uploads; `role` coarse or fine. A fine model that does not
    know the uploads' `t0` takes over from the coarse one, as its client samples."""
    targets = run_targets(opened)
    target = targets[role].target
    if role == "coarse" and isinstance(opened.coarse, NetworkAboveGaussians):
        levels = (1, target.schedule.num_steps)  # beside its network the Gaussians answer
        target = replace(target, denoiser=opened.coarse, t_range=levels)
    if t0 is not None and target.t_range[1] < t0:
        return Reconstructor(name=name, target=targets["combined"].target, answers_clipped=False)
    if role == "coarse":
        two_chains = opened.settings.chain == "noise_to_noise"
        return Reconstructor(name=name, target=target, noise_to_noise=two_chains)
    flagged = opened.config.fine.clipped_fraction > 0
    return Reconstructor(
        name=name, target=target, clipped=True if flagged else None, answers_clipped=flagged
    )
