"""The same images clean, clipped and released at several epsilons, in a grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import denormalize, normalize, stratified_positions
from fedpdm.data.open_images import PublicImages
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.calibration import UnreachableEpsilonError, calibrate_t0
from fedpdm.privacy.mechanism import SeededNoise, clip_l2, release
from fedpdm.reporting.pictures import draw_image_grid

__all__ = ["PictureRow", "draw_release_picture"]

CONTRAST = 3.0  # x_tilde from -3 to 3 is drawn black to white: 99.7% of the noise alone
MAX_PIXELS = 512  # height and width of an image
_TITLE = "The same images, clean, clipped and released"
_NOTE = f"released: x_tilde as sent, {-CONTRAST:g} black, 0 mid-grey, {CONTRAST:g} white"


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One released row; `t0` is None where no t0 reaches this epsilon."""

    epsilon: float
    t0: int | None


def draw_release_picture(
    path: Path,
    images: PublicImages,
    *,
    schedule: NoiseSchedule,
    clip_norm: float,
    shift: float,
    epsilons: tuple[float, ...],
    delta: float,
    releases: int,
    num: int,
    seed: int,
) -> tuple[PictureRow, ...]:
    """Write the picture: `num` images as columns, and a row per epsilon, the largest first.

    Each row is a release of the same images with seeded noise, so the picture protects nobody:
    public images only. t0 is the smallest with which `releases` releases of an image keep to
    epsilon (exact accounting); one of them is shown. Rows out of reach stay empty.
    """
    positions = stratified_positions(images.labels, max_images=num)
    positions = positions[np.argsort(images.labels[positions], kind="stable")]
    pixels = torch.tensor(images.read(positions))
    if max(pixels.shape[2:]) > MAX_PIXELS:
        raise ValueError(
            f"--data: images must have at most {MAX_PIXELS} pixels a side to be drawn, got "
            f"{tuple(pixels.shape[2:])}; give --resolution"
        )
    labels = torch.tensor(images.labels[positions])
    x_0 = normalize(pixels, shift=shift)
    drawn = [pixels.numpy(), denormalize(clip_l2(x_0, clip_norm=clip_norm), shift=shift).numpy()]
    names = ["clean", f"clipped to norm {clip_norm:.4g}"]
    rows = []
    for number, epsilon in enumerate(sorted(set(epsilons), reverse=True)):
        t0 = _smallest_t0(schedule, clip_norm, epsilon, delta, releases)
        rows.append(PictureRow(epsilon=epsilon, t0=t0))
        if t0 is None:
            drawn.append(drawn[0][:0])
            names.append(f"epsilon {epsilon:g}: out of reach")
            continue
        released = release(
            pixels,
            labels,
            schedule=schedule,
            t0=t0,
            clip_norm=clip_norm,
            shift=shift,
            noise=SeededNoise(np.random.SeedSequence(seed, spawn_key=(number,))),
        )
        drawn.append(_grey_levels(released.x_tilde))
        names.append(f"epsilon {epsilon:g}, t0 = {t0}")
    draw_image_grid(
        path,
        drawn,
        row_labels=names,
        column_labels=[images.class_names[int(label)] for label in labels],
        title=_TITLE,
        note=_NOTE,
    )
    return tuple(rows)


def _smallest_t0(
    schedule: NoiseSchedule, clip_norm: float, epsilon: float, delta: float, releases: int
) -> int | None:
    try:
        return calibrate_t0(
            schedule, clip_norm=clip_norm, epsilon=epsilon, delta=delta, releases=releases
        )
    except UnreachableEpsilonError:
        return None


def _grey_levels(x_tilde: torch.Tensor) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (
        ((x_tilde / CONTRAST + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8).numpy()
    )
    return levels
