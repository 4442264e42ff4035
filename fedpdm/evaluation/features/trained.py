"""Features of a small classifier that is trained here, on public images that no client holds.

A network trained on the clients' own images ranks models by what it saw: real images of other
clients then score worse than copies. Give images that no client holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data import ImageSet
from fedpdm.evaluation.features.extractor import array_digest, cache_directory, tensor_digest
from fedpdm.evaluation.features.network import (
    FEATURES,
    Progress,
    SmallClassifier,
    fit_classifier,
    predict,
)
from fedpdm.rng import Purpose, numpy_rng, seed_sequence
from fedpdm.storage.files import StoreError, clear_leftovers, locked, read_tensors, write_tensors

__all__ = ["TrainedFeatures", "train_feature_network"]

# Raise it with any change of network or training: what is cached under the old one is not used.
RECIPE: Final = "1"
NUM_STEPS: Final = 2000
MIN_IMAGES: Final = 20


class TrainedFeatures:
    """The penultimate layer (N, 64) of a classifier, and the classifier itself.

    Attributes:
        model: the network, in evaluation mode.
        accuracy: share of right answers on a tenth of the images that training did not see.
        num_held_out: how many images that is.
    """

    name = f"trained-{FEATURES}"

    def __init__(self, model: SmallClassifier, *, accuracy: float, num_held_out: int) -> None:
        self.model = model
        self.accuracy = accuracy
        self.num_held_out = num_held_out

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return tensor_digest(self.model.state_dict())

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(N, 64) of uint8 (N, C, H, W), of the trained size."""
        return predict(self.model, images, features=True).astype(np.float64)

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(N,) int64: the class that the network finds most likely."""
        return predict(self.model, images).argmax(axis=1).astype(np.int64)


def train_feature_network(
    images: ImageSet,
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TrainedFeatures:
    """Train on nine tenths of `images`, test on the rest; from the cache where it was done before.

    The cache key is the digest of pixels, labels, number of classes, seed, steps and recipe. A
    cached file that is damaged is made anew. Of two processes that want one network, the second
    waits.

    Args:
        images: public images that no client holds, at least 20, of 2 classes or more; square.
        cache: a directory; default `cache_directory()`.
        progress: called about every 20 steps; not at all where the cache has the network.

    Raises:
        ValueError: for too few images or classes.
        StoreError: if the cache cannot be written.
    """
    present = len(np.unique(images.labels))
    if len(images) < MIN_IMAGES or present < 2:
        raise ValueError(
            f"a feature network needs at least {MIN_IMAGES} images of 2 classes that no client "
            f"holds, got {len(images)} of {present}"
        )
    recipe = f"{RECIPE} {seed} {num_steps} {images.num_classes}"
    key = array_digest("trained", recipe, images.digest())
    path = cache_directory(cache) / "features" / f"trained-{key[:32]}.safetensors"
    with locked(path.with_suffix(".lock")):
        clear_leftovers(path.parent, of=path.name)
        found = _read(path, images)
        if found is None:
            found = _train(images, seed=seed, num_steps=num_steps, device=device, progress=progress)
            weights = found.model.state_dict()
            written = {
                "accuracy": repr(found.accuracy),
                "num_held_out": str(found.num_held_out),
                "digest": found.digest,
            }
            write_tensors(path, weights, written)
    found.model.to(device)
    return found


def _train(
    images: ImageSet,
    *,
    seed: int,
    num_steps: int,
    device: torch.device | str,
    progress: Progress | None,
) -> TrainedFeatures:
    order = numpy_rng(seed, Purpose.FEATURE_NETWORK, round=1).permutation(len(images))
    held_out, kept = np.split(order, [len(images) // 10])
    model, _ = fit_classifier(
        images.images[kept],
        images.labels[kept],
        num_classes=images.num_classes,
        num_steps=num_steps,
        seed=seed_sequence(seed, Purpose.FEATURE_NETWORK),
        device=device,
        progress=progress,
        what="feature network",
    )
    guessed = predict(model, images.images[held_out]).argmax(axis=1)
    accuracy = float((guessed == images.labels[held_out]).mean())
    return TrainedFeatures(model, accuracy=accuracy, num_held_out=len(held_out))


def _read(path: Path, images: ImageSet) -> TrainedFeatures | None:
    """The network in a file, or None if there is none or it is not what was written."""
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        if tensor_digest(tensors) != metadata["digest"]:
            return None
        return TrainedFeatures(
            _with_weights(tensors, images),
            accuracy=float(metadata["accuracy"]),
            num_held_out=int(metadata["num_held_out"]),
        )
    except (StoreError, KeyError, ValueError, RuntimeError):
        return None


def _with_weights(tensors: Mapping[str, torch.Tensor], images: ImageSet) -> SmallClassifier:
    with torch.random.fork_rng(devices=[]):
        model = SmallClassifier(
            channels=images.images.shape[1],
            resolution=images.images.shape[2],
            num_classes=images.num_classes,
        )
    model.load_state_dict(tensors, strict=True)
    model = model.to(memory_format=torch.channels_last)
    return model.eval()
