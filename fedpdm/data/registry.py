"""What a data set is: one `DataSet`, of this package or custom, found by `data_set`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpdm.config import ConfigError
from fedpdm.config.names import DATA_SETS, Coloring, Frames
from fedpdm.config.plugins import is_named, load_kind
from fedpdm.data.rawsplit import RawSplit, Split

__all__ = ["BLACK", "MID_GREY", "DataSet", "Request", "data_set"]

BLACK: Final = -1.0
MID_GREY: Final = 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be read.

    Attributes:
        split: "train" or "test"; own images without a split have `split_of`.
        root: the folder or file where the images are; None for a set that needs none.
        resolution: what `RawSplit.read` will be asked for, or None for the set's own.
        attributes: those that make the classes, for a set that has attributes.
        download: whether missing files may be fetched.
        background: level in [-1, 1] that is seen through what is transparent.
        value_range: stored values of images with more than 8 bits that become black and white.
        frames: what is done with a file of several frames, one of `FRAMES`.
        whole: own images without a split of their own are all training images.
    """

    split: Split
    root: Path | None = None
    resolution: int | None = None
    attributes: Sequence[str] | None = None
    download: bool = False
    background: float = MID_GREY
    value_range: tuple[float, float] | None = None
    frames: Frames = "refuse"
    whole: bool = False

    @property
    def path(self) -> Path:
        """`root` of a set that `needs` files."""
        assert self.root is not None
        return self.root


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: how it is read, and what is known of it before; None where only the files tell.

    Attributes:
        read: reads the labels of one split; pixels are decoded when they are asked for. ValueError
            or OSError, one line, for what is not there.
        description: one line for people.
        num_classes: number of classes.
        channels: channels of the loaded images (with the default colouring), 1 or 3.
        resolution: height and width in pixels, without `data.resolution`.
        background: public background level in [-1, 1], the default `shift`: -1 black, 0 mid-grey.
        needs: what must lie at `data.root`, in words; empty for a set that needs no files.
        fetches: whether `data.download` fetches them.
        clients_own: whether the files are a client's own, not a public set that all know alike.
        coloring: the default colouring.
        shows_files: whether images are read from files as a viewer shows them: `data.background`,
            `data.black`, `data.white` and `data.frames` count.
        colorable: whether images may be coloured: one channel, bright on black.
        colored_by_place: whether drawn colours follow a published sequence by an image's place,
            not the image itself: for a set whose files are the same everywhere and for ever.
        grey: for a set that is always coloured, the name of the same images in grey.
        has_attributes: whether `data.attributes` may choose its classes.
    """

    read: Callable[[Request], RawSplit]
    description: str
    num_classes: int | None = None
    channels: int | None = None
    resolution: int | None = None
    background: float = MID_GREY
    needs: str = ""
    fetches: bool = False
    clients_own: bool = False
    shows_files: bool = False
    coloring: Coloring = "none"
    colorable: bool = False
    colored_by_place: bool = False
    grey: str | None = None
    has_attributes: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the shape of its images and its classes are known before it is read."""
        return None not in (self.num_classes, self.channels, self.resolution)


def data_set(name: str) -> DataSet:
    """The data set of a name of `DATA_SETS`, or of the custom one at `package.module:NAME`.

    `ConfigError`, one line, for a name that is not known and for what is no `DataSet`.
    """
    if not is_named(name) and name not in DATA_SETS:
        close = difflib.get_close_matches(str(name), DATA_SETS, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"data.name: unknown data set {name!r}{guess} (known: {', '.join(DATA_SETS)})"
        )
    return load_kind(DATA_SETS.get(name, name), DataSet, key="data.name")
