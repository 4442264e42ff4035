"""Images that a user calls public: where they come from, and their norms.

Nothing here adds noise, so nothing here is covered by the privacy guarantee.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.config.names import DATA_SETS
from fedpdm.data import SPLITS, data_set, load_image_set, normalize, stratified_positions
from fedpdm.data.rawsplit import RawSplit
from fedpdm.data.registry import Request

__all__ = ["QUANTILES", "PublicImages", "open_public_images", "sorted_norms"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_IMAGES = 20_000
CHUNK_PIXELS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class PublicImages:
    """N images that are read when they are asked for.

    `read` takes positions (n,) in [0, N) and returns (n, C, H, W) uint8; `labels` is int64 (N,);
    `background` is the default shift of the set.
    """

    source: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    background: float
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.labels)


def open_public_images(
    source: str, *, option: str, resolution: int | None = None, max_images: int = MAX_IMAGES
) -> PublicImages:
    """The images of a data set by name, of a folder with a folder per class, or of a .npz file.

    Of a data set by name these are its training images, of your own files all. At most
    `max_images` of them, chosen by `stratified_positions`. `ValueError` naming `option` for
    anything else, and for a source without images.
    """
    names = [name for name in DATA_SETS if not data_set(name).clients_own]
    if source in names:
        images = load_image_set(source, split="train", resolution=resolution, max_images=max_images)
        return PublicImages(
            source=source,
            labels=images.labels,
            class_names=images.class_names,
            background=images.background,
            read=lambda positions: images.images[positions],
        )
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        kind = "npz"
    elif path.is_dir() or (path.suffix == ".csv" and path.is_file()):
        kind = "image_folder"
    else:
        near = difflib.get_close_matches(source, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{option}: must be a folder, a .npz file or one of {', '.join(names)}, "
            f"got {source!r}{hint}"
        )
    parts: Any = [part for part in SPLITS if (path / part).is_dir()] or SPLITS
    raws = [
        data_set(kind).read(Request(split=part, root=path, resolution=resolution)) for part in parts
    ]
    labels = np.concatenate([raw.labels for raw in raws])
    if len(labels) == 0:
        raise ValueError(f"{option}: {source} has no image")
    chosen = stratified_positions(labels, max_images=max_images)
    return PublicImages(
        source=source,
        labels=labels[chosen],
        class_names=raws[0].class_names,
        background=data_set(kind).background,
        read=lambda positions: _read(raws, chosen[positions], option, resolution),
    )


def _read(
    raws: list[RawSplit], positions: NDArray[np.int64], option: str, resolution: int | None
) -> NDArray[np.uint8]:
    """Images at positions in the splits laid end to end, in that order."""
    ends = np.cumsum([len(raw.labels) for raw in raws])
    owners = np.searchsorted(ends, positions, side="right")
    images: dict[int, NDArray[np.uint8]] = {}
    for owner, raw in enumerate(raws):
        rows = np.flatnonzero(owners == owner)
        if len(rows):
            start = int(ends[owner]) - len(raw.labels)
            images |= zip(rows.tolist(), raw.read(positions[rows] - start, resolution), strict=True)
    shapes = sorted({image.shape for image in images.values()})
    if len(shapes) > 1:
        raise ValueError(
            f"{option}: images must have one shape, got {shapes[0]} and {shapes[1]}; "
            "give --resolution"
        )
    return np.stack([images[row] for row in range(len(positions))])


def sorted_norms(images: PublicImages, *, shift: float) -> NDArray[np.float64]:
    """L2 norms (N,), ascending, of images in [-1, 1] minus the shift, as clipping sees them.

    Images are read in chunks, so that memory is bounded.
    """
    size = max(1, images.read(np.zeros(1, dtype=np.int64))[0].size)
    chunk = max(1, CHUNK_PIXELS // size)
    norms = np.empty(len(images), dtype=np.float64)
    for start in range(0, len(images), chunk):
        positions = np.arange(start, min(start + chunk, len(images)))
        x_0 = normalize(images.read(positions), shift=shift)
        norms[positions] = x_0.flatten(1).double().norm(dim=1).numpy()
    return np.sort(norms)
