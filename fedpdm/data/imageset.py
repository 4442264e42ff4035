"""A labelled set of images, and the scale on which models see them.

Pixels are kept as uint8 and scaled batch by batch:

    x_0 = pixel / 127.5 - 1 - shift

`shift` is a public constant that is chosen without looking at the data (the background level
of the data set, -1 for black, 0 for mid-grey). Subtracting it before clipping costs no privacy
and shrinks the norm that has to be hidden (docs/method.md, section 2).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.data.identity import identity, pixel_digest, stack_digests
from fedpdm.data.rawsplit import EVERYTHING, Inventory

__all__ = ["ImageSet", "denormalize", "normalize"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """N labelled images of one size; nothing in it can be reassigned or written to.

    The arrays are read-only views: they share memory with the arrays that were given, which
    the caller should not write to afterwards.

    Attributes:
        images: (N, C, H, W) uint8, 0..255; C is 1 (grey) or 3 (RGB); N >= 1.
        labels: (N,) int64, each in [0, num_classes).
        class_names: one distinct name per class, K >= 1 of them. A class may have no image.
        background: public, data-independent background level in [-1, 1], the default `shift`
            of `normalize`: -1 for sets on black, 0 (mid-grey) otherwise.
        identities: (N, 32) uint8, what each image is known by: the digest of its pixels as they
            came in (`fedpdm.data.identity`). None if nothing was done to them since.
        altered: N of whether earlier versions read other pixels of the same file
            (`fedpdm.data.pictures`); None where they did of none.
        clients: N names of who holds each image in a simulation, where the files say it.
        subjects: N names of whom each image shows, "" where unknown; None where the files say it of
            none.
        inventory: what lies beside these images and is not used.

    Raises:
        ValueError: if a field breaks what is said above; the line names field and value.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    background: float
    identities: NDArray[np.uint8] | None = None
    altered: tuple[bool, ...] | None = None
    clients: tuple[str, ...] | None = None
    subjects: tuple[str, ...] | None = None
    inventory: Inventory = EVERYTHING

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_class_names(self.class_names)
        _check_labels(self.labels, num_images=len(self.images), num_classes=self.num_classes)
        if not -1.0 <= self.background <= 1.0:  # also refuses NaN
            raise ValueError(f"background must be in [-1, 1], got {self.background}")
        _check_identities(self.identities, num_images=len(self.images))
        for name in ("altered", "clients", "subjects"):
            names = getattr(self, name)
            if names is not None and len(names) != len(self.images):
                raise ValueError(
                    f"{name} must be {len(self.images)}, one per image, got {len(names)}"
                )
        for name in ("images", "labels", "identities"):
            if (array := getattr(self, name)) is not None:
                view = array.view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

    @property
    def num_classes(self) -> int:
        """Number of classes K, those without an image included."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.images)

    def subset(self, indices: NDArray[np.integer]) -> ImageSet:
        """A new set with the images at `indices`, in that order (a copy).

        Args:
            indices: (n,) integers in [0, N), n >= 1; repeats are kept.

        Raises:
            ValueError: if `indices` is empty, not one-dimensional, not whole or out of range.
        """
        index = np.asarray(indices)
        if index.ndim != 1 or index.dtype.kind not in "iu" or index.size == 0:
            raise ValueError(
                "indices must be a non-empty one-dimensional integer array, "
                f"got shape {index.shape} and dtype {index.dtype}"
            )
        outside = np.flatnonzero((index < 0) | (index >= len(self)))
        if outside.size:
            at = int(outside[0])
            raise ValueError(f"indices[{at}] must be in [0, {len(self)}), got {index[at]}")
        return ImageSet(
            images=self.images[index],
            labels=self.labels[index],
            class_names=self.class_names,
            background=self.background,
            identities=None if self.identities is None else self.identities[index],
            altered=_chosen(self.altered, index),
            clients=_chosen(self.clients, index),
            subjects=_chosen(self.subjects, index),
            inventory=self.inventory,
        )

    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits, over shapes, dtypes, pixels and labels.

        It depends on the values only, not on the memory layout, and not on class names or
        background. It is computed from raw data and is not covered by any privacy guarantee.
        """
        sha = hashlib.sha256()
        for array in (self.images, self.labels):
            sha.update(f"{array.shape}{array.dtype.str}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def image_digests(self) -> NDArray[np.uint8]:
        """SHA-256 of each image's shape and pixels as they are here, (N, 32) uint8.

        It depends on the pixels only, not on label, position, file or memory layout. Digests of
        private images are private: whoever has one can test a guess.
        """
        return stack_digests(map(pixel_digest, self.images))

    def image_identities(self) -> NDArray[np.uint8]:
        """What each image is known by, (N, 32) uint8: `identities`, or those of the pixels here."""
        if self.identities is not None:
            return self.identities
        return stack_digests(map(identity, self.images))

    def distinct(self) -> NDArray[np.int64]:
        """Positions (n,) of the first of each group of equal images, in order; n <= N.

        Images are equal that came in alike, and those whose pixels here are alike.
        """
        seen: set[bytes] = set()
        first = []
        both = zip(self.image_identities(), self.image_digests(), strict=True)
        for position, (known, pixels) in enumerate(both):
            keys = {b"i" + known.tobytes(), b"p" + pixels.tobytes()}
            if seen.isdisjoint(keys):
                seen |= keys
                first.append(position)
        return np.array(first, dtype=np.int64)


def _chosen(values: tuple[T, ...] | None, index: NDArray[np.integer]) -> tuple[T, ...] | None:
    return None if values is None else tuple(values[position] for position in index.tolist())


def _check_images(images: NDArray[np.uint8]) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images must be a uint8 array, got {got}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"images must have shape (N, C, H, W) with C 1 or 3, got shape {images.shape}"
        )
    if len(images) == 0:
        raise ValueError("images must hold at least 1 image, got 0")


def _check_class_names(class_names: tuple[str, ...]) -> None:
    if not isinstance(class_names, tuple) or not class_names:
        raise ValueError(f"class_names must be a tuple of at least 1 name, got {class_names!r}")
    seen: set[str] = set()
    for name in class_names:
        if not isinstance(name, str) or not name or name in seen:
            raise ValueError(f"class_names must be distinct and not empty, got {name!r}")
        seen.add(name)


def _check_labels(labels: NDArray[np.int64], *, num_images: int, num_classes: int) -> None:
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64:
        got = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"labels must be an int64 array, got {got}")
    if labels.shape != (num_images,):
        raise ValueError(
            f"labels must have shape ({num_images},), one per image, got shape {labels.shape}"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        at = int(outside[0])
        raise ValueError(f"labels[{at}] must be in [0, {num_classes}), got {labels[at]}")


def _check_identities(identities: NDArray[np.uint8] | None, *, num_images: int) -> None:
    if identities is not None and (
        identities.dtype != np.uint8 or identities.shape != (num_images, 32)
    ):
        raise ValueError(
            f"identities must be uint8 of shape ({num_images}, 32), one per image, got "
            f"{identities.dtype} of shape {identities.shape}"
        )


def normalize(
    images_uint8: torch.Tensor | NDArray[np.uint8],
    *,
    shift: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale pixels for a model: `pixel / 127.5 - 1 - shift`.

    Args:
        images_uint8: any shape, uint8, 0..255; a tensor stays on its device.
        shift: public background level in [-1, 1].
        out: float32 tensor of the same shape and device to write to; default: a new one.

    Returns:
        float32 tensor of the same shape (`out` if given), range [-1 - shift, 1 - shift].

    Raises:
        ValueError: if the dtype is not uint8 or `shift` is outside [-1, 1].
    """
    _check_shift(shift)
    if images_uint8.dtype not in (torch.uint8, np.uint8):
        raise ValueError(f"images_uint8 must be uint8, got {images_uint8.dtype}")
    pixels = images_uint8
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return torch.div(pixels, 127.5, out=out).sub_(1.0 + shift)


def denormalize(x: torch.Tensor, *, shift: float) -> torch.Tensor:
    """Inverse of `normalize`: `round((x + shift + 1) * 127.5)`, clamped to 0..255.

    Args:
        x: any shape, floating point, finite; values outside the range are clamped.
        shift: the `shift` given to `normalize`.

    Returns:
        uint8 tensor of the same shape on the same device.

    Raises:
        ValueError: if `x` is not floating point or not finite (how many values and the first
            are named), or `shift` is outside [-1, 1].
    """
    _check_shift(shift)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        bad = x[~torch.isfinite(x)]
        raise ValueError(f"x must be finite, got {bad.numel()} values such as {bad[0].item()}")
    pixels = (x.to(torch.float32) + (1.0 + shift)) * 127.5
    return pixels.round().clamp(0.0, 255.0).to(torch.uint8)


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and -1.0 <= shift <= 1.0):
        raise ValueError(f"shift must be in [-1, 1], got {shift}")
