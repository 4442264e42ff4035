"""A run's models as targets: coarse, fine, both in one chain, or a baseline's shared model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.membership import AttackTarget
from fedpdm.data import normalize
from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser, DenoisingFunction
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.evaluation.synthesis import Synthesizer
from fedpdm.privacy.mechanism import clip_l2

__all__ = ["CombinedDenoiser", "ModelTarget", "reconstructor_of", "run_targets"]


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


class CombinedDenoiser:
    """The coarse model above t0, mixed as the client samples, and the fine one at and below it.

    A noise-to-noise coarse model estimates x_tilde. With r = abar_t / abar_t0, x_t is level s of
    its own chain, abar_s = r, and by docs/method.md section 3

        E[x_tilde | x_t] = A x0_hat + B x_t,  A = sqrt(abar_t0)(1 - r)/(1 - abar_t),
                                              B = sqrt(r)(1 - abar_t0)/(1 - abar_t),

    which is solved for x0_hat, at the level whose abar is nearest to r.
    """

    def __init__(
        self,
        coarse: DenoisingFunction,
        fine: DenoisingFunction,
        *,
        schedule: NoiseSchedule,
        t0: int,
        noise_to_noise: bool,
        share: torch.Tensor | None = None,
    ) -> None:
        self.coarse, self.fine, self.schedule = coarse, fine, schedule
        self.t0, self.noise_to_noise, self.share = t0, noise_to_noise, share

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape; t int (B,) in [1, T]."""
        above = t > self.t0
        if not bool(above.any()):
            return self._below(x_t, t, labels, clipped)
        if bool(above.all()):
            return self._above(x_t, t, labels, clipped)
        x0_hat = torch.empty_like(x_t)
        for part, ask in ((above, self._above), (~above, self._below)):
            flag = None if clipped is None else clipped[part]
            x0_hat[part] = ask(x_t[part], t[part], labels[part], flag)
        return x0_hat

    def _below(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        clipped: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.fine(x_t, t, labels=labels, clipped=clipped)

    def _above(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        clipped: torch.Tensor | None,
    ) -> torch.Tensor:
        answer = self._coarse(x_t, t, labels)
        if self.share is None:
            return answer
        place = torch.where(labels == NO_LABEL, len(self.share) - 1, labels)
        share = self.share.to(x_t)[place].view(-1, *[1] * (x_t.ndim - 1))
        return torch.lerp(self.fine(x_t, t, labels=labels, clipped=clipped), answer, share)

    def _coarse(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not self.noise_to_noise:
            return self.coarse(x_t, t, labels=labels)
        abar_t0 = self.schedule.alpha_bar(self.t0)
        abar = self.schedule.gather(t, x_t)
        r = abar / abar_t0
        table = self.schedule.alphas_cumprod[1:]
        level = 1 + np.abs(table[None, :] - r.flatten().cpu().numpy()[:, None]).argmin(axis=1)
        answer = self.coarse(x_t, torch.from_numpy(level).to(t), labels=labels)
        a = abar_t0**0.5 * (1.0 - r) / (1.0 - abar)
        b = r.sqrt() * (1.0 - abar_t0) / (1.0 - abar)
        return (answer - b.to(x_t.dtype) * x_t) / a.to(x_t.dtype)


def run_targets(opened: Synthesizer) -> dict[str, ModelTarget]:
    """What there is to attack of one client of a run, by name: coarse, fine, combined, shared."""
    config, schedule = opened.config, opened.options["schedule"]
    t0, T = int(opened.options["t0"]), opened.options["schedule"].num_steps
    clip_norm, two_chains = config.privacy.clip_norm, opened.options["chain"] == "noise_to_noise"
    found: dict[str, ModelTarget] = {}

    def add(
        name: str, denoiser: DenoisingFunction, t_range: tuple[int, int], **extra: float
    ) -> None:
        models = (opened.coarse, opened.fine) if name == "combined" else (denoiser,)
        parameters = [p for m in models if isinstance(m, Denoiser) for p in m.network.parameters()]
        target = AttackTarget(
            denoiser=denoiser,
            schedule=schedule,
            t_range=t_range,
            parameters=tuple(parameters),
            device=opened.device,
        )
        found[name] = ModelTarget(name=name, target=target, shift=opened.shift, **extra)

    if opened.coarse is not None and not config.kind.releases:
        add("shared", opened.coarse, (1, T))
        return found
    if opened.coarse is not None and two_chains:
        scale = schedule.alpha_bar(t0) ** 0.5
        add("coarse", opened.coarse, (1, T), clip_norm=clip_norm, scale=scale)
    elif opened.coarse is not None:
        add("coarse", opened.coarse, (t0 + 1, T), clip_norm=clip_norm)
    if opened.fine is not None:
        add("fine", opened.fine, (1, T if config.fine.t_range == "all" else t0))
    if opened.coarse is not None and opened.fine is not None:
        both = CombinedDenoiser(
            opened.coarse,
            opened.fine,
            schedule=schedule,
            t0=t0,
            noise_to_noise=two_chains,
            share=opened.options["coarse_share"],
        )
        add("combined", both, (1, T))
    return found


def reconstructor_of(name: str, opened: Synthesizer, role: str) -> Reconstructor:
    """A model of a run as an attacker of uploads; `role` coarse or fine."""
    target = run_targets(opened)[role].target
    if role == "coarse":
        two_chains = opened.options["chain"] == "noise_to_noise"
        return Reconstructor(name=name, target=target, noise_to_noise=two_chains)
    flagged = opened.config.fine.clipped_fraction > 0
    return Reconstructor(
        name=name, target=target, clipped=True if flagged else None, answers_clipped=flagged
    )
