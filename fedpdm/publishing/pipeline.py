"""A diffusers pipeline for a coarse and a fine denoiser: noise, coarse to t0, fine to 0.

The coarse one is a U-Net, or Gaussians of classes (`gaussians`): then an image begins with a draw,
noised to t0, and of several candidates the one is kept whose class the Gaussians find likeliest.

An export (`fedpdm.publishing.export`) carries a copy of this file as `pipeline.py`, so that whoever
has diffusers can load the models without this project. The file therefore imports diffusers, numpy
and torch alone, and repeats two formulas of `fedpdm`; a test holds both copies together by asking
`fedpdm.diffusion.twostage.sample_two_stage` for the same images:

* network output F to clean image (`fedpdm.diffusion.denoisers`; DDPM Eq. 15; Salimans and Ho
  2022, app. D), with a = sqrt(abar_t), s = sqrt(1 - abar_t):
      sample: x0_hat = F     epsilon: x0_hat = (x_t - s F) / a     v: x0_hat = a x_t - s F
* which denoiser is asked at which level, in both chains (`fedpdm.diffusion.twostage`).

`t` counts noising steps that were applied, 0 is clean; diffusers' timestep k is t = k + 1.
Models see x = pixel / 127.5 - 1 - shift for pixels 0..255.

Given images are refined as by diffusers' image-to-image pipelines (SDEdit, Meng et al. 2022):
noised to level t = round(strength T) by DDPM Eq. 4 and taken down from there, which at and below t0
is the fine model's work alone.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

__all__ = ["METHODS", "PFDMPipeline"]

METHODS = ("pfdm", "alone", "coarse")
NO_LABEL = -1
READ_AT = 0.15  # of T: where the classes of candidates are read


def _side(coarse: Any, coarse_patch: int, fine: Any, fine_patch: int) -> int:
    """Pixels per side of what the U-Nets take: the coarse one's where there is one."""
    unet, patch = (fine, fine_patch) if coarse is None else (coarse, coarse_patch)
    side: int = unet.config["sample_size"] * patch
    return side


class PFDMPipeline(DiffusionPipeline):
    """Two-stage, class-conditional sampling of one client's personalised model.

    Args:
        coarse_unet: shared denoiser, K + 1 class embeddings (the last means "no label"); None with
            `gaussians`.
        fine_unet: one client's denoiser, at least K + 1 class embeddings in the same order.
        scheduler: any diffusers scheduler on betas; its `trained_betas` are the chain that the
            models were trained on. To swap another in, give its class this one's config:
            `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`.
        t0: hand-over, in noising steps, in [0, T].
        chain: "truncated" (one chain) or "noise_to_noise" (T coarse steps, then t0 fine ones).
        coarse_prediction: what the network's output means: "sample", "epsilon" or "v".
        fine_prediction: as `coarse_prediction`.
        num_classes: K.
        resolution: pixels per side; default the U-Nets' (they may be padded to their stride).
        coarse_patch: the network sees p x p pixels as one with p^2 times the channels.
        fine_patch: as `coarse_patch`.
        shift: public background level in [-1, 1] that the models' scale is centred on.
        guidance_scale: default classifier-free guidance weight, 1 for none.
        fine_t_max: the fine model was trained at t in [1, fine_t_max]; default T.
        coarse_share: K + 1 numbers in [0, 1], by label and at last for no label: above t0 the
            answer is this share of the coarse model's and the rest of the fine model's. Default:
            the coarse model's alone. "truncated" only, with a fine model for every t.
        id2label: class names by label (as text: JSON has no other keys), if they are known.
        gaussians: the shared model where it is Gaussians of classes (`GaussianClasses`). Then the
            chain is "truncated", without `coarse_share`.
        fine_labels: whether the fine model is told the labels at and below t0.
        candidates: with `gaussians`, images that are drawn for each one that is kept.

    `betas` is the models' chain, float64 (T,).

    Raises:
        ValueError: if an argument is out of range, or `scheduler` has no `trained_betas`.
    """

    _optional_components = ["coarse_unet", "gaussians"]  # noqa: RUF012 (as diffusers declares it)

    def __init__(
        self,
        coarse_unet: UNet2DModel | None,
        fine_unet: UNet2DModel,
        scheduler: Any,
        t0: int = 0,
        chain: str = "truncated",
        coarse_prediction: str = "sample",
        fine_prediction: str = "sample",
        num_classes: int = 1,
        resolution: int | None = None,
        coarse_patch: int = 1,
        fine_patch: int = 1,
        shift: float = 0.0,
        guidance_scale: float = 1.0,
        fine_t_max: int | None = None,
        coarse_share: list[float] | None = None,
        id2label: dict | None = None,
        gaussians: Any = None,
        fine_labels: bool = True,
        candidates: int = 1,
    ) -> None:
        super().__init__()
        betas = scheduler.config.get("trained_betas")
        if betas is None:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} has no trained_betas; make it with "
                "from_config from the exported scheduler's config"
            )
        self.betas = np.asarray(betas, dtype=np.float64)
        self._alphas_cumprod = np.concatenate([[1.0], np.cumprod(1.0 - self.betas)])
        if not 0 <= t0 <= len(self.betas):
            raise ValueError(f"t0 must be in [0, {len(self.betas)}], got {t0}")
        for name, value, choices in (
            ("chain", chain, ("truncated", "noise_to_noise")),
            ("coarse_prediction", coarse_prediction, ("sample", "epsilon", "v")),
            ("fine_prediction", fine_prediction, ("sample", "epsilon", "v")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if (coarse_unet is None) == (gaussians is None):
            raise ValueError("give coarse_unet or gaussians, one of them")
        if gaussians is not None and (chain != "truncated" or coarse_share is not None):
            raise ValueError(
                "gaussians need the chain truncated and no coarse_share, "
                f"got {chain!r} and {coarse_share}"
            )
        if candidates < 1 or (candidates > 1 and gaussians is None):
            raise ValueError(
                f"candidates must be at least 1, and 1 without gaussians, got {candidates}"
            )
        if coarse_share is not None:
            if len(coarse_share) != num_classes + 1 or not all(0 <= w <= 1 for w in coarse_share):
                raise ValueError(
                    f"coarse_share must be {num_classes + 1} numbers in [0, 1], got {coarse_share}"
                )
            if chain != "truncated" or (fine_t_max or len(self.betas)) < len(self.betas):
                raise ValueError(
                    "coarse_share needs the chain truncated and a fine model for every t, "
                    f"got {chain!r} and fine_t_max {fine_t_max}"
                )
        self.register_modules(
            coarse_unet=None if coarse_unet is None else coarse_unet.eval(),
            fine_unet=fine_unet.eval(),
            scheduler=scheduler,
            gaussians=gaussians,
        )
        self.register_to_config(
            t0=t0,
            chain=chain,
            coarse_prediction=coarse_prediction,
            fine_prediction=fine_prediction,
            num_classes=num_classes,
            resolution=resolution or _side(coarse_unet, coarse_patch, fine_unet, fine_patch),
            coarse_patch=coarse_patch,
            fine_patch=fine_patch,
            shift=shift,
            guidance_scale=guidance_scale,
            fine_t_max=len(self.betas) if fine_t_max is None else fine_t_max,
            coarse_share=coarse_share,
            id2label=id2label,
            fine_labels=fine_labels,
            candidates=candidates,
        )

    @torch.no_grad()
    def __call__(
        self,
        labels: int | Sequence[int] | torch.Tensor,
        *,
        num_inference_steps: int = 25,
        image: Any = None,
        strength: float | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
        method: str = "pfdm",
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image per label, or refine given ones.

        Args:
            labels: N labels in [0, K - 1]; -1 for no label.
            num_inference_steps: denoiser calls per image, at most T (T + t0 with
                noise_to_noise); second-order schedulers make more. Given images take the share
                `strength` of them.
            image: start from these N images (or one for all labels; one label does for all images):
                PIL images, float (N, H, W, C) array or float (N, C, H, W) tensor in [0, 1].
            strength: in [0, 1], how much noise they get: level round(strength T). 0 gives them
                back, 1 keeps next to nothing. Default t0 / T: what the fine model makes of them.
            generator: source of all randomness; on the CPU it gives the same images on any device.
            guidance_scale: classifier-free guidance weight >= 0; default the export's.
            method: "pfdm" (coarse above t0, fine below), or "alone" (fine) or "coarse" everywhere.
            output_type: "pil"; "np" for float32 (N, H, W, C) in [0, 1]; "pt" for float32
                (N, C, H, W) in [0, 1].

        Returns:
            `ImagePipelineOutput` with the N images in `images`.

        Raises:
            ValueError: if an argument is out of range, or the models gave NaN or infinity.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        resolution, start = self.config["resolution"], None
        channels = self.fine_unet.config["out_channels"] // self.config["fine_patch"] ** 2
        shape = (self._check_labels(labels).numel(), channels, resolution, resolution)
        given: torch.Tensor | None = None
        if image is not None:
            given, start = self._model_scale(image, shape), self._level(strength)
            if len(given) > 1 and shape[0] == 1:
                labels = self._check_labels(labels, indexed=False).repeat(len(given))
            shape = (max(shape[0], len(given)), *shape[1:])
            if num_inference_steps > 0:
                share = start / len(self.betas)
                num_inference_steps = max(1, round(num_inference_steps * share))
        elif strength is not None:
            raise ValueError(f"strength needs an image to start from, got {strength} and none")
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "generator": generator,
            "guidance_scale": guidance_scale,
            "method": method,
        }
        if self.gaussians is not None and given is None and method != "alone":
            x_0 = self._from_gaussians(labels, shape, **options)
        else:
            x = self._noise(shape, generator)
            if given is not None and start is not None:
                x = self._noised(given.to(x.device), x, start)
            x_0 = self.generate(x, labels, start=start, **options)
        if not bool(torch.isfinite(x_0).all()):
            raise ValueError("the models gave values that are not finite")
        pixels = ((x_0 + (1.0 + self.config["shift"])) * 127.5).clamp(0.0, 255.0).cpu()
        if output_type == "pt":
            return ImagePipelineOutput(images=pixels / 255.0)
        channels_last = pixels.permute(0, 2, 3, 1)
        if output_type == "np":
            return ImagePipelineOutput(images=(channels_last / 255.0).numpy())
        return ImagePipelineOutput(images=self.numpy_to_pil(channels_last.round().numpy() / 255.0))

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
        """As a call, in model scale: draws, noised to t0 and refined, the best of `candidates`.

        The same as `fedpdm.diffusion.from_gaussians.sample_from_gaussians` for one batch.
        """
        self._check_options(method, num_inference_steps, guidance_scale)
        asked = self._check_labels(labels, indexed=False)
        count = self.config["candidates"] if method == "pfdm" else 1
        wanted = asked.repeat_interleave(count)
        shape = (len(wanted), *shape[1:])
        x_0 = self.gaussians.draw(wanted, generator).view(shape)
        if method == "coarse":
            return x_0
        t0 = self.config["t0"]
        images = self.generate(
            self._noised(x_0, self._noise(shape, generator), t0),
            wanted,
            num_inference_steps=num_inference_steps,
            generator=generator,
            guidance_scale=guidance_scale,
            start=t0,
        )
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
        `gaussians` only the fine model can go on from given noise.
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
        if self.gaussians is not None and not fine_only:
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

    def _level(self, strength: float | None) -> int:
        """How many steps of noise a given image gets; default t0."""
        if strength is None:
            return int(self.config["t0"])
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        return round(strength * len(self.betas))

    def _model_scale(self, image: Any, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Given images as float32 (n, C, H, W) in the models' scale, n 1 or N or N = 1."""
        parts = list(image) if isinstance(image, (list, tuple)) else [image]
        if isinstance(image, torch.Tensor):
            pixels = image
        elif isinstance(image, np.ndarray):
            pixels = torch.from_numpy(np.moveaxis(image, -1, 1) if image.ndim == 4 else image)
        elif parts and all(isinstance(part, Image.Image) for part in parts):
            mode = "L" if shape[1] == 1 else "RGB"
            arrays = [np.asarray(part.convert(mode), dtype=np.float32) / 255.0 for part in parts]
            if len({array.shape for array in arrays}) > 1:
                raise ValueError("image: PIL images must be of one size")
            stacked = np.stack(arrays)
            pixels = torch.from_numpy(stacked.reshape(*stacked.shape[:3], shape[1]))
            pixels = pixels.permute(0, 3, 1, 2)
        else:
            raise ValueError("image must be PIL images, an array (N, H, W, C) or a tensor")
        if pixels.ndim != 4 or pixels.shape[1:] != shape[1:]:
            raise ValueError(
                f"image must be (N, C, H, W) with C, H, W = {shape[1:]}, got {tuple(pixels.shape)}"
            )
        if len(pixels) != shape[0] and 1 not in (len(pixels), shape[0]):
            raise ValueError(f"image: {len(pixels)} images for {shape[0]} labels")
        if not (pixels.is_floating_point() and bool(((pixels >= 0.0) & (pixels <= 1.0)).all())):
            raise ValueError("image: values must be floating point in [0, 1]")
        return pixels.float() * 2.0 - (1.0 + self.config["shift"])

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
