"""DICOM and NIfTI files as images: rescaled, windowed, sliced. Needs `fedpdm[medical]`.

An image is known by its stored values, before a window or a range is chosen. Whom it shows is said
by DICOM's patient id and by NIfTI's file name: a volume is one subject, each slice an image.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.identity import identity, pixel_digest
from fedpdm.data.pictures import Header, Shown, scaled_to_levels
from fedpdm.data.rawsplit import Decoded

__all__ = ["decode_dicom", "decode_nifti", "read_dicom_header", "read_nifti_header"]

_MONOCHROME: Final = ("MONOCHROME1", "MONOCHROME2")
_COLORS: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_WINDOWS: Final = ("", "LINEAR", "LINEAR_EXACT")
_RANGE: Final = "set data.black and data.white to the values that become black and white"


def _missing(name: str, file: Path) -> ValueError:
    return ValueError(
        f"data.root: {file} needs {name}: pip install 'fedpdm[medical]', or move the file away"
    )


# --- DICOM ----------------------------------------------------------------------------------


def _dataset(file: Path, **options: Any) -> Any:
    try:
        import pydicom
    except ImportError:
        raise _missing("pydicom", file) from None
    try:
        return pydicom.dcmread(file, **options)
    except Exception as error:
        raise ValueError(f"data.root: {file} is not a readable DICOM file: {error}") from None


def read_dicom_header(file: Path, shown: Shown) -> Header:
    """What a DICOM file says of its image.

    Raises:
        ValueError: for a file without an image, of a kind that is not shown, with several frames
            that are refused, or with more than 8 bits and neither a window nor a stated range.
    """
    found = _dataset(file, stop_before_pixels=True)
    kind = str(found.get("PhotometricInterpretation", "no image"))
    if kind not in _MONOCHROME + _COLORS or "Rows" not in found or "Columns" not in found:
        raise ValueError(
            f"data.root: {file} must be one of {', '.join(_MONOCHROME + _COLORS)}, is {kind}"
        )
    count = shown.count(int(found.get("NumberOfFrames") or 1), file=file)
    if kind in _MONOCHROME:
        _window(file, found, shown)
    elif int(found.get("BitsAllocated", 8)) != 8:
        raise ValueError(f"data.root: {file} must have 8 bits per colour")
    size = (int(found.Columns), int(found.Rows))
    subject = str(found.get("PatientID") or "").strip()
    return Header(is_grey=kind in _MONOCHROME, sizes=(size,) * count, subject=subject)


def _window(file: Path, found: Any, shown: Shown) -> tuple[float, float]:
    """The rescaled values that become black and white: as stated, or the file's first window."""
    if shown.value_range is not None:
        return shown.value_range
    center, width = (_first(found.get(key)) for key in ("WindowCenter", "WindowWidth"))
    function = str(found.get("VOILUTFunction") or "")
    if center is not None and width is not None and function in _WINDOWS:
        if function != "LINEAR_EXACT":  # DICOM PS3.3 C.11.2.1.2.1
            center, width = center - 0.5, width - 1.0
        if width <= 0.0:
            raise ValueError(f"data.root: {file} has a window of no width; {_RANGE}")
        return center - width / 2.0, center + width / 2.0
    plain = "RescaleSlope" not in found and "ModalityLUTSequence" not in found
    if plain and int(found.get("BitsStored", 16)) == 8 and not found.get("PixelRepresentation"):
        return 0.0, 255.0
    raise ValueError(f"data.root: {file} has no linear window; {_RANGE}")


def _first(value: Any) -> float | None:
    """A number, or the first of several."""
    several = isinstance(value, list | tuple) or type(value).__name__ == "MultiValue"
    if several:
        value = value[0] if len(value) else None
    return None if value is None else float(value)


def decode_dicom(file: Path, frame: int, shown: Shown) -> Decoded:
    """One frame, (C, H, W) uint8: rescaled, windowed, MONOCHROME1 turned so that high is bright."""
    found = _dataset(file)
    try:
        from pydicom.pixels.processing import apply_modality_lut
        from pydicom.pixels.utils import pixel_array

        stored = np.asarray(pixel_array(found, index=frame))
        values = apply_modality_lut(stored, found)
    except Exception as error:
        raise ValueError(f"data.root: {file} is not a readable DICOM image: {error}") from None
    kind = str(found.PhotometricInterpretation)
    if kind not in _MONOCHROME:
        color = np.ascontiguousarray(stored.astype(np.uint8).transpose(2, 0, 1))
        return Decoded(color, identity(color))
    levels = scaled_to_levels(np.asarray(values)[None], _window(file, found, shown))
    known = pixel_digest(np.ascontiguousarray(stored)[None])
    return Decoded(255 - levels if kind == "MONOCHROME1" else levels, known)


# --- NIfTI ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # the slices of a file are asked for one after the other
def _volume(file: Path, changed: int) -> tuple[NDArray[np.generic], bool]:
    """(X, Y, S), scaled, X to the right, Y to the front, S upwards; and whether it is plain 8 bit.

    `changed` is when the file was: another file of this name is another volume.
    """
    try:
        import nibabel
    except ImportError:
        raise _missing("nibabel", file) from None
    try:
        image = nibabel.as_closest_canonical(nibabel.load(file))
        volume = np.asanyarray(image.dataobj)
    except Exception as error:
        raise ValueError(f"data.root: {file} is not a readable NIfTI file: {error}") from None
    while volume.ndim > 3 and volume.shape[-1] == 1:
        volume = volume[..., 0]
    if volume.ndim == 2:
        volume = volume[..., None]
    if volume.ndim != 3 or volume.dtype.kind not in "iuf" or 0 in volume.shape:
        raise ValueError(
            f"data.root: {file} must be a volume of numbers with three axes, has "
            f"{volume.dtype} of shape {volume.shape}"
        )
    return volume, volume.dtype == np.uint8


def read_nifti_header(file: Path, shown: Shown) -> Header:
    """The slices of a NIfTI file along its third axis, from the feet upwards.

    Raises:
        ValueError: for a file that is no volume, several slices that are refused, or values other
            than 8 bit without a stated range.
    """
    volume, plain = _volume(file, file.stat().st_mtime_ns)
    width, height, slices = volume.shape
    count = shown.count(slices, file=file, unit="slices")
    if not plain and shown.value_range is None:
        raise ValueError(f"data.root: {file} holds {volume.dtype} values; {_RANGE}")
    subject = file.name.removesuffix(".gz").removesuffix(".nii")
    return Header(is_grey=True, sizes=((width, height),) * count, subject=subject)


def decode_nifti(file: Path, number: int, shown: Shown) -> Decoded:
    """One slice, (1, H, W) uint8, the front of the body up."""
    volume, _ = _volume(file, file.stat().st_mtime_ns)
    values = np.ascontiguousarray(np.rot90(volume[..., number]), dtype=np.float64)[None]
    levels = scaled_to_levels(values, shown.value_range or (0.0, 255.0))
    return Decoded(levels, pixel_digest(values))
