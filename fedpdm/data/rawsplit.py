"""One split of a data set before its pixels are read: what each reader hands to `sources`."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.identity import identity, stack_digests
from fedpdm.data.resizing import resize

__all__ = [
    "EVERYTHING",
    "ArrayReader",
    "Decoded",
    "FileReader",
    "Inventory",
    "RawSplit",
    "Reader",
    "Split",
    "split_of",
]

Split = Literal["train", "test"]

_TEST_SHARE: Final = 10  # one in ten
_NAMES_SHOWN: Final = 10


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What lies at `data.root` and is not among the images that were read.

    `unused` has each file that is not used, with the reason in brackets; `set_aside` counts the
    images that are in the other split, `left_out` those that `data.classes` and
    `data.max_images` leave out.
    """

    unused: tuple[str, ...] = ()
    set_aside: int = 0
    left_out: int = 0

    def words(self, *, split: Split = "train") -> str:
        """One line on all of it, at most ten files by name; empty where everything is used."""
        other = "test" if split == "train" else "training"
        parts = [
            f"{self.set_aside:,} set aside as {other} images" if self.set_aside else "",
            f"{self.left_out:,} left out by data.classes or data.max_images"
            if self.left_out
            else "",
        ]
        if count := len(self.unused):
            more = f" and {count - _NAMES_SHOWN:,} more" if count > _NAMES_SHOWN else ""
            files = "file is" if count == 1 else "files are"
            parts.append(
                f"{count:,} {files} not used: {', '.join(self.unused[:_NAMES_SHOWN])}{more}"
            )
        return "; ".join(filter(None, parts))


EVERYTHING: Final = Inventory()  # is used


class Reader(abc.ABC):
    """A `RawSplit.read` that also says what each image is known by."""

    @abc.abstractmethod
    def load(
        self, positions: NDArray[np.int64], resolution: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """What `RawSplit.load` returns."""

    def __call__(self, positions: NDArray[np.int64], resolution: int | None) -> NDArray[np.uint8]:
        """(n, C, H, W) uint8, resized if `resolution` is given."""
        return self.load(positions, resolution)[0]


@dataclass(frozen=True, kw_only=True)
class RawSplit:
    """Labels of all images, and a way to read the pixels of some of them.

    Attributes:
        labels: (N,) int64; N may be 0.
        class_names: one name per class.
        read: takes (n,) positions in [0, N) and a resolution in pixels or None, and returns
            (n, C, H, W) uint8. Only the images that are asked for are decoded. An image is known by
            what is read without a resolution, which must depend on that image alone; a `Reader`
            says itself what it is known by.
        clients: N names of who holds each image, where the files say it.
        subjects: N names of whom each image shows, empty where the files do not say it; None where
            they say it of none.
        inventory: what is there besides.
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[NDArray[np.int64], int | None], NDArray[np.uint8]]
    clients: tuple[str, ...] | None = None
    subjects: tuple[str, ...] | None = None
    inventory: Inventory = EVERYTHING

    def load(
        self, positions: NDArray[np.int64], resolution: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images (n, C, H, W) uint8 at `positions`, and their identities (n, 32) uint8."""
        if isinstance(self.read, Reader):
            return self.read.load(positions, resolution)
        images = self.read(positions, resolution)
        came: Iterable[NDArray[np.uint8]] = images
        if resolution is not None:
            came = (self.read(positions[k : k + 1], None)[0] for k in range(len(positions)))
        return images, stack_digests(map(identity, came))

    def identities(self) -> NDArray[np.uint8]:
        """What every image of the split is known by, (N, 32) uint8; all are decoded."""
        each = np.arange(len(self.labels)).reshape(-1, 1)
        return np.concatenate([self.load(position, None)[1] for position in each])


@dataclass(frozen=True, kw_only=True)
class ArrayReader(Reader):
    """The `read` of a split whose pixels are in memory, `images` (N, C, H, W) uint8."""

    images: NDArray[np.uint8]

    def load(
        self, positions: NDArray[np.int64], resolution: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        images = self.images[positions]
        known = stack_digests(map(identity, images))
        return images if resolution is None else resize(images, resolution=resolution), known


class Decoded(NamedTuple):
    """One image of a file as it is shown, `pixels` (C, H, W) uint8, what it is known by, and
    whether versions that left orientation and transparency aside read other pixels."""

    pixels: NDArray[np.uint8]
    known: bytes
    altered: bool = False


@dataclass(frozen=True, kw_only=True)
class FileReader(Reader):
    """The `read` of a split whose images are decoded one by one.

    `decode` takes a position and returns (C, H, W) uint8 as the file has it, by which the image is
    known, or `Decoded`. The split has
    `channels`: a grey image gets three equal bands where others are in colour. `resolution` is used
    where none is asked for. `altered` are positions of those that were loaded so far and that
    `Decoded.altered` is true of.
    """

    decode: Callable[[int], NDArray[np.uint8] | Decoded]
    channels: int
    resolution: int | None = None
    altered: set[int] = field(default_factory=set, init=False, compare=False)

    def load(
        self, positions: NDArray[np.int64], resolution: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        side = self.resolution if resolution is None else resolution
        images: NDArray[np.uint8] | None = None
        known = []
        for row, position in enumerate(positions.tolist()):
            found = self.decode(position)
            if isinstance(found, Decoded):
                pixels = found.pixels
                known.append(found.known)
                if found.altered:
                    self.altered.add(position)
            else:
                pixels = found
                known.append(identity(pixels))
            if side is not None:
                pixels = resize(pixels[None], resolution=side)[0]
            if images is None:
                images = np.empty((len(positions), self.channels, *pixels.shape[1:]), np.uint8)
            images[row] = pixels
        assert images is not None  # at least one position
        return images, stack_digests(known)


def split_of(content: bytes | memoryview) -> Split:
    """Which split an image belongs to where the data set has none: about one in ten is test.

    It depends on the content alone (SHA-256), so it is the same on every machine, survives
    added, renamed and reordered images, and puts equal copies on the same side.
    """
    digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return "test" if digest % _TEST_SHARE == 0 else "train"
