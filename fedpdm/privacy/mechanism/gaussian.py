"""Clip and noise images: the Gaussian mechanism of per-image releases.

    CLIP(x, C) = x min(1, C / ||x||_2)
    x_tilde    = sqrt(abar_t0) CLIP(x - shift, C) + sqrt(1 - abar_t0) z,   z ~ N(0, I)

which is the Gaussian mechanism on CLIP with sigma^2 = (1 - abar_t0) / abar_t0 and sensitivity
2 C, scaled by a constant (docs/method.md section 2). `shift` is public and data-independent. The
mechanism emits a `GaussianEvent`; the accountant reads events and never recomputes sigma.

It works on a grid of `fedpdm.privacy.noise.GRID` steps per standard deviation of the noise. The
clipped image becomes whole steps whose squares sum to at most (C GRID / sigma)^2, checked in exact
arithmetic for every image; the noise is whole steps too. So the sensitivity holds without rounding
errors, and the result is a function of the real-valued mechanism's (see `fedpdm.privacy.noise`).

Every call of `release` is a new noising of the images it is given: `fedpdm.privacy.releases` calls
it once per image and keeps the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fedpdm.data import normalize
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.events import check_parameters, release_event, release_parameters
from fedpdm.privacy.noise import GRID, NoiseSource
from fedpdm.privacy.types import ReleasedDataset, ReleaseParameters

__all__ = ["clip_l2", "clip_to_grid", "noised_chunks", "release"]

CHUNK = 1 << 16  # pixels at a time


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


def clip_to_grid(
    x: np.ndarray, *, bound: float, steps: float, out: np.ndarray | None = None
) -> np.ndarray:
    """`CLIP` in whole grid steps: float32 (N, D) -> float32 (N, D), sum of squares <= bound^2.

    `steps` is grid steps per unit of x, `bound` the clip norm in steps. Rounding to the nearest
    step lengthens an image a little, so those at the bound are clipped to just inside it, by
    what rounding adds and 4 standard deviations; the rare one that is still too long is clipped
    in float64 and rounded towards zero. Sums of squares are exact: whole numbers below 2^53.
    `ValueError` for a bound or steps that are not positive and finite.
    """
    size = x.shape[1]
    for name, value in (("bound", bound), ("steps", steps)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    inside = bound**2 - size / 12.0 - 2.4 * bound - 0.3 * math.sqrt(size)
    soft = math.sqrt(max(inside, bound**2 / 4.0))
    norms = np.sqrt(np.vecdot(x, x)).astype(np.float64) * steps
    scale = (steps * np.minimum(1.0, soft / np.maximum(norms, soft))).astype(np.float32)
    grid = np.multiply(x, scale[:, None], out=out)
    np.rint(grid, out=grid)
    limit = math.floor(bound**2)
    long = np.flatnonzero(_sum_of_squares(grid) > limit)
    if len(long):
        wide = x[long].astype(np.float64)
        tight = bound * (1.0 - 1e-10) / (np.sqrt(np.vecdot(wide, wide)) * steps)
        grid[long] = np.trunc(wide * (steps * np.minimum(1.0, tight))[:, None])
        if (_sum_of_squares(grid[long]) > limit).any():
            raise ArithmeticError("an image is longer than the clip norm after clipping")
    return grid


def _sum_of_squares(grid: np.ndarray) -> np.ndarray:
    """Row sums of squares of float32 whole numbers, exact in float64."""
    wide = grid.astype(np.float64)
    total: np.ndarray = np.vecdot(wide, wide)
    return total


def _check_scale(x: np.ndarray, start: int, bounds: tuple[float, float]) -> None:
    """`ValueError` naming the image unless `x` (N, D) is finite and in `bounds`."""
    if x.size == 0 or (x.min() >= bounds[0] - 1e-3 and x.max() <= bounds[1] + 1e-3):
        return
    low, high = x.min(axis=1), x.max(axis=1)  # NaN if there is one
    finite = np.isfinite(low) & np.isfinite(high)
    if not finite.all():
        raise ValueError(f"image {start + int(np.argmin(finite))} has values that are not finite")
    at = int(np.argmax((low < bounds[0] - 1e-3) | (high > bounds[1] + 1e-3)))
    value = low[at] if low[at] < bounds[0] - 1e-3 else high[at]
    raise ValueError(
        f"image {start + at}: values must be in [{bounds[0]:g}, {bounds[1]:g}] (pixels in "
        f"[-1, 1] minus the shift), got {value:g}; give uint8 pixels or scaled images"
    )


def _prepared(x: np.ndarray, shape: tuple[int, ...], start: int) -> np.ndarray:
    """Prepared images as float32 (n, D); `ValueError` unless they are images still, and finite."""
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(x, dtype=np.float32)
    if x.shape != shape or not np.isfinite(rounded).all():
        raise ValueError(
            f"images {start} to {start + shape[0] - 1}: prepare must return finite values of shape "
            f"{shape}, got {x.shape}"
        )
    return rounded.reshape(len(x), -1)


def noised_chunks(
    images: torch.Tensor | np.ndarray,
    *,
    parameters: ReleaseParameters,
    noise: NoiseSource,
    largest: float | None = None,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    out: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """x_tilde of the images in order, chunk by chunk: float32 (n, C, H, W). See `release`.

    `prepare` is applied to shifted images float32 (n, C, H, W) before they are clipped. Chunks are
    parts of `out`, float32 (N, C, H, W), where it is given; else a chunk is valid until the next
    one is asked for.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if parameters.grid != GRID:
        raise ValueError(f"grid must be {GRID}, as the noise's, got {parameters.grid}")
    if largest is not None and not 0.0 <= largest < math.inf:
        raise ValueError(f"largest must be at least 0 and finite, got {largest}")
    check_parameters(parameters)
    steps = parameters.grid / parameters.sigma
    step = np.float32(math.sqrt(1.0 - parameters.alpha_bar) / parameters.grid)
    size = math.prod(images.shape[1:])
    rows = min(max(1, CHUNK // max(1, size)), len(images))
    shift = parameters.shift
    bounds = (-1.0 - shift, 1.0 - shift) if largest is None else (-largest, largest)
    x_room, noise_room, room = np.empty((3, rows, size), dtype=np.float32)
    for start in range(0, len(images), max(1, rows)):
        part = images[start : start + rows]
        if part.dtype in (torch.uint8, np.uint8):
            x = x_room[: len(part)]
            normalize(part, shift=shift, out=torch.from_numpy(x.reshape(part.shape)))
        else:
            x = np.ascontiguousarray(part, dtype=np.float32).reshape(len(part), size)
            _check_scale(x, start, bounds)
        if prepare is not None:
            x = _prepared(prepare(x.reshape(part.shape)), part.shape, start)
        z = noise_room[: len(part)]
        x_tilde = (room if out is None else out[start:].reshape(-1, size))[: len(part)]
        clip_to_grid(x, bound=parameters.clip_norm * steps, steps=steps, out=x_tilde)
        noise.fill(z)
        x_tilde += z
        x_tilde *= step
        yield x_tilde.reshape(part.shape)


def release(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    t0: int,
    clip_norm: float,
    shift: float,
    noise: NoiseSource,
    largest: float | None = None,
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
        largest: bound on the magnitude of float data that are not images.

    Raises:
        ValueError: t0 outside [1, T], a clip norm, shift or `largest` that is not finite, shapes
            that do not match, values that are not finite or not on the scale of images.
    """
    parameters = release_parameters(schedule, t0=t0, clip_norm=clip_norm, shift=shift)
    if images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"release needs images (N, C, H, W) and labels (N,), got {tuple(images.shape)} "
            f"and {tuple(labels.shape)}"
        )
    x_tilde = torch.empty(images.shape, dtype=torch.float32)
    for _ in noised_chunks(
        images, parameters=parameters, noise=noise, largest=largest, out=x_tilde.numpy()
    ):
        pass
    return ReleasedDataset(
        x_tilde=x_tilde,
        labels=labels.to(torch.int64).clone(),
        parameters=parameters,
        event=release_event(schedule, t0=t0, clip_norm=clip_norm),
        noise_source=noise.description,
        seeded=noise.seeded,
    )
