"""A diffusers pipeline for a coarse and a fine denoiser: noise, coarse to t0, fine to 0.

The coarse one is a U-Net, or Gaussians of classes (`gaussians`): then an image begins with a draw,
noised to t0, and of several candidates the one is kept whose class the Gaussians find likeliest.
Or it is both: then the draw is noised to the highest of `coarse_levels`, the levels at which the
U-Net answers, and goes down from there; candidates are chosen as before.

An export (`fedpdm.publishing.export`) carries a copy of this file as `pipeline.py` and one of
`pfdm_sampling.py`, which has the sampler, so that whoever has diffusers can load the models without
this project. Both therefore import diffusers, numpy and torch alone, and each other by `.`.

Models see x = pixel / 127.5 - 1 - shift for pixels 0..255.

Given images are refined as by diffusers' image-to-image pipelines (SDEdit, Meng et al. 2022):
noised to level t = round(strength T) by DDPM Eq. 4 and taken down from there, which at and below t0
is the fine model's work alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .pfdm_sampling import METHODS, TwoStageSampling

__all__ = ["METHODS", "PFDMPipeline"]


def _side(coarse: Any, coarse_patch: int, fine: Any, fine_patch: int) -> int:
    """Pixels per side of what the U-Nets take: the coarse one's where there is one."""
    unet, patch = (fine, fine_patch) if coarse is None else (coarse, coarse_patch)
    side: int = unet.config["sample_size"] * patch
    return side


class PFDMPipeline(TwoStageSampling, DiffusionPipeline):
    """Two-stage, class-conditional sampling of one client's personalised model.

    Args:
        coarse_unet: shared denoiser, K + 1 class embeddings (the last means "no label"); None with
            `gaussians` alone.
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
        gaussians: the shared model where it is Gaussians of classes (`GaussianClasses`), or has
            them. Then the chain is "truncated", without `coarse_share` if there is no coarse U-Net.
        fine_labels: whether the fine model is told the labels at and below t0.
        candidates: with `gaussians`, images that are drawn for each one that is kept.
        own_classes: with `gaussians`, labels that the fine model draws alone, from pure noise.
        coarse_levels: with `gaussians` and `coarse_unet`, the least and the greatest t that the
            latter is asked at; the former answer at others.

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
        own_classes: list[int] | None = None,
        coarse_levels: list[int] | None = None,
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
        both = coarse_unet is not None and gaussians is not None
        if (coarse_unet is None and gaussians is None) or both != (coarse_levels is not None):
            raise ValueError(
                f"give coarse_unet or gaussians, or both with coarse_levels, got {coarse_levels}"
            )
        low, high = coarse_levels or (1, len(self.betas))
        if not 1 <= low <= high <= len(self.betas):
            raise ValueError(
                f"coarse_levels must be in [1, {len(self.betas)}] in this order, got {low}, {high}"
            )
        if gaussians is not None and (chain != "truncated" or (coarse_share and not both)):
            raise ValueError(
                "gaussians need the chain truncated and no coarse_share, "
                f"got {chain!r} and {coarse_share}"
            )
        if candidates < 1 or (candidates > 1 and gaussians is None):
            raise ValueError(
                f"candidates must be at least 1, and 1 without gaussians, got {candidates}"
            )
        if own_classes and (gaussians is None or (fine_t_max or len(self.betas)) < len(self.betas)):
            raise ValueError(
                "own_classes need gaussians and a fine model for every t, "
                f"got {own_classes} and fine_t_max {fine_t_max}"
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
            own_classes=own_classes,
            coarse_levels=coarse_levels,
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
