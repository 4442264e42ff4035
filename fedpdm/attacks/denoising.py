"""Attackers with a denoiser: what a model makes of an upload.

The coarse model ("global"), a denoiser trained on a public look-alike set ("pretrained"), another
client's fine model, the Bayes-optimal one; each in two ways:

* *one_shot*, its x0_hat at t0, which for a perfect denoiser has the least mean squared error;
* *continued*, deterministic sampling (DDIM) from x_tilde at t0 down to 0, which looks more like an
  image and lies farther from the original on average.

A truncated coarse model knows t > t0 only. It is asked at the nearest level it was trained for, of
the state with the noise up to there added: on its distribution, and at t0 + 1 next to no noise.
Below t0 this is the best it can do: its continuation sharpens, and gains no information.

A noise-to-noise coarse model has x_tilde as its clean image, so its x0_hat is no estimate of x.
Its one_shot uses what it knows of the score: with x_t at chain level t = t0 from x_tilde,

    score = (sqrt(abar_t) x0_hat - x_t) / (1 - abar_t),
    E[CLIP(x) | x_t] = (x_t + (1 - abar_t abar_t0) score) / sqrt(abar_t abar_t0)   (Tweedie),

and its continuation is the paper's: x_tilde taken for level t0 of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpdm.attacks.membership.targets import AttackTarget, noise_like
from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.sampling import sample
from fedpdm.diffusion.schedule import q_sample_from

__all__ = ["METHODS", "Reconstructor"]

METHODS = ("one_shot", "continued")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstructor:
    """An attacker with a denoiser.

    Attributes:
        name: such as "global" or "other client"; one per attack.
        target: the denoiser, its schedule (the release's), the levels it knows, and whether it is
            given labels. Unless `noise_to_noise`, its largest level must be at least t0.
        clipped: the clipped flag of a fine model, None for a model without one.
        answers_clipped: whether its answers are clipped images, to be multiplied by `unclip`:
            a coarse model's, a fine model's with the flag set, one trained on clipped images.
        noise_to_noise: whether it is a coarse model with x_tilde as its clean image.
    """

    name: str
    target: AttackTarget
    clipped: bool | None = None
    answers_clipped: bool = True
    noise_to_noise: bool = False

    def ask(
        self, x_t: torch.Tensor, t: int, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """x0_hat of level t, asked at the nearest level that the model knows; (B, *), int (B,)."""
        target = self.target
        level = target.nearest(t)
        if level < t:
            raise ValueError(
                f"{self.name}: t0 must be at most the largest level of the model, {level}, got {t}"
            )
        here = torch.full((len(x_t),), level, dtype=torch.int64, device=x_t.device)
        if level > t:
            noise = noise_like(x_t, generator=generator)
            x_t = q_sample_from(target.schedule, x_t, s=t, t=here, noise=noise)
        if not target.labels_known:
            labels = torch.full_like(labels, NO_LABEL)
        flag = None
        if self.clipped is not None:
            flag = torch.full((len(x_t),), self.clipped, device=x_t.device)
        return target.denoiser(x_t, here, labels=labels, clipped=flag)

    def one_shot(
        self, x_tilde: torch.Tensor, t0: int, labels: torch.Tensor, *, generator: torch.Generator
    ) -> torch.Tensor:
        """The clean image by one question; (B, *), int (B,) -> (B, *), on the target's device."""
        if not self.noise_to_noise:
            return self.ask(x_tilde, t0, labels, generator)
        level = self.target.nearest(t0)
        abar, abar_t0 = (self.target.schedule.alpha_bar(t) for t in (level, t0))
        noise = noise_like(x_tilde, generator=generator)
        x_t = self.target.at_level(x_tilde, level, noise)
        x0_hat = self.ask(x_t, level, labels, generator)
        score = (abar**0.5 * x0_hat - x_t) / (1.0 - abar)
        return (x_t + (1.0 - abar * abar_t0) * score) / (abar * abar_t0) ** 0.5

    def continued(
        self,
        x_tilde: torch.Tensor,
        t0: int,
        labels: torch.Tensor,
        *,
        generator: torch.Generator,
        scheduler: str = "ddim",
        num_steps: int = 50,
    ) -> torch.Tensor:
        """Sampling from x_tilde at t0 down to 0; shapes as in `one_shot`."""

        def denoiser(
            x_t: torch.Tensor,
            t: torch.Tensor,
            *,
            labels: torch.Tensor,
            clipped: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return self.ask(x_t, int(t[0]), labels, generator)

        return sample(
            denoiser,
            x_tilde,
            t=t0,
            schedule=self.target.schedule,
            labels=labels,
            generator=generator,
            scheduler=scheduler,
            num_steps=num_steps,
        )

    def reconstruct(
        self,
        x_tilde: torch.Tensor,
        t0: int,
        labels: torch.Tensor,
        *,
        method: str,
        generator: torch.Generator,
        scheduler: str = "ddim",
        num_steps: int = 50,
    ) -> torch.Tensor:
        """One of `METHODS` on the target's device; float32 on the CPU comes back."""
        x, y = x_tilde.to(self.target.device), labels.to(self.target.device)
        if method == "one_shot":
            return self.one_shot(x, t0, y, generator=generator).float().cpu()
        if method != "continued":
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return (
            self.continued(x, t0, y, generator=generator, scheduler=scheduler, num_steps=num_steps)
            .float()
            .cpu()
        )
