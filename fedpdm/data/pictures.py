"""One image file as a viewer shows it: turned upright, on a background, in 256 levels.

An image is known by the pixels that lie in its file, before any of this is done: so it stays the
same image whatever is decided here. Versions that left orientation and transparency aside knew it
by the same pixels. Where its colours are the same all over, and only the transparency shows
anything, the transparency counts as well.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.config.names import Frames
from fedpdm.data.identity import identity, pixel_digest
from fedpdm.data.rawsplit import Decoded
from fedpdm.data.registry import MID_GREY, Request

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Header", "Shown", "decode_picture", "read_header", "scaled_to_levels"]

_ORIENTATION: Final = 0x0112  # tag of EXIF
_GREY_MODES: Final = ("1", "L")
_COLOR_MODES: Final = ("RGB", "RGBA", "RGBX", "P", "LA", "PA", "CMYK", "YCbCr")
_DEEP_MODES: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_ALPHA_MODES: Final = ("RGBA", "LA", "PA")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How files are shown: keys of the section `data`."""

    background: float = MID_GREY
    value_range: tuple[float, float] | None = None
    frames: Frames = "refuse"

    @classmethod
    def of(cls, request: Request) -> Shown:
        return cls(
            background=request.background,
            value_range=request.value_range,
            frames=request.frames,
        )

    def count(self, there: int, *, file: object, unit: str = "frames") -> int:
        """How many of the frames of a file are images; `ValueError` where it is refused."""
        if there > 1 and self.frames == "refuse":
            raise ValueError(
                f"data.root: {file} has {there} {unit}; set data.frames to all (each is an image) "
                "or to first"
            )
        return there if self.frames == "all" else 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a file before its pixels are read: whether all is grey, the sizes (width,
    height) of its frames as shown, and whom it shows, "" where the file does not say it."""

    is_grey: bool
    sizes: tuple[tuple[int, int], ...]
    subject: str = ""


@contextlib.contextmanager
def _opened(file: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image file, for reading; `ValueError` if it is none, damaged, or too large."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit
            with Image.open(file if content is None else io.BytesIO(content)) as picture:
                yield picture
    except Image.DecompressionBombError as error:
        raise ValueError(f"data.root: {file} is too large to be read: {error}") from None
    except MemoryError:
        raise ValueError(f"data.root: {file} is larger than the free memory") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data.root: {file} is not a readable image: {error}") from error


def read_header(file: Path, shown: Shown, content: bytes | None = None) -> Header:
    """Mode, frames and sizes of an image file; `content` are its bytes where it is in another file.

    Raises:
        ValueError: if it is unreadable, has several frames that are refused, or more than 8 bits
            and no range is stated.
    """
    with _opened(file, content) as picture:
        # A photograph with a preview (MPO) is one picture.
        there = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        frames = []
        for number in range(there if shown.frames == "all" else 1):
            if number:
                picture.seek(number)
            width, height = picture.size
            turned = width != height and _orientation(picture) > 4
            frames.append((picture.mode, (height, width) if turned else (width, height)))
    for mode, _ in frames:
        _check_mode(file, mode, shown)
    shown.count(there, file=file)
    grey = all(mode in _GREY_MODES + _DEEP_MODES for mode, _ in frames)
    return Header(is_grey=grey, sizes=tuple(size for _, size in frames))


def _check_mode(file: Path, mode: str, shown: Shown) -> None:
    if mode in _DEEP_MODES:
        if shown.value_range is None:
            raise ValueError(
                f"data.root: {file} must have 8 bits per channel, got mode {mode}; for more, "
                "data.black and data.white say how they are shown"
            )
    elif mode not in _GREY_MODES + _COLOR_MODES:
        raise ValueError(f"data.root: {file} must have 8 bits per channel, got mode {mode}")


def _orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 where a tag is missing or damaged."""
    try:
        tag = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a picture with a damaged tag is a picture
        return 1
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def decode_picture(file: Path, frame: int, shown: Shown, content: bytes | None = None) -> Decoded:
    """One image of a file, (C, H, W) uint8: grey where that file is, whatever the others are."""
    with _opened(file, content) as picture:
        if frame:
            picture.seek(frame)
        alpha = None
        if picture.mode in _DEEP_MODES:
            assert shown.value_range is not None  # read_header
            stored = np.asarray(picture)[None]
            known, pixels = pixel_digest(stored), scaled_to_levels(stored, shown.value_range)
        else:
            if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
                alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
            if picture.mode in _GREY_MODES:
                pixels = np.asarray(picture.convert("L"))[None]
            else:
                pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
            known = identity(pixels)
        orientation = _orientation(picture)  # last: some formats are turned as they are read
    transparent = alpha is not None and bool((alpha < 255).any())
    if transparent:
        assert alpha is not None
        if (pixels == pixels[:, :1, :1]).all():
            known = pixel_digest(np.concatenate([pixels, alpha[None]]))
        pixels = _on_background(pixels, alpha, shown.background)
    upright = np.ascontiguousarray(_upright(pixels, orientation))
    return Decoded(upright, known, altered=transparent or orientation > 1)


def scaled_to_levels(stored: NDArray[np.generic], limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Values as levels, `limits` black and white; beyond them is black or white, NaN is black."""
    black, white = limits
    share = (np.nan_to_num(stored.astype(np.float64), nan=black) - black) / (white - black)
    return np.rint(share.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _on_background(
    pixels: NDArray[np.uint8], alpha: NDArray[np.uint8], background: float
) -> NDArray[np.uint8]:
    """Pixels (C, H, W) over a grey level, as far as `alpha` (H, W) lets it through."""
    level = round((background + 1.0) * 127.5)
    weight = alpha.astype(np.int64)
    mixed = pixels * weight + level * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(C, H, W) turned and mirrored as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return pixels
