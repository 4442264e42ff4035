"""The kind of a run: where the shared model is trained, and on what. Resolved here, once."""

from __future__ import annotations

import enum

__all__ = ["RunKind"]


class RunKind(enum.Enum):
    """A pair of `coarse.training` and `coarse.images`. Other pairs are refused by `RunConfig`."""

    FEDERATED = ("federated", "released")
    SERVER = ("server", "released")
    ALONE = ("none", "released")  # baseline: no shared model
    FEDERATED_RAW = ("federated", "raw")  # baseline: no privacy
    CENTRALISED = ("server", "raw")  # baseline: all images in one place
    DP_SGD = ("federated", "dp_sgd")  # baseline: raw images, noisy gradients

    @property
    def basis(self) -> str:
        """What the shared model is trained on: `released`, `raw` or `dp_sgd`."""
        return self.value[1]

    @property
    def releases(self) -> bool:
        """Whether clients release anything. Baselines do not."""
        return self in (RunKind.FEDERATED, RunKind.SERVER)

    @property
    def has_shared_model(self) -> bool:
        """Whether there is a shared model at all."""
        return self is not RunKind.ALONE

    @property
    def has_fine_model(self) -> bool:
        """Whether clients have models of their own. Baselines on raw images have not."""
        return self.basis == "released"
