"""How a coarse and a fine denoiser draw images together: which is asked, at which level, and how.

`PFDMPipeline` (`pipeline.py`) is made of this. An export carries copies of both files, so this one
imports diffusers and torch alone, and repeats two formulas of `fedpdm`; a test holds both copies
together by asking `fedpdm.diffusion.twostage.sample_two_stage` for the same images:

* network output F to clean image (`fedpdm.diffusion.denoisers`; DDPM Eq. 15; Salimans and Ho
  2022, app. D), with a = sqrt(abar_t), s = sqrt(1 - abar_t):
      sample: x0_hat = F     epsilon: x0_hat = (x_t - s F) / a     v: x0_hat = a x_t - s F
* which denoiser is asked at which level, in both chains (`fedpdm.diffusion.twostage`).

`t` counts noising steps that were applied, 0 is clean; diffusers' timestep k is t = k + 1.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["METHODS", "NO_LABEL", "TwoStageSampling"]

METHODS = ("pfdm", "alone", "coarse")
NO_LABEL = -1
READ_AT = 0.15  # of T: where the classes of candidates are read


class TwoStageSampling:
    """What a pipeline of both denoisers does from noise to x_0.

    The pipeline has the networks, `scheduler`, `gaussians` and `config` that `PFDMPipeline` says,
    `betas` float64 (T,) and `_alphas_cumprod` float64 (T + 1,), which begins with 1.
    """

    betas: np.ndarray
    coarse_unet: Any
    config: Any
    gaussians: Any
    scheduler: Any
    progress_bar: Any
    _alphas_cumprod: np.ndarray
    _execution_device: torch.device

    @torch.no_grad()
    def generate(
        self,
        x_T: torch.Tensor,
        labels: int | Sequence[int] | torch.Tensor,
        *,
        num_inference_steps: int = 25,
        generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
        method: str = "pfdm",
        start: int | None = None,
    ) -> torch.Tensor:
        """As a call, from given noise: float32 (N, C, H, W) to x_0 of that shape in model scale.

        The same as `fedpdm.diffusion.twostage.sample_two_stage` for the same `x_T` and `generator`;
        with `start`, in [0, t0], as `fedpdm.diffusion.twostage.refine` from that level. With
        noise_to_noise, method "coarse" gives noisy images: the coarse model's own data. With
        `gaussians` and no coarse network only the fine model can go on from given noise.
        """
        index = self._check_labels(labels).to(x_T.device)
        guidance = self._check_options(method, num_inference_steps, guidance_scale)
        stages = [
            (*self._new_scheduler(num_betas, num_steps), floor)
            for num_betas, num_steps, floor in self._stages(method, num_inference_steps, start)
        ]
        x = x_T
        with self.progress_bar(total=sum(len(s.timesteps) for s, _, _ in stages)) as bar:
            for scheduler, prediction, floor in stages:
                takes_generator = "generator" in inspect.signature(scheduler.step).parameters
                extra = {"generator": generator} if takes_generator else {}
                # Schedulers in noise-to-signal units (Euler and its kind) hold x_t / sqrt(abar_t).
                x = x / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0]).item()
                for timestep in scheduler.timesteps:
                    x_t = scheduler.scale_model_input(x, timestep)
                    level = round(float(timestep)) + 1
                    answer = self._answer(x_t, level, index, guidance, method, floor)
                    if prediction == "epsilon":
                        abar = float(self._alphas_cumprod[level])
                        answer = (x_t - abar**0.5 * answer) / (1.0 - abar) ** 0.5
                    x = scheduler.step(answer, timestep, x, **extra).prev_sample
                    bar.update()
        return x

    def _from_gaussians(
        self,
        labels: int | Sequence[int] | torch.Tensor,
        shape: tuple[int, int, int, int],
        *,
        num_inference_steps: int,
        generator: torch.Generator | None,
        guidance_scale: float | None,
        method: str,
    ) -> torch.Tensor:
        """As a call, in model scale: draws, noised to t0 and refined, the best of `candidates`;
        with a coarse network noised to its highest level, from which both go down.

        The same as `fedpdm.diffusion.from_gaussians.sample_from_gaussians` for one batch: labels of
        `own_classes` from the fine model alone, then the others.
        """
        self._check_options(method, num_inference_steps, guidance_scale)
        asked = self._check_labels(labels, indexed=False)
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "generator": generator,
            "guidance_scale": guidance_scale,
        }
        own = torch.isin(asked, asked.new_tensor(self.config["own_classes"] or []))
        if method == "pfdm" and bool(own.any()):
            x_T = self._noise((int(own.sum()), *shape[1:]), generator)
            alone = self.generate(x_T, asked[own], method="alone", **options)
            images = alone.new_empty((len(asked), *shape[1:]))
            images[own] = alone
            if not bool(own.all()):
                images[~own] = self._from_gaussians(asked[~own], shape, method=method, **options)
            return images
        count = self.config["candidates"] if method == "pfdm" else 1
        wanted = asked.repeat_interleave(count)
        shape = (len(wanted), *shape[1:])
        x_0: torch.Tensor = self.gaussians.draw(wanted, generator).view(shape)
        if method == "coarse" and self.coarse_unet is None:
            return x_0
        first = self.config["t0"] if self.coarse_unet is None else self.config["coarse_levels"][1]
        x = self._noised(x_0, self._noise(shape, generator), first)
        images = self.generate(x, wanted, start=first, method=method, **options)
        abar = float(self._alphas_cumprod[max(1, round(READ_AT * len(self.betas)))])
        found = self.gaussians.log_posterior(images.flatten(1), wanted, abar).view(-1, count)
        best = torch.where(found.isnan().any(dim=1), 0, found.argmax(dim=1))
        return images[torch.arange(len(asked), device=best.device) * count + best]

    def _check_options(self, method: str, num_steps: int, guidance: float | None) -> float:
        """The guidance to use."""
        used: float = self.config["guidance_scale"] if guidance is None else guidance
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if num_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}")
        if not (math.isfinite(used) and used >= 0.0):
            raise ValueError(f"guidance_scale must be finite and at least 0, got {used}")
        return used

    def _check_labels(
        self, labels: int | Sequence[int] | torch.Tensor, *, indexed: bool = True
    ) -> torch.Tensor:
        """Index into the class embeddings (or the labels), int64 (N,) on the pipeline's device."""
        index = torch.as_tensor(labels, device=self._execution_device)
        index = index.view(-1) if index.ndim == 0 else index
        if index.ndim != 1 or len(index) == 0 or index.is_floating_point():
            raise ValueError("labels must be a whole number or a non-empty list of whole numbers")
        num_classes = self.config["num_classes"]
        outside = index[(index < NO_LABEL) | (index >= num_classes)]
        if len(outside):
            raise ValueError(
                f"labels must be in [0, {num_classes - 1}], or {NO_LABEL} for no label, "
                f"got {int(outside[0])}"
            )
        if not indexed:
            return index.long()
        return torch.where(index == NO_LABEL, num_classes, index.long())

    def _noise(
        self, shape: tuple[int, int, int, int], generator: torch.Generator | None
    ) -> torch.Tensor:
        device = self._execution_device
        noise: torch.Tensor = randn_tensor(
            shape, generator=generator, device=device, dtype=torch.float32
        )
        return noise

    def _noised(self, x_0: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
        abar = float(self._alphas_cumprod[t])
        return abar**0.5 * x_0 + (1.0 - abar) ** 0.5 * noise

    def _stages(self, method: str, num_steps: int, start: int | None) -> list[tuple[int, int, int]]:
        """Chains to run, as (number of betas, steps, level above which the coarse model acts).

        They begin at level `start`, None meaning pure noise.
        """
        T, t0 = len(self.betas), self.config["t0"]
        first = T if start is None else start
        if method == "alone":
            if (trained := self.config["fine_t_max"]) < first:
                raise ValueError(
                    "method alone needs a fine model that was trained at every t; this one was "
                    f"trained at t <= {trained} of {T}"
                )
            return [(first, num_steps, T)] if first else []
        fine_only = start is not None and method == "pfdm" and start <= t0
        if self.coarse_unet is None and not fine_only:
            raise ValueError(
                f"with class Gaussians given images and noise are refined by the fine model alone: "
                f"method pfdm and at most t0 = {t0} of {T} steps of noise, got {method} and {first}"
            )
        if self.config["chain"] == "truncated" or fine_only:
            return [(first, num_steps, t0 if method == "pfdm" else 0)] if first else []
        if start is not None:
            raise ValueError(
                f"with noise_to_noise an image can be refined by the fine model alone: method pfdm "
                f"and strength at most t0 / T = {t0 / T:g}, got {method} and {start / T:g}"
            )
        coarse_steps = T if num_steps >= T + t0 else max(1, round(num_steps * (T / (T + t0))))
        stages = [(T, coarse_steps, 0)]
        if method == "pfdm" and t0 > 0:
            stages.append((t0, max(1, num_steps - coarse_steps), t0))
        return stages

    def _new_scheduler(self, num_betas: int, num_steps: int) -> tuple[Any, str]:
        """The scheduler on the first `num_betas` betas, with timesteps set, and what it is fed.

        It is fed x0_hat ("sample") where it takes that, else "epsilon". Clipping of x0_hat to
        [-1, 1], the default of some classes, is off: the models' scale is shifted.
        """
        scheduler_class, config = type(self.scheduler), self.scheduler.config
        name = scheduler_class.__name__
        if "trained_betas" not in inspect.signature(scheduler_class).parameters:
            raise ValueError(f"scheduler: {name} is not defined on betas, so it cannot run here")
        fixed = {"trained_betas": self.betas[:num_betas].tolist(), "num_train_timesteps": num_betas}
        if "clip_sample" in config:
            fixed["clip_sample"] = False
        reason = ""
        for prediction in ("sample", "epsilon"):
            scheduler = scheduler_class.from_config(config, prediction_type=prediction, **fixed)
            scheduler.set_timesteps(min(num_steps, num_betas))
            probe, first = torch.zeros(1, 1, 1, 1), scheduler.timesteps[0]
            try:
                with torch.random.fork_rng(devices=[]):  # the step may draw noise
                    scheduler.step(scheduler.scale_model_input(probe, first), first, probe)
            # What a diffusers scheduler raises for a kind of prediction that it does not take.
            except (NotImplementedError, ValueError) as error:
                reason = " ".join(str(error).split())
            else:
                scheduler.set_timesteps(min(num_steps, num_betas))
                return scheduler, prediction
        raise ValueError(f"scheduler: {name} cannot run here: {reason}")

    def _answer(
        self,
        x_t: torch.Tensor,
        t: int,
        index: torch.Tensor,
        guidance: float,
        method: str,
        floor: int,
    ) -> torch.Tensor:
        """x0_hat: above `floor` the coarse model's, mixed by `coarse_share`; else the fine's, which
        is told the labels if `fine_labels` says so."""
        if method == "pfdm" and t <= floor and not self.config["fine_labels"]:
            index = torch.full_like(index, self.config["num_classes"])
        answer = self._guided(x_t, t, index, guidance, use_coarse=t > floor)
        shares = self.config["coarse_share"]
        if method != "pfdm" or t <= floor or shares is None:
            return answer
        share = torch.tensor(shares, device=x_t.device)[index].view(-1, 1, 1, 1)
        fine = self._guided(x_t, t, index, guidance, use_coarse=False)
        return torch.lerp(fine, answer, share)

    def _guided(
        self, x_t: torch.Tensor, t: int, index: torch.Tensor, guidance: float, *, use_coarse: bool
    ) -> torch.Tensor:
        """x0_hat under classifier-free guidance: null + guidance (conditional - null)."""
        if guidance == 1.0:
            return self._denoise(x_t, t, index, use_coarse=use_coarse)
        null = torch.full_like(index, self.config["num_classes"])
        both = self._denoise(
            torch.cat([x_t, x_t]), t, torch.cat([index, null]), use_coarse=use_coarse
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _denoise(
        self, x_t: torch.Tensor, t: int, index: torch.Tensor, *, use_coarse: bool
    ) -> torch.Tensor:
        """x0_hat float32 (N, C, H, W); `index` int64 (N,) into the class embeddings."""
        low, high = self.config["coarse_levels"] or (1, len(self.betas))
        if use_coarse and not low <= t <= high:
            abar = float(self._alphas_cumprod[t])
            expected: torch.Tensor = self.gaussians.expected(x_t.flatten(1), index, abar)
            return expected.view(x_t.shape)
        role = "coarse" if use_coarse else "fine"
        unet, prediction = getattr(self, f"{role}_unet"), self.config[f"{role}_prediction"]
        patch = self.config[f"{role}_patch"]
        pad = unet.config["sample_size"] * patch - self.config["resolution"]
        x_in = torch.nn.functional.pad(x_t, (0, pad, 0, pad)) if pad else x_t
        x_in = torch.nn.functional.pixel_unshuffle(x_in, patch)
        timesteps = torch.full((len(x_t),), t - 1, device=x_t.device)
        raw = unet(x_in.to(unet.dtype), timesteps, class_labels=index).sample
        raw = torch.nn.functional.pixel_shuffle(raw, patch)
        raw = raw[..., : self.config["resolution"], : self.config["resolution"]].float()
        if prediction == "sample":
            return raw
        abar = float(self._alphas_cumprod[t])
        signal, other = abar**0.5, (1.0 - abar) ** 0.5 * raw
        return (x_t - other) / signal if prediction == "epsilon" else signal * x_t - other
