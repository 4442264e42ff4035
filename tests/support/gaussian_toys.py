"""Class Gaussians of small images, and a client whose images they fit."""

from __future__ import annotations

import numpy as np
import torch

from fedpdm.data import ImageSet
from fedpdm.data.client_images import ClientImages
from fedpdm.diffusion.gaussian import ClassGaussians

SIDE = 4
PIXELS = SIDE * SIDE


def gaussians_of(
    num_classes: int, *, pixels: int = PIXELS, r: int = 3, seed: int = 0, weights: bool = False
) -> ClassGaussians:
    """One Gaussian per class, on images around mid-grey in [-1, 1]."""
    rng = np.random.default_rng(seed)
    frames = [np.linalg.qr(rng.normal(size=(pixels, pixels)))[0][:r] for _ in range(num_classes)]
    given = rng.integers(1, 50, num_classes) if weights else np.ones(num_classes)
    return ClassGaussians(
        means=torch.from_numpy(rng.normal(size=(num_classes, pixels)) * 0.3),
        directions=torch.from_numpy(np.array(frames).reshape(num_classes, r, pixels)),
        variances=torch.from_numpy(rng.uniform(0.1, 0.4, (num_classes, r))),
        rest=torch.from_numpy(rng.uniform(0.01, 0.03, num_classes)),
        weights=torch.from_numpy(given.astype(np.float64)),
        classes=torch.arange(num_classes),
    )


def dense_covariance(g: ClassGaussians, j: int) -> np.ndarray:
    v = g.directions[j].numpy()
    eye = np.eye(g.means.shape[1])
    return v.T @ np.diag(g.variances[j].numpy()) @ v + float(g.rest[j]) * (eye - v.T @ v)


def client_with(
    images: np.ndarray, labels: np.ndarray, heldout: np.ndarray, *, majority: tuple[int, ...]
) -> ClientImages:
    """A client with these images, uint8 (N, 1, S, S); `heldout` are positions."""
    names = tuple(str(k) for k in range(int(labels.max()) + 1))
    return ClientImages(
        client_id=0,
        images=ImageSet(images=images, labels=labels, class_names=names, background=0.0),
        train=np.setdiff1d(np.arange(len(labels)), heldout),
        heldout=heldout,
        indices=None,
        majority=majority,
        minority=tuple(sorted(set(labels.tolist()) - set(majority))),
    )
