"""Colours for grey images: a colourised MNIST, made reproducibly.

An image on black keeps its shape and takes one of ten colours: a pixel of value `g` becomes
`round(g * colour / 255)`, so black stays black. Three ways to choose the colour:

* `by_label`: class k has colour k. Colour and class say the same thing.
* `independent`: each image's colour is drawn uniformly, whatever its class. Colour is then a
  second, independent factor.
* `correlated`: with probability rho (`correlation`) the class's own colour, else the one that
  `independent` gives; so P(own colour) = rho + (1 - rho) / 10, each other colour has
  (1 - rho) / 10, rho = 1 is `by_label` and rho = 0 is `independent`, image by image. An image
  that has its class's colour at one rho has it at every larger rho.

What is drawn comes from a fixed public seed, which is part of the data set, not of the mechanism,
and from the image itself: its identity, so that no other image changes its colour. The public sets,
whose files never change, keep the colours that they were published with: a sequence by place.
"""

from __future__ import annotations

import hashlib
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
    split: Literal["train", "test"] | None = None,
    identities: NDArray[np.uint8] | None = None,
    correlation: float | None = None,
) -> NDArray[np.int64]:
    """Which colour each image has.

    Args:
        labels: (N,) int64, >= 0.
        coloring: how the colour is chosen, see the module.
        split: which published sequence to use: the images are all of a split, in its order.
        identities: (N, 32) uint8, what each image is known by: its colour is drawn from that.
            Where a colour is drawn, one of `split` and `identities` must be given.
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

    def uniforms(*stream: int) -> NDArray[np.float64]:
        if identities is not None:
            return _own_uniforms(identities, *stream)
        if split is None:
            raise ValueError(f"data.coloring: {coloring} draws from a split or from identities")
        return _public_uniforms(split, len(labels), *stream)

    if coloring == "independent":
        return _tenths(uniforms())
    highest = int(labels.max(initial=0))
    if highest >= len(PALETTE):
        raise ValueError(
            f"data.coloring: {coloring} has {len(PALETTE)} colours, got class {highest}"
        )
    if correlation is None:
        return labels
    if not 0.0 <= correlation <= 1.0:  # also refuses NaN
        raise ValueError(f"data.color_correlation: must be in [0, 1], got {correlation}")
    return np.where(uniforms(1) < correlation, labels, _tenths(uniforms()))


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


def _tenths(uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,) int64 in [0, 10) from numbers (N,) in [0, 1)."""
    return (uniforms * len(PALETTE)).astype(np.int64)


def _own_uniforms(identities: NDArray[np.uint8], *stream: int) -> NDArray[np.float64]:
    """(N,) in [0, 1): each from the public seed and an image's identity alone."""
    seed = f"fedpdm colours {_PUBLIC_SEED} {stream}".encode()
    draws = [hashlib.sha256(seed + row.tobytes()).digest()[:8] for row in identities]
    whole = np.frombuffer(b"".join(draws), dtype="<u8") >> 11
    return whole.astype(np.float64) * 2.0**-53


def _public_uniforms(
    split: Literal["train", "test"], num_images: int, *stream: int
) -> NDArray[np.float64]:
    """(num_images,) in [0, 1): a public sequence; a longer one starts the same."""
    sequence = np.random.SeedSequence(_PUBLIC_SEED, spawn_key=(_SPLIT_KEYS[split], *stream))
    return np.random.default_rng(sequence).random(num_images)
