"""Every kind of image file, told by its name: pictures, DICOM, NIfTI."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedpdm.data import pictures
from fedpdm.data.pictures import Header, Shown
from fedpdm.data.rawsplit import Decoded

__all__ = ["IMAGE_SUFFIXES", "decode_image", "is_image_name", "read_header"]

#: File name endings, in any case, that count as pictures.
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_DICOM: Final = (".dcm", ".dicom")
_NIFTI: Final = (".nii", ".nii.gz")


def is_image_name(name: str) -> bool:
    """Whether a file of that name is an image."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *_DICOM, *_NIFTI))


def read_header(file: Path, shown: Shown) -> Header:
    """What is known of a file before its pixels are read; `ValueError` if it is not to be shown."""
    name = file.name.lower()
    if name.endswith((*_DICOM, *_NIFTI)):
        from fedpdm.data import medical

        read = medical.read_dicom_header if name.endswith(_DICOM) else medical.read_nifti_header
        return read(file, shown)
    return pictures.read_header(file, shown)


def decode_image(file: Path, number: int, shown: Shown) -> Decoded:
    """One image of a file, its frame or slice `number`, (C, H, W) uint8; `ValueError` names it."""
    name = file.name.lower()
    if name.endswith((*_DICOM, *_NIFTI)):
        from fedpdm.data import medical

        decode = medical.decode_dicom if name.endswith(_DICOM) else medical.decode_nifti
        return decode(file, number, shown)
    return pictures.decode_picture(file, number, shown)
