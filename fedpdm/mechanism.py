"""Clip and release: the local differential privacy mechanism.

    CLIP(x, C) = x min(1, C / ||x||_2)
    x_tilde    = sqrt(abar_t0) CLIP(x - shift, C) + sqrt(1 - abar_t0) z,   z ~ N(0, I)

which is the Gaussian mechanism on CLIP with sigma^2 = (1 - abar_t0) / abar_t0 and sensitivity
2 C, scaled by a constant (docs/method.md section 2). `shift` is public and data-independent. The
mechanism emits a `GaussianEvent`; the accountant reads events and never recomputes sigma.

Every call of `release` is a new noising of the images it is given: call it once per image and
store the result (`fedpdm.store` does).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedpdm.accountant import epsilon_bound, epsilon_spent, multiplier_for, multiplier_for_bound
from fedpdm.data import normalize
from fedpdm.schedule import NoiseSchedule
from fedpdm.types import GaussianEvent, ReleasedDataset, ReleaseParameters

__all__ = [
    "NoiseSource",
    "SeededNoise",
    "SystemNoise",
    "calibrate_t0",
    "clip_l2",
    "release",
    "release_event",
    "restore_release",
    "select",
]


class NoiseSource(Protocol):
    """Where the noise of a release comes from; `description` goes into every artefact."""

    description: str

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """float64 array of independent N(0, 1) draws."""
        ...


class SeededNoise:
    """Reproducible noise for simulations. Whoever knows the seed can remove the noise."""

    description = "seeded (simulation only: no privacy against whoever knows the seed)"

    def __init__(self, sequence: np.random.SeedSequence) -> None:
        self._rng = np.random.default_rng(sequence)

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._rng.standard_normal(shape)


class SystemNoise:
    """Noise from a ChaCha20 key stream under a fresh 256-bit key from the operating system.

    Uniforms of 53 bits, Box-Muller transform (Box and Muller 1958) in float64.
    """

    description = "operating-system entropy, ChaCha20, 256-bit key"

    def __init__(self) -> None:
        cipher = Cipher(algorithms.ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None)
        self._stream = cipher.encryptor()

    def _uniform(self, count: int) -> np.ndarray:
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self._uniform(half)))
        angle = 2.0 * np.pi * self._uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(
            shape
        )


def clip_l2(x: torch.Tensor, *, clip_norm: float) -> torch.Tensor:
    """Scale each example of (B, *) so that its L2 norm is at most `clip_norm` (docs/method.md 1.2).

    Norms are taken in float64. The result's norm exceeds the bound by float32 rounding at most.
    `ValueError` unless clip_norm > 0.
    """
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    norms = x.flatten(1).double().norm(dim=1)
    factor = clip_norm / norms.clamp_min(clip_norm)
    return (x.double() * factor.view(-1, *([1] * (x.ndim - 1)))).to(x.dtype)


def release_event(schedule: NoiseSchedule, *, t0: int, clip_norm: float) -> GaussianEvent:
    """The privacy event of one release at `t0`: noise multiplier sigma / (2 C).

    t0 = 0 adds no noise: multiplier 0, infinite epsilon.
    """
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    return GaussianEvent(noise_multiplier=schedule.noise_to_signal(t0) / (2.0 * clip_norm))


def calibrate_t0(
    schedule: NoiseSchedule,
    *,
    clip_norm: float,
    epsilon: float,
    delta: float,
    accounting: str = "exact",
) -> int:
    """Smallest t0 in [1, T] whose release costs at most `epsilon` at `delta`.

    `accounting` is `exact` (analytic Gaussian) or `paper` (Theorem 5.1's bound). `ValueError`
    naming the best reachable epsilon if even t0 = T is not noisy enough.
    """
    if accounting not in ("exact", "paper"):
        raise ValueError(f"privacy.accounting must be exact or paper, got {accounting!r}")
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    exact = accounting == "exact"
    needed = (multiplier_for if exact else multiplier_for_bound)(epsilon=epsilon, delta=delta)
    abar = schedule.alphas_cumprod[1:]
    multipliers = np.sqrt((1.0 - abar) / abar) / (2.0 * clip_norm)
    reached = np.flatnonzero(multipliers >= needed)
    if len(reached) == 0:
        last = GaussianEvent(noise_multiplier=float(multipliers[-1]))
        best = epsilon_spent([last], delta=delta) if exact else epsilon_bound(last, delta=delta)
        largest_clip = clip_norm * float(multipliers[-1]) / needed
        unit = 10.0 ** (math.floor(math.log10(largest_clip)) - 3)  # round the advice down
        largest_clip = math.floor(largest_clip / unit) * unit
        raise ValueError(
            f"privacy.epsilon {epsilon:g} cannot be reached with clip_norm {clip_norm:g}: "
            f"t0 = {schedule.num_steps} gives {best:.4g}; lower clip_norm to {largest_clip:.4g} "
            "or less, or raise epsilon"
        )
    return int(reached[0]) + 1


def release(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    t0: int,
    clip_norm: float,
    shift: float,
    noise: NoiseSource,
) -> ReleasedDataset:
    """Privatise images: shift, clip, scale, add noise. Spends one `release_event` per image.

    Args:
        images: (N, C, H, W): uint8 pixels, or float32 in the models' scale with `shift` already
            subtracted. Worked through in chunks: memory beyond the result is bounded.
        labels: int64 (N,), public.
        schedule: the noise schedule; t0: steps of noise in [1, T].
        clip_norm: L2 bound in units of shifted images in [-1, 1].
        shift: public constant that centres the images.
        noise: where the noise comes from.

    Raises:
        ValueError: t0 outside [1, T], shapes that do not match, values that are not finite.
    """
    if not 1 <= t0 <= schedule.num_steps:
        raise ValueError(f"t0 must be in [1, {schedule.num_steps}], got {t0}")
    if images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"release needs images (N, C, H, W) and labels (N,), got {tuple(images.shape)} "
            f"and {tuple(labels.shape)}"
        )
    abar = schedule.alpha_bar(t0)
    signal, spread = math.sqrt(abar), math.sqrt(1.0 - abar)
    x_tilde = torch.empty(images.shape, dtype=torch.float32)
    chunk = max(1, (1 << 20) // max(1, images[0].numel())) if len(images) else 1
    for start in range(0, len(images), chunk):
        x_0 = images[start : start + chunk]
        if x_0.dtype == torch.uint8:
            x_0 = normalize(x_0, shift=shift)
        finite = torch.isfinite(x_0).flatten(1).all(dim=1)
        if not bool(finite.all()):
            bad = start + int((~finite).nonzero()[0, 0])
            raise ValueError(f"image {bad} has values that are not finite")
        clipped = clip_l2(x_0, clip_norm=clip_norm).double()
        z = torch.from_numpy(noise.standard_normal(tuple(clipped.shape)))
        x_tilde[start : start + chunk] = (signal * clipped + spread * z).float()
    return ReleasedDataset(
        x_tilde=x_tilde,
        labels=labels.to(torch.int64).clone(),
        parameters=ReleaseParameters(
            t0=t0,
            clip_norm=float(clip_norm),
            shift=float(shift),
            schedule=schedule.kind,
            num_steps=schedule.num_steps,
            alpha_bar=abar,
        ),
        event=release_event(schedule, t0=t0, clip_norm=clip_norm),
        noise_source=noise.description,
    )


def select(released: ReleasedDataset, indices: torch.Tensor) -> ReleasedDataset:
    """The released images at `indices` (int64 (n,)): the same release, fewer rows."""
    return replace(released, x_tilde=released.x_tilde[indices], labels=released.labels[indices])


def release_metadata(released: ReleasedDataset) -> dict[str, str]:
    """The parameters of a release as strings, exact to the bit (`restore_release` reads them)."""
    fields = {name: repr(value) for name, value in asdict(released.parameters).items()}
    fields["schedule"] = released.parameters.schedule
    fields["noise_multiplier"] = repr(released.event.noise_multiplier)
    fields["noise_source"] = released.noise_source
    return fields


def restore_release(
    x_tilde: torch.Tensor, labels: torch.Tensor, metadata: Mapping[str, str]
) -> ReleasedDataset:
    """A release read back from disk or wire; `ValueError` if it contradicts itself.

    The event is recomputed from the parameters and must equal the recorded one, so that a file
    or message cannot claim less privacy loss than its parameters imply.
    """
    try:
        parameters = ReleaseParameters(
            t0=int(metadata["t0"]),
            clip_norm=float(metadata["clip_norm"]),
            shift=float(metadata["shift"]),
            schedule=metadata["schedule"],
            num_steps=int(metadata["num_steps"]),
            alpha_bar=float(metadata["alpha_bar"]),
        )
        recorded = float(metadata["noise_multiplier"])
        source = metadata["noise_source"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"release record is incomplete or malformed: {error}") from None
    abar = parameters.alpha_bar
    if not 0.0 < abar < 1.0 or not 0.0 < parameters.clip_norm < math.inf:
        raise ValueError(
            f"release record: alpha_bar must be in (0, 1) and clip_norm positive, "
            f"got {abar} and {parameters.clip_norm}"
        )
    if not 1 <= parameters.t0 <= parameters.num_steps or not math.isfinite(parameters.shift):
        raise ValueError(
            f"release record: t0 must be in [1, {parameters.num_steps}] and shift finite, "
            f"got {parameters.t0} and {parameters.shift}"
        )
    implied = math.sqrt((1.0 - abar) / abar) / (2.0 * parameters.clip_norm)
    if not math.isclose(implied, recorded, rel_tol=1e-12):
        raise ValueError(
            f"release record: noise multiplier {recorded} does not follow from its "
            f"parameters ({implied})"
        )
    images_fit = x_tilde.ndim == 4 and x_tilde.dtype == torch.float32
    if not images_fit or labels.dtype != torch.int64 or labels.shape != (len(x_tilde),):
        raise ValueError(
            f"release: expected float32 (N, C, H, W) and int64 labels (N,), got {x_tilde.dtype} "
            f"{tuple(x_tilde.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if not bool(torch.isfinite(x_tilde).all()):
        raise ValueError("release: values that are not finite")
    return ReleasedDataset(
        x_tilde=x_tilde,
        labels=labels,
        parameters=parameters,
        event=GaussianEvent(noise_multiplier=recorded),
        noise_source=source,
    )
