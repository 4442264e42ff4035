"""A public orthonormal basis of images: cosines by rising frequency, colours decorrelated.

It depends on the shape of images alone. All of it is a rotation, which changes no norm and no
inner product; its first rows keep what images vary in most.
"""

from __future__ import annotations

import functools
import math

import numpy as np

__all__ = ["cosine_basis"]

# Brightness, red against blue, green against both: fixed, so that no image decides about it.
COLOURS = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]) / np.sqrt(
    [[3.0], [2.0], [6.0]]
)


def _cosines(size: int) -> np.ndarray:
    """The orthonormal discrete cosine transform (DCT-II), float64 (size, size), rows by frequency.

    Row u is sqrt(2 / size) cos(pi (2 i + 1) u / (2 size)), and sqrt(1 / size) for u = 0.
    """
    u, i = np.arange(size)[:, None], np.arange(size)[None, :]
    rows = math.sqrt(2.0 / size) * np.cos(math.pi * (2 * i + 1) * u / (2 * size))
    rows[0] = math.sqrt(1.0 / size)
    return rows


@functools.lru_cache(maxsize=4)
def cosine_basis(image_shape: tuple[int, int, int], dimensions: int) -> np.ndarray:
    """Orthonormal rows, float64 (p, C H W), p = min(dimensions, C H W); not to be written to.

    Rows go by u^2 + v^2, then by u, then by colour.
    """
    channels, height, width = image_shape
    colours = COLOURS if channels == 3 else _cosines(channels)
    u, v, c = (
        axis.ravel()
        for axis in np.meshgrid(np.arange(height), np.arange(width), np.arange(channels))
    )
    first = np.lexsort((c, u, u * u + v * v))[:dimensions]
    u, v, c = u[first], v[first], c[first]
    rows = np.einsum("pc,pi,pj->pcij", colours[c], _cosines(height)[u], _cosines(width)[v])
    basis: np.ndarray = np.ascontiguousarray(rows.reshape(len(first), -1))
    basis.flags.writeable = False
    return basis
