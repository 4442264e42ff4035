"""Colours for grey images: a colourised MNIST, made reproducibly.

An image on black keeps its shape and takes one of ten colours: a pixel of value `g` becomes
`round(g * colour / 255)`, so black stays black. Two ways to choose the colour:

* `by_label`: class k has colour k. Colour and class say the same thing.
* `independent`: each image's colour is drawn uniformly, whatever its class, from a fixed
  public seed and its position in the split. Colour is then a second, independent factor.

The seed is public because the colours are part of the data set, not of the mechanism.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLORINGS", "PALETTE", "Coloring", "colorize"]

Coloring = Literal["by_label", "independent", "none"]

COLORINGS: Final[tuple[str, ...]] = ("by_label", "independent", "none")

#: Ten bright colours (R, G, B), 0..255, found by a maximin search over the sRGB cube with
#: CIE L* >= 58 and one channel at 255: any two are at least 56 apart in CIE L*a*b* (1976).
PALETTE: Final[tuple[tuple[int, int, int], ...]] = (
    (255, 75, 0),  # vermilion
    (0, 255, 60),  # green
    (0, 180, 255),  # sky blue
    (240, 255, 0),  # yellow
    (255, 0, 255),  # magenta
    (255, 255, 255),  # white
    (60, 255, 195),  # aquamarine
    (255, 195, 105),  # sand
    (225, 150, 255),  # lilac
    (255, 60, 135),  # rose
)

_PUBLIC_SEED: Final = 20250400952
_SPLIT_KEYS: Final = {"train": 0, "test": 1}


def colorize(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    coloring: Literal["by_label", "independent"],
    split: Literal["train", "test"],
    positions: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """Colour grey images.

    Args:
        images: (N, 1, H, W) uint8, bright on black.
        labels: (N,) int64, >= 0; used by `by_label` alone.
        coloring: how the colour is chosen, see the module.
        split: which public colour sequence to use.
        positions: (N,) int64, >= 0: place of each image in the whole split, so that a subset
            has the colours that its images have in the full set; used by `independent` alone.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        ValueError: if the images are not grey, or `by_label` meets more than 10 classes.
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(
            f"data.coloring: needs one-channel images (N, 1, H, W), got shape {images.shape}"
        )
    if coloring == "by_label":
        highest = int(labels.max(initial=0))
        if highest >= len(PALETTE):
            raise ValueError(
                f"data.coloring: by_label has {len(PALETTE)} colours, got class {highest}"
            )
        index = labels
    else:
        index = _independent_colors(split=split, num_images=int(positions.max(initial=-1)) + 1)
        index = index[positions]
    colors = np.array(PALETTE, dtype=np.uint16)[index]  # (N, 3)
    # Integer rounding to the nearest: products are at most 65,025 + 127 and fit in 16 bits.
    product = images.astype(np.uint16) * colors[:, :, None, None]
    return ((product + 127) // 255).astype(np.uint8)


def _independent_colors(*, split: Literal["train", "test"], num_images: int) -> NDArray[np.int64]:
    """(num_images,) int64 in [0, 10): the public sequence; a longer one starts the same."""
    sequence = np.random.SeedSequence(_PUBLIC_SEED, spawn_key=(_SPLIT_KEYS[split],))
    rng = np.random.default_rng(sequence)
    return (rng.random(num_images) * len(PALETTE)).astype(np.int64)
