"""Spectra of data beside the noise that an epsilon asks for: they show where images gain."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["spectra_at_epsilon"]


def spectra_at_epsilon(
    epsilon: float, *, delta: float = 1e-5, clip_norm: float = 8.0
) -> tuple[dict[str, list[float]], float]:
    """(variances, sigma^2 of a release) of the demo's digits and of equal directions, by name.

    The digits are scikit-learn's, coloured by class, in [-1, 1] around their black background,
    clipped to the demo's `clip_norm`; their spectrum is that of the covariance within the classes.
    The equal directions have the same dimension and total variance, and the same noise.
    """
    from fedpdm.data import normalize
    from fedpdm.data.open_images import open_public_images
    from fedpdm.diffusion.schedule import make_schedule
    from fedpdm.privacy.calibration import calibrate_t0

    schedule = make_schedule("linear")
    t0 = calibrate_t0(schedule, clip_norm=clip_norm, epsilon=epsilon, delta=delta)
    sigma2 = schedule.noise_to_signal(t0) ** 2
    source = open_public_images("digits", option="digits", resolution=None)
    labels = np.asarray(source.labels)
    pixels = torch.from_numpy(source.read(np.arange(len(source))))
    x = normalize(pixels, shift=source.background).flatten(1).double().numpy()
    norms = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    x = x * np.minimum(1.0, clip_norm / norms)
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(axis=0)
    within = np.linalg.eigvalsh(x.T @ x / len(x))[::-1].clip(min=0.0)
    equal = np.full(len(within), float(within.sum()) / len(within))
    names = (f"{len(within)} equal directions", "the demo's digits, in a class")
    return dict(zip(names, (equal.tolist(), within.tolist()), strict=True)), sigma2
