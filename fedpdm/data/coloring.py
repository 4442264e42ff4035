"""Colours for grey images: a colourised MNIST, made reproducibly.

An image on black keeps its shape and takes one of ten colours: a pixel of value `g` becomes
`round(g * colour / 255)`, so black stays black. Three ways to choose the colour:

* `by_label`: class k has colour k. Colour and class say the same thing.
* `independent`: each image's colour is drawn uniformly, whatever its class, from a fixed
  public seed and its position in the split. Colour is then a second, independent factor.
* `correlated`: with probability rho (`correlation`) the class's own colour, else the one that
  `independent` gives; so P(own colour) = rho + (1 - rho) / 10, each other colour has
  (1 - rho) / 10, rho = 1 is `by_label` and rho = 0 is `independent`, image by image. An image
  that has its class's colour at one rho has it at every larger rho.

The seed is public because the colours are part of the data set, not of the mechanism.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOR_NAMES", "PALETTE", "choose_colors", "colorize"]

_NAMED: Final[tuple[tuple[str, tuple[int, int, int]], ...]] = (
    ("vermilion", (255, 75, 0)),
    ("green", (0, 255, 60)),
    ("sky blue", (0, 180, 255)),
    ("yellow", (240, 255, 0)),
    ("magenta", (255, 0, 255)),
    ("white", (255, 255, 255)),
    ("aquamarine", (60, 255, 195)),
    ("sand", (255, 195, 105)),
    ("lilac", (225, 150, 255)),
    ("rose", (255, 60, 135)),
)
#: Names of the colours, in the order of `PALETTE`.
COLOR_NAMES: Final[tuple[str, ...]] = tuple(name for name, _ in _NAMED)
#: Ten bright colours (R, G, B), 0..255, found by a maximin search over the sRGB cube with
#: CIE L* >= 58 and one channel at 255: any two are at least 56 apart in CIE L*a*b* (1976).
PALETTE: Final[tuple[tuple[int, int, int], ...]] = tuple(color for _, color in _NAMED)

_PUBLIC_SEED: Final = 20250400952
_SPLIT_KEYS: Final = {"train": 0, "test": 1}


def choose_colors(
    labels: NDArray[np.int64],
    *,
    coloring: Literal["by_label", "correlated", "independent"],
    split: Literal["train", "test"],
    correlation: float | None = None,
) -> NDArray[np.int64]:
    """Which colour each image of a whole split has.

    Args:
        labels: (N,) int64, >= 0, of all images of the split, in its order: an image is known by
            its place there.
        coloring: how the colour is chosen, see the module.
        split: which public sequence to use.
        correlation: rho in [0, 1], for `correlated` alone.

    Returns:
        (N,) int64 in [0, 10), indices into `PALETTE`.

    Raises:
        ValueError: if a class has no colour of its own and needs one, or `correlation` is missing,
            not needed or out of range.
    """
    if (coloring == "correlated") != (correlation is not None):
        needed = "must be given with" if coloring == "correlated" else "needs"
        raise ValueError(
            f"data.color_correlation: {needed} data.coloring: correlated, "
            f"got {'none' if correlation is None else f'{correlation:g} and {coloring}'}"
        )
    if coloring == "independent":
        return _uniform_colors(split, len(labels))
    highest = int(labels.max(initial=0))
    if highest >= len(PALETTE):
        raise ValueError(
            f"data.coloring: {coloring} has {len(PALETTE)} colours, got class {highest}"
        )
    if correlation is None:
        return labels
    if not 0.0 <= correlation <= 1.0:  # also refuses NaN
        raise ValueError(f"data.color_correlation: must be in [0, 1], got {correlation}")
    is_own = _public_uniforms(split, len(labels), 1) < correlation
    return np.where(is_own, labels, _uniform_colors(split, len(labels)))


def colorize(images: NDArray[np.uint8], colors: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Colour grey images.

    Args:
        images: (N, 1, H, W) uint8, bright on black.
        colors: (N,) int64 in [0, 10), indices into `PALETTE`.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        ValueError: if the images are not grey.
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(
            f"data.coloring: needs one-channel images (N, 1, H, W), got shape {images.shape}"
        )
    palette = np.array(PALETTE, dtype=np.uint16)[colors]  # (N, 3)
    # Integer rounding to the nearest: products are at most 65,025 + 127 and fit in 16 bits.
    product = images.astype(np.uint16) * palette[:, :, None, None]
    return ((product + 127) // 255).astype(np.uint8)


def _uniform_colors(split: Literal["train", "test"], num_images: int) -> NDArray[np.int64]:
    """(num_images,) int64 in [0, 10), whatever the class."""
    return (_public_uniforms(split, num_images) * len(PALETTE)).astype(np.int64)


def _public_uniforms(
    split: Literal["train", "test"], num_images: int, *stream: int
) -> NDArray[np.float64]:
    """(num_images,) in [0, 1): a public sequence; a longer one starts the same."""
    sequence = np.random.SeedSequence(_PUBLIC_SEED, spawn_key=(_SPLIT_KEYS[split], *stream))
    return np.random.default_rng(sequence).random(num_images)
