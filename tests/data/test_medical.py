"""DICOM, NIfTI and Parquet files, written by their own libraries and read as images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow
import pyarrow.parquet
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedpdm.data import ImageSet, load_image_set
from fedpdm.data.identity import pixel_digest
from tests.support.pixels import exactly, random_pixels

STORED = np.array([[0, 1000, 1040], [1080, 1100, 4000]], np.uint16)


def write_dicom(path: Path, stored: NDArray[Any], **tags: Any) -> Path:
    """A CT image in explicit little endian; tags of None are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    bits = 8 * stored.dtype.itemsize
    color = stored.ndim == 3 and stored.shape[2] == 3
    if stored.ndim == 3 and not color:
        data.NumberOfFrames = len(stored)
    data.Rows, data.Columns = stored.shape[:2] if color else stored.shape[-2:]
    data.SamplesPerPixel = 3 if color else 1
    if color:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = 0
    data.PatientID = "P7"
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = stored.tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def load(root: Path, split: str = "train", name: str = "image_folder", **options: Any) -> ImageSet:
    options = {"whole": True, **options}
    return load_image_set(name, split=split, root=root, **options)  # type: ignore[arg-type]


HU = {"RescaleSlope": 1, "RescaleIntercept": -1000}


# --- DICOM ----------------------------------------------------------------------------------


def test_dicom_is_rescaled_and_windowed(tmp_path: Path) -> None:
    """Window 40, width 81 of Hounsfield units: 0 is black, 80 is white (PS3.3 C.11.2.1.2.1)."""
    write_dicom(tmp_path / "a" / "0.dcm", STORED, WindowCenter=[40.5, 7], WindowWidth=[81, 9], **HU)
    loaded = load(tmp_path)
    assert loaded.images[0, 0].tolist() == [[0, 0, 128], [255, 255, 255]]
    assert loaded.subjects == ("P7",)
    assert bytes(loaded.image_identities()[0]) == pixel_digest(STORED[None])
    stated = load(tmp_path, value_range=(-1000, 3000))
    assert stated.images[0, 0].tolist() == [[0, 64, 66], [69, 70, 255]]
    assert np.array_equal(stated.image_identities(), loaded.image_identities())


def test_monochrome1_is_turned_so_that_high_is_dark(tmp_path: Path) -> None:
    tags = {"WindowCenter": 40.5, "WindowWidth": 81, **HU}
    path = tmp_path / "a" / "0.dcm"
    write_dicom(path, STORED, PhotometricInterpretation="MONOCHROME1", **tags)
    assert load(tmp_path).images[0, 0].tolist() == [[255, 255, 127], [0, 0, 0]]


def test_dicom_of_8_bits_and_in_colour_is_shown_as_it_is(tmp_path: Path) -> None:
    grey, color = random_pixels(4, 6), random_pixels(4, 6, 3)
    write_dicom(tmp_path / "a" / "0.dcm", grey)
    assert np.array_equal(load(tmp_path).images[0, 0], grey)
    write_dicom(tmp_path / "a" / "1.DCM", color)
    assert np.array_equal(load(tmp_path).images[1], color.transpose(2, 0, 1))


def test_frames_of_dicom(tmp_path: Path) -> None:
    frames = random_pixels(5, 4, 6)
    path = write_dicom(tmp_path / "a" / "0.dcm", frames)
    with pytest.raises(ValueError, match=exactly(
        f"data.root: {path} has 5 frames; set data.frames to all (each is an image) or to first"
    )):  # fmt: skip
        load(tmp_path)
    assert np.array_equal(load(tmp_path, frames="all").images[:, 0], frames)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({}, "has no linear window; set data.black and data.white to the values that become "),
        (
            {"WindowCenter": 4, "WindowWidth": 9, "VOILUTFunction": "SIGMOID"},
            "has no linear window",
        ),
        ({"WindowCenter": 40, "WindowWidth": 1}, "has a window of no width; set data.black and"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "must be one of .*, is PALETTE COLOR$"),
    ],
)
def test_dicom_that_is_refused(tmp_path: Path, tags: dict[str, Any], message: str) -> None:
    write_dicom(tmp_path / "a" / "0.dcm", STORED, **tags)
    with pytest.raises(ValueError, match=rf"^data.root: .*0.dcm {message}"):
        load(tmp_path)


def test_a_file_that_is_no_dicom_and_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.dcm").write_bytes(b"no DICOM")
    with pytest.raises(ValueError, match=r"^data.root: .*0.dcm is not a readable DICOM file: "):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"0.dcm needs pydicom: pip install 'fedpdm\[medical\]'"):
        load(tmp_path)


# --- NIfTI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_slices_of_nifti(tmp_path: Path, suffix: str) -> None:
    """Along the axis from the feet to the head, the front up, whatever the file's own order."""
    volume = np.arange(5 * 4 * 3, dtype=np.int16).reshape(5, 4, 3)
    path = tmp_path / "a" / f"anna.{suffix}"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    with pytest.raises(ValueError, match=r"has 3 slices; set data.frames to all \(each is"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"holds int16 values; set data.black and data.white to"):
        load(tmp_path, frames="all")
    loaded = load(tmp_path, frames="all", value_range=(0, 255))
    assert loaded.images.shape == (3, 1, 4, 5)
    assert loaded.subjects == ("anna",) * 3
    for number in range(3):
        assert np.array_equal(loaded.images[number, 0], volume[:, ::-1, number].T)
    turned = np.diag([-1.0, 1.0, 1.0, 1.0])  # the file counts to the left
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(volume[::-1]), turned), path)
    again = load(tmp_path, frames="all", value_range=(0, 255))
    assert np.array_equal(again.images, loaded.images)
    assert np.array_equal(again.image_identities(), loaded.image_identities())


def test_nifti_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a" / "0.nii"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 3, 2), np.uint8), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"0.nii must be a volume of numbers with three axes, "):
        load(tmp_path, frames="all")
    path.write_bytes(b"no volume")
    with pytest.raises(ValueError, match=r"0.nii is not a readable NIfTI file: "):
        load(tmp_path, frames="all")


# --- Parquet --------------------------------------------------------------------------------


def write_parquet(path: Path, images: NDArray[np.uint8], labels: list[Any], **columns: str) -> None:
    """As `datasets` writes it: encoded images as bytes, features in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = []
    for pixels in images:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        cells.append({"bytes": content.getvalue(), "path": None})
    image, label = columns.get("image", "image"), columns.get("label", "label")
    table = pyarrow.table({image: cells, label: labels})
    features = {image: {"_type": "Image"}, label: {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    if isinstance(labels[0], int):
        said = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": said})
    pyarrow.parquet.write_table(table, path)


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    images = random_pixels(7, 4, 4)
    names = {"image": "scan", "label": "animal"}
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:3], [0, 1, 1], **names)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", images[3:5], [1, 0], **names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[5:], [0, 1], **names)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", images[:1], [0], **names)
    (tmp_path / "README.md").write_text("x")
    train, test = load(tmp_path, name="parquet"), load(tmp_path, "test", "parquet")
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1, 1, 0]
    assert np.array_equal(train.images[:, 0], images[:5])
    assert np.array_equal(test.images[:, 0], images[5:])
    assert train.inventory.unused == ("README.md", "data/validation-00000-of-00001.parquet")
    assert np.array_equal(train.image_identities(), train.image_digests())


def test_parquet_without_splits_or_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0000.parquet", random_pixels(40, 4, 4), ["b", "a"] * 20)
    every = load(tmp_path, name="parquet")
    assert (len(every), every.class_names, every.labels.tolist()[:2]) == (40, ("a", "b"), [1, 0])
    parts = [load(tmp_path, s, "parquet", whole=False) for s in ("train", "test")]
    assert len(parts[0]) + len(parts[1]) == 40


def test_parquet_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data.root: parquet expects .*train\*.parquet"):
        load(tmp_path, name="parquet")
    path = tmp_path / "train.parquet"
    path.write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"train.parquet is not a readable Parquet file: "):
        load(tmp_path, name="parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"must have a column label, has image, text$"):
        load(tmp_path, name="parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(ValueError, match=r"train.parquet has no images with their bytes: "):
        load(tmp_path, name="parquet")
    cell = {"bytes": b"no picture", "path": None}
    pyarrow.parquet.write_table(pyarrow.table({"image": [cell], "label": [0]}), path)
    with pytest.raises(ValueError, match=r"train.parquet/row 0 is not a readable image: "):
        load(tmp_path, name="parquet")
