"""Readers of a client's own image files: folders, or a CSV file that lists them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedpdm.data.finding import Found, Listed, find_clients, find_images, read_table
from fedpdm.data.formats import decode_image, read_header
from fedpdm.data.pictures import Header, Shown
from fedpdm.data.rawsplit import Decoded, FileReader, Inventory, RawSplit, Split, split_of
from fedpdm.data.registry import DataSet, Request

__all__ = ["CLIENT_FOLDERS", "IMAGE_FOLDER", "read_files"]


@dataclass(frozen=True, kw_only=True)
class _Image:
    """One image: its file, which of the file's images it is, and whom it shows."""

    listed: Listed
    number: int
    subject: str


def read_files(found: Found, request: Request) -> RawSplit:
    """One split of image files. Images are RGB unless every file of both splits is grey.

    Where nothing says the split, it is `split_of` each file's bytes, or with `Request.whole` all
    are training images. Where the files' subjects are known, all images of a subject are on one
    side, as far as that leaves none of the sides empty.

    Raises:
        ValueError: if an image is unreadable or not to be shown, or sizes differ and no resolution
            was given; names the files.
    """
    shown = Shown.of(request)
    headers = [read_header(listed.file, shown) for listed in found.files]
    if request.resolution is None:
        _check_sizes(found.files, headers)
    images = [
        _Image(listed=listed, number=number, subject=listed.subject or header.subject)
        for listed, header in zip(found.files, headers, strict=True)
        for number in range(len(header.sizes))
    ]
    sides = _sides(images, whole=request.whole)
    chosen = [image for image, side in zip(images, sides, strict=True) if side == request.split]
    aside = len(images) - len(chosen)
    numbers = {label: number for number, label in enumerate(found.class_names)}
    clients = tuple(image.listed.client for image in chosen)
    subjects = tuple(image.subject for image in chosen)
    return RawSplit(
        labels=np.array([numbers[image.listed.label] for image in chosen], dtype=np.int64),
        class_names=found.class_names,
        read=FileReader(
            decode=functools.partial(_decode_one_of, tuple(chosen), shown),
            channels=1 if all(header.is_grey for header in headers) else 3,
        ),
        clients=clients if any(clients) else None,
        subjects=subjects if any(subjects) else None,
        inventory=Inventory(unused=found.unused, set_aside=aside),
    )


def _check_sizes(files: Sequence[Listed], headers: Sequence[Header]) -> None:
    sizes = [(f.file, size) for f, h in zip(files, headers, strict=True) for size in h.sizes]
    for file, size in sizes:
        if size != sizes[0][1]:
            (first, first_size) = sizes[0]
            raise ValueError(
                f"data.root: images differ in size, {first} is {_describe(first_size)} and "
                f"{file} is {_describe(size)}; set data.resolution to resize them"
            )


def _describe(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _sides(images: Sequence[_Image], *, whole: bool) -> list[Split]:
    """Which split each image belongs to."""
    said: dict[str, Split] = {"train": "train", "test": "test"}
    if whole:
        return [said.get(image.listed.part, "train") for image in images]
    open_ones = [image for image in images if not image.listed.part]
    by_subject: dict[str, Split] = {}
    if open_ones and all(image.subject for image in open_ones):
        by_subject = {each.subject: split_of(each.subject.encode()) for each in open_ones}
        if len(set(by_subject.values())) == 1:
            by_subject = {}
    by_content: dict[Path, Split] = {}
    for each in () if by_subject else open_ones:
        if each.listed.file not in by_content:
            by_content[each.listed.file] = split_of(each.listed.file.read_bytes())
    return [
        said.get(image.listed.part)
        or by_subject.get(image.subject)
        or by_content[image.listed.file]
        for image in images
    ]


def _decode_one_of(images: tuple[_Image, ...], shown: Shown, position: int) -> Decoded:
    image = images[position]
    return decode_image(image.listed.file, image.number, shown)


def _read_folder(request: Request) -> RawSplit:
    root, name = request.path, "image_folder"
    if root.suffix.lower() == ".csv" and not root.is_dir():
        return read_files(read_table(root), request)
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    if parts and request.split not in parts:
        raise FileNotFoundError(f"data.root: {name} has no folder {root / request.split}")
    return read_files(find_images(root, name=name), request)


def _read_clients(request: Request) -> RawSplit:
    return read_files(find_clients(request.path), request)


IMAGE_FOLDER: Final = DataSet(
    read=_read_folder,
    description="own images, one folder per class",
    needs="train/<class>/*.png or <class>/*.png (data.root is that folder, or a CSV file)",
    clients_own=True,
    shows_files=True,
    colorable=True,
)
CLIENT_FOLDERS: Final = DataSet(
    read=_read_clients,
    description="own images, one folder per client with one per class",
    needs="<client>/<class>/*.png (data.root is that folder)",
    clients_own=True,
    shows_files=True,
    colorable=True,
)
