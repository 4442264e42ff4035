"""The configuration's section `data`."""

from __future__ import annotations

from dataclasses import dataclass

from fedpdm.config.keys import ConfigError, key
from fedpdm.config.names import CLASS_LABELS, COLORINGS, DATA_SETS, FRAMES

__all__ = ["DataConfig", "check_data"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    name: str = key(
        "digits",
        "data set",
        choices=tuple(DATA_SETS),
        own=True,
    )
    root: str | None = key(None, "data directory (or .npz or .csv file); default: FEDPDM_DATA")
    download: bool = key(False, "let torchvision download what is missing")
    resolution: int | None = key(None, "resize to this many pixels; default: native", low=4)
    coloring: str | None = key(
        None,
        "colours for one-channel sets (docs/data.md)",
        choices=COLORINGS,
    )
    color_correlation: float | None = key(
        None,
        "correlated only: probability that the colour is the class's own, else uniform",
        low=0.0,
        high=1.0,
    )
    class_label: str = key(
        "digit",
        "what the class is: the set's own; of coloured sets also the colour, or both",
        choices=CLASS_LABELS,
    )
    attributes: tuple[str, ...] | None = key(
        None, "celeba: attributes whose combinations are classes; default: Black_Hair and Male"
    )
    classes: tuple[int | str, ...] | None = key(
        None,
        "keep these classes only, by name or number, in this order; default: all. Between "
        "institutions their names are compared with each node's",
    )
    channels: int | None = key(
        None, "what images must have, 1 or 3; default: as they are", low=1, high=3
    )
    max_images: int | None = key(None, "use a class-stratified subset of this size", low=1)
    background: float | None = key(
        None,
        "own files: level behind what is transparent, -1 black, 1 white; default: 0, mid-grey",
        low=-1.0, high=1.0,
    )  # fmt: skip
    black: float | None = key(
        None,
        "own files of more than 8 bits: stored value that becomes black (with white)",
        low=-1e6, high=1e6,
    )  # fmt: skip
    white: float | None = key(
        None, "own files of more than 8 bits: value that becomes white", low=-1e6, high=1e6
    )
    frames: str = key("refuse", "own files: one with several frames is", choices=FRAMES)
    holdout_fraction: float = key(
        0.1, "share of a client's images kept for evaluation", low=0.0, below=1.0
    )


def check_data(data: DataConfig) -> None:
    """`ConfigError` unless both ends of a range of values are given, or none, and for two
    channels."""
    if data.channels == 2:
        raise ConfigError("data.channels: must be 1 or 3, got 2")
    if (data.black is None) != (data.white is None):
        missing, given = ("white", "black") if data.white is None else ("black", "white")
        raise ConfigError(f"data.{missing}: must be given where data.{given} is, got null")
    if data.black is not None and data.black == data.white:
        raise ConfigError(f"data.white: must differ from data.black, got {data.white:g} for both")
