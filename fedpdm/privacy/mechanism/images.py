"""Per-image releases, the paper's: each image is clipped and noised by itself. `images`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.calibration import calibrate_t0
from fedpdm.privacy.composition import repeated
from fedpdm.privacy.events import check_parameters, implied_event, release_parameters, same_release
from fedpdm.privacy.mechanism.door import (
    Layout,
    ReleaseMechanism,
    ReleaseSource,
    StoredRelease,
    mechanism_of,
    register,
)
from fedpdm.privacy.mechanism.gaussian import noised_chunks
from fedpdm.privacy.noise import NoiseSource
from fedpdm.privacy.types import GaussianEvent, PrivacyEvent, ReleasedDataset, ReleaseParameters

__all__ = ["ImageMechanism", "prepared"]


@register
class ImageMechanism(ReleaseMechanism[ReleaseParameters]):
    """A row for each image: `CLIP(prepare(x - shift), C)` and Gaussian noise.

    What `prepare` does cannot break the guarantee: its result is clipped, whatever it is. It must
    look at one image at a time and at nothing that is private. A subclass has parameters of its own
    that extend `ReleaseParameters`, with defaults for what it adds.
    """

    parameters: ClassVar[type[ReleaseParameters]] = ReleaseParameters
    names = ("x_tilde", "labels")

    def prepare(self, x: np.ndarray) -> np.ndarray:
        """What is done to shifted images float32 (n, C, H, W) before they are clipped."""
        return x

    def plan(
        self, config: RunConfig, schedule: NoiseSchedule, *, shift: float, num_classes: int
    ) -> tuple[ReleaseParameters, ...]:
        """One round; t0 from the budget, or as configured."""
        section, truncated = config.privacy, config.coarse.objective == "truncated"
        t0 = section.t0
        if t0 is None:
            assert section.epsilon is not None  # RunConfig
            t0 = calibrate_t0(
                schedule,
                clip_norm=section.clip_norm,
                epsilon=section.epsilon,
                delta=section.delta,
                accounting=section.accounting,
                max_t0=schedule.num_steps - truncated,
            )
        if truncated and t0 >= schedule.num_steps:
            raise ConfigError(
                f"coarse.objective: truncated needs t0 < T, got t0 = T = {t0}; lower "
                "privacy.clip_norm, raise privacy.epsilon, or use noise_to_noise"
            )
        made = release_parameters(schedule, t0=t0, clip_norm=section.clip_norm, shift=shift)
        return (self.parameters(**dataclasses.asdict(made)),)

    def event(self, parameters: ReleaseParameters) -> GaussianEvent:
        return implied_event(parameters)

    def group_event(self, event: PrivacyEvent, count: int) -> PrivacyEvent:
        """Exactly: each image has noise of its own."""
        return repeated(event, count)

    def check(self, parameters: ReleaseParameters) -> None:
        check_parameters(parameters)

    def same(self, a: ReleaseParameters, b: ReleaseParameters) -> bool:
        return same_release(a, b)

    def layout(
        self, parameters: ReleaseParameters, count: int, image_shape: tuple[int, int, int]
    ) -> Layout:
        return {"x_tilde": ("F32", (count, *image_shape))}

    def make(
        self, source: ReleaseSource, parameters: ReleaseParameters, noise: NoiseSource
    ) -> Iterator[np.ndarray]:
        prepares = type(self).prepare is not ImageMechanism.prepare
        return noised_chunks(
            source.images,
            parameters=parameters,
            noise=noise,
            prepare=self.prepare if prepares else None,
        )

    def gather(
        self, stored: Sequence[StoredRelease], digests: Sequence[bytes], labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The images' rows in their order, mapped from disk if they lie so."""
        rows: dict[bytes, int] = {}
        start = 0
        for part in stored:
            rows |= {digest: start + at for digest, at in part.rows.items()}
            start += len(part.rows)
        parts = [part.tensors["x_tilde"] for part in stored]
        x_tilde = parts[0] if len(parts) == 1 else torch.cat(parts)
        chosen = np.array([rows[digest] for digest in digests])
        if not np.array_equal(chosen, np.arange(len(x_tilde))):
            x_tilde = x_tilde[torch.from_numpy(chosen)]
        return {"x_tilde": x_tilde, "labels": torch.from_numpy(labels.copy())}

    def restore(
        self, tensors: Mapping[str, torch.Tensor], *, check_values: bool, **made: Any
    ) -> ReleasedDataset:
        x_tilde, labels = tensors["x_tilde"], tensors["labels"]
        images_fit = x_tilde.ndim == 4 and x_tilde.dtype == torch.float32
        if not images_fit or labels.dtype != torch.int64 or labels.shape != (len(x_tilde),):
            raise ValueError(
                f"release: expected float32 (N, C, H, W) and int64 labels (N,), got "
                f"{x_tilde.dtype} {tuple(x_tilde.shape)} and {labels.dtype} {tuple(labels.shape)}"
            )
        if check_values and not all(
            bool(torch.isfinite(part).all()) for part in x_tilde.flatten().split(1 << 20)
        ):
            raise ValueError("release: values that are not finite")
        return ReleasedDataset(x_tilde=x_tilde, labels=labels, **made)

    def describe(self, parameters: ReleaseParameters) -> str:
        return (
            f"t0 {parameters.t0} of {parameters.num_steps} ({parameters.schedule}), clip norm "
            f"{parameters.clip_norm:g} around {parameters.shift:g}"
        )

    def sentence(self, parameters: ReleaseParameters) -> str:
        return (
            f"Of each image its label is sent, and a copy of its pixels that is shortened to a "
            f"length of at most {parameters.clip_norm:g} and covered with random noise of "
            f"{parameters.sigma:.3g} per pixel (pixels run from -1 to 1)."
        )

    def settings(self, parameters: ReleaseParameters) -> dict[str, float]:
        return {
            "t0": parameters.t0,
            "clip_norm": parameters.clip_norm,
            "shift": parameters.shift,
        }


def prepared(x: np.ndarray, parameters: ReleaseParameters) -> np.ndarray:
    """What the mechanism with these parameters clips of shifted images float32 (n, C, H, W)."""
    mechanism = mechanism_of(parameters)
    assert isinstance(mechanism, ImageMechanism)  # or these were not its parameters
    return mechanism.prepare(x)
