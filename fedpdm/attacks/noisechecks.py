"""Is the noise of a release what it should be? Asked by an auditor who knows the images.

The residuals z = (x_tilde - sqrt(abar) c) / sqrt(1 - abar), one row of d pixels per released
image with c its clipped image, must be independent N(0, 1) draws that nobody else can make:

    energy     sum z^2 ~ chi^2, over all rows and for each row;
    signal     sum <z, c / ||c||> ~ N(0, rows): nothing of the image is left in the noise;
    shape      Kolmogorov and Smirnov's distance from N(0, 1);
    reuse      (1 + r) / 2 ~ Beta((d-1)/2, (d-1)/2) for r = <z_i, z_j> / (||z_i|| ||z_j||), rows
               i and j, or columns (pixels) i and j with the number of rows for d;
    suspects   the same for rows of a noise stream that an adversary could draw again.

Every p-value is two-sided and multiplied by the number of comparisons behind it (Bonferroni); a
check fails below `SIGNIFICANCE`. Rounding to a grid of 1/4096 changes variances by 1e-8, and
keeping rounded images inside the clip norm shortens them by about 1/4096: both are allowed for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from fedpdm.attacks.likelihood import chunks
from fedpdm.jobs.progress import sum_progress
from fedpdm.privacy.noise import GRID, NoiseSource

__all__ = [
    "SIGNIFICANCE",
    "Finding",
    "Rows",
    "check_each_energy",
    "check_energy",
    "check_pixels",
    "check_reuse",
    "check_shape",
    "check_signal",
    "check_suspects",
    "largest_correlation",
]

Rows = NDArray[np.float32]

SIGNIFICANCE = 1e-6
_BLOCK = 2048
_MOST_VALUES = 1_000_000  # for the shape: more would show the grid
_BLUR = 4e-6  # of 1 - r^2, by float32 and the grid


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: what it is called, whether it passed, what was seen in plain words.

    `p_value` is the chance of seeing as much by accident, None where nothing is random.
    """

    name: str
    passed: bool
    seen: str
    p_value: float | None = None


def _judged(name: str, seen: str, p_value: float, *, comparisons: int = 1) -> Finding:
    p = min(1.0, p_value * comparisons)
    return Finding(name=name, passed=p >= SIGNIFICANCE, seen=seen, p_value=p)


def _row_energies(z: Rows) -> NDArray[np.float64]:
    energies = np.empty(len(z))
    for part in chunks(*z.shape):
        wide = z[part].astype(np.float64)
        energies[part] = np.vecdot(wide, wide)
    return energies


def _two_sided(energies: NDArray[np.float64], degrees: int) -> NDArray[np.float64]:
    low, high = special.chdtr(degrees, energies), special.chdtrc(degrees, energies)
    p: NDArray[np.float64] = np.minimum(1.0, 2.0 * np.minimum(low, high))
    return p


def check_energy(z: Rows) -> Finding:
    """All the noise together: standard deviation against the one declared."""
    energy = _row_energies(z).sum()
    seen = f"noise standard deviation is {math.sqrt(energy / z.size):.4f} of the one declared"
    return _judged("noise energy", seen, float(_two_sided(np.array([energy]), z.size)[0]))


def check_each_energy(z: Rows, *, what: str = "image") -> Finding:
    """The image (or what else a row is of) whose noise is least like the declared one."""
    energies = _row_energies(z)
    p = _two_sided(energies, z.shape[1])
    at = int(np.argmin(p))
    deviation = math.sqrt(energies[at] / z.shape[1])
    seen = f"oddest {what}: standard deviation {deviation:.3f} of the one declared (row {at})"
    return _judged(f"noise energy of each {what}", seen, float(p[at]), comparisons=len(z))


def check_signal(projections: NDArray[np.float64]) -> Finding:
    """What of the images is left: (n,) of z along the image, one per row with a direction."""
    mean = float(projections.mean()) if len(projections) else 0.0
    excess = max(0.0, abs(mean) - 4.0 / GRID)
    seen = f"residual along the image is {mean:+.4f} standard deviations on average"
    return _judged(
        "image in the noise", seen, 2.0 * float(special.ndtr(-excess * math.sqrt(len(projections))))
    )


def check_shape(z: Rows) -> Finding:
    """Distribution of single values against N(0, 1), of up to a million of them."""
    stride = -(-z.size // _MOST_VALUES)
    values = np.sort(z.reshape(-1)[::stride].astype(np.float64))
    steps = np.arange(len(values) + 1) / len(values)
    normal = special.ndtr(values)
    distance = float(max((steps[1:] - normal).max(), (normal - steps[:-1]).max()))
    p = float(stats.kstwo.sf(max(0.0, distance - 0.5 / GRID), len(values)))
    return _judged("noise shape", f"distance from the normal distribution {distance:.5f}", p)


def _correlation_p_value(r: float, size: int) -> float:
    """Chance that two independent rows of `size` normal values correlate by |r| or more."""
    if size < 2:
        return 1.0
    return float(special.betainc((size - 1) / 2.0, 0.5, min(1.0, 1.0 - r * r + _BLUR)))


def _unit_rows(rows: Rows) -> Rows:
    norms = np.sqrt(_row_energies(rows))
    scale = 1.0 / np.maximum(norms, 1e-30)
    return rows * scale[:, None].astype(np.float32)


def largest_correlation(rows: Rows, others: Rows | None = None) -> tuple[float, int, int]:
    """(r, i, j) of the pair of rows with the largest |r|, in blocks.

    Between `rows` (n, d) and `others` (m, d), or all pairs i < j of `rows` if None; (0, 0, 0)
    where there is no pair.
    """
    left = _unit_rows(rows)
    right = left if others is None else _unit_rows(others)
    best = (0.0, 0, 0)
    show = sum_progress("pairs of noise", "row", len(left))
    for i in range(0, len(left), _BLOCK):
        for j in range(i if others is None else 0, len(right), _BLOCK):
            product = left[i : i + _BLOCK] @ right[j : j + _BLOCK].T
            if others is None and i == j:
                product = np.triu(product, 1)
            at = int(np.argmax(np.abs(product)))
            row, column = divmod(at, product.shape[1])
            if abs(product[row, column]) > abs(best[0]):
                best = (float(product[row, column]), i + row, j + column)
        show(len(left[i : i + _BLOCK]))
    return best


def check_reuse(z: Rows, *, what: str = "image") -> Finding:
    """Two rows, of any images and uploads, with the same noise, its negative or a part of it."""
    r, i, j = largest_correlation(z)
    seen = f"largest correlation of two {what}s' noise is {r:+.4f} (rows {i} and {j})"
    pairs = len(z) * (len(z) - 1) // 2
    return _judged(
        "noise reused", seen, _correlation_p_value(r, z.shape[1]), comparisons=max(1, pairs)
    )


def check_pixels(z: Rows) -> Finding:
    """Two pixels (or channels) that get the same noise in every image."""
    r, i, j = largest_correlation(np.ascontiguousarray(z.T))
    seen = f"largest correlation of two pixels' noise is {r:+.4f} (values {i} and {j})"
    pairs = z.shape[1] * (z.shape[1] - 1) // 2
    return _judged(
        "noise shared by pixels", seen, _correlation_p_value(r, len(z)), comparisons=max(1, pairs)
    )


def check_suspects(
    uploads: Sequence[tuple[Rows, NDArray[np.bool_]]], suspects: Sequence[NoiseSource]
) -> list[Finding]:
    """Whether a suspect's next draws are in the uploads: one finding per suspect.

    Args:
        uploads: the residuals of each upload, (N, d), and which of its rows count.
        suspects: noise streams at their start; as many arrays (N, d) are drawn as there are
            uploads. Each is compared with every upload, row by row in any order (so it need not
            be the same rows) and as a whole (so that a weak mixture shows).
    """
    kept = [z[new] for z, new in uploads]
    rows = np.concatenate(kept)
    findings = []
    for suspect in suspects:
        draws = []
        for z, _ in uploads:
            drawn = np.empty(z.shape, dtype=np.float32)
            suspect.fill(drawn)
            draws.append(drawn / np.float32(GRID))
        r, row, _ = largest_correlation(rows, np.concatenate(draws))
        single = _correlation_p_value(r, rows.shape[1]) * len(rows) * sum(map(len, draws))
        whole, total = 1.0, 0.0
        for drawn in draws:
            for (_, new), z in zip(uploads, kept, strict=True):
                if len(z):
                    wide = [side.astype(np.float64).reshape(-1) for side in (z, drawn[new])]
                    norm = math.sqrt(float(wide[0] @ wide[0]) * float(wide[1] @ wide[1]))
                    together = float(wide[0] @ wide[1]) / norm if norm > 0 else 0.0
                    total = max(total, together, key=abs)
                    whole = min(whole, _correlation_p_value(together, z.size))
        seen = (
            f"{suspect.description}: largest correlation with the noise of an image {r:+.4f} "
            f"(row {row}), with all of it {total:+.5f}"
        )
        p = 2.0 * min(single, whole * len(draws) * len(uploads))
        findings.append(_judged("noise known to others", seen, p, comparisons=len(suspects)))
    return findings
