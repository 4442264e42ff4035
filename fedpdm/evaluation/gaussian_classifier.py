"""Class Gaussians read as a classifier: which class is an image of, by what all clients released.

Clean images x are read as a x with the Gaussians noised to abar = a^2 and no noise added: that is
the Gaussian of each class with (1 - abar) / abar more variance in every direction, which keeps
directions with hardly any variance from deciding. It is post-processing of the releases; what it
says of an image stays where the image is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import normalize
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.from_gaussians import read_level
from fedpdm.diffusion.gaussian import GaussianDenoiser

__all__ = ["PRIORS", "GaussianClassifier", "as_classifier"]

PRIORS: Final = ("even", "counted")
_BATCH: Final = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianClassifier:
    """`denoiser` holds the Gaussians of images of this `spec`."""

    denoiser: GaussianDenoiser
    spec: ImageSpec

    def log_probabilities(
        self, images: NDArray[np.uint8], *, prior: str = "even", abar: float | None = None
    ) -> NDArray[np.float64]:
        """log p(class | image), float64 (N, K), of uint8 images (N, C, H, W).

        Args:
            prior: "even": classes are equally likely before; "counted": as often as in the sums.
            abar: noise level in (0, 1], 1 for none; default that of t = 0.15 T, where candidates
                are chosen.

        Returns:
            -inf for a class of which no client had an image.

        Raises:
            ValueError: for images of another size, an unknown prior, or an abar out of range.
        """
        level = read_level(self.denoiser.schedule) if abar is None else abar
        if not 0.0 < level <= 1.0:
            raise ValueError(f"abar must be in (0, 1], got {level:g}")
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.spec.shape:
            raise ValueError(
                f"images must be uint8 (N, C, H, W) with C, H, W = {self.spec.shape}, got "
                f"{images.dtype} {images.shape}"
            )
        gaussians, answers = self.denoiser.gaussians, []
        for start in range(0, len(images), _BATCH):
            part = torch.from_numpy(np.array(images[start : start + _BATCH]))
            x = normalize(part.to(gaussians.means.device), shift=self.spec.shift)
            found = gaussians.log_class_posterior(
                level**0.5 * x.double(), self.spec.num_classes, level, even=prior == "even"
            )
            answers.append(found.cpu().numpy())
        return np.concatenate(answers) if answers else np.empty((0, self.spec.num_classes))

    def labels(
        self, images: NDArray[np.uint8], *, prior: str = "even", abar: float | None = None
    ) -> NDArray[np.int64]:
        """The likeliest class of each image, int64 (N,); arguments as of `log_probabilities`."""
        found = self.log_probabilities(images, prior=prior, abar=abar).argmax(axis=1)
        return found.astype(np.int64)


def as_classifier(shared: object, spec: ImageSpec) -> GaussianClassifier:
    """A run's shared model as a classifier; `ValueError` unless it is, or has, class Gaussians."""
    if not isinstance(shared, GaussianDenoiser):
        raise ValueError(
            "the shared model must be class Gaussians (privacy.release: statistics) to be read as "
            f"a classifier, got {type(shared).__name__}"
        )
    return GaussianClassifier(denoiser=shared, spec=spec)
