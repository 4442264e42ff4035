"""Which files of a folder are images, of which class and whose; and which are not used, and why."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedpdm.data.formats import is_image_name

__all__ = [
    "Found",
    "Listed",
    "find_clients",
    "find_images",
    "in_order",
    "read_table",
]

_PARTS: Final = ("train", "test")
_NEEDED: Final = ("file", "label")
_OPTIONAL: Final = ("client", "subject", "split")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An image file: its class, its part ("train", "test", or "" where nothing says it), and who
    holds it and whom it shows, "" where nothing says it."""

    file: Path
    label: str
    part: str = ""
    client: str = ""
    subject: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Image files in order, all classes (some may have no file), and files that are not used."""

    files: tuple[Listed, ...]
    class_names: tuple[str, ...]
    unused: tuple[str, ...]


def find_images(root: Path, *, name: str = "image_folder") -> Found:
    """The files below `root/{train,test}/<class>`, or `root/<class>`, at any depth.

    Classes are the folder names of both parts in alphabetical order; an empty folder still is a
    class, so that clients can agree on the classes while some hold no image of one.

    Raises:
        FileNotFoundError: if there is no such folder, or no folder of a class in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: {name} has no folder {root}")
    parts = {part: root / part for part in _PARTS if (root / part).is_dir()}
    folders = parts or {"": root}
    class_names = tuple(sorted({each for at in folders.values() for each in _folders(at)}))
    if not class_names:
        raise FileNotFoundError(
            f"data.root: {name} expects {root}/train/<class>/*.png or {root}/<class>/*.png, "
            "found no class folder"
        )
    files: list[Listed] = []
    unused: list[str] = []
    for part, folder in folders.items():
        for label in class_names:
            for path in sorted(_walk(folder / label)):
                if why := _no_image(path):
                    unused.append(f"{path.relative_to(root)} ({why})")
                else:
                    files.append(Listed(file=path, label=label, part=part))
    for folder in {root, *folders.values()}:
        taken = {root / part for part in parts} if folder == root and parts else set()
        for entry in sorted(folder.iterdir()):
            beside = parts and folder == root and entry not in taken
            if entry.is_dir() and (beside or entry.name[0] == "."):
                unused += [f"{p.relative_to(root)} (in no class folder)" for p in _walk(entry)]
            elif not entry.is_dir():
                unused.append(f"{entry.relative_to(root)} (in no class folder)")
    return Found(files=tuple(files), class_names=class_names, unused=tuple(sorted(unused)))


def find_clients(root: Path) -> Found:
    """The files below `root/<client>`, each laid out as `find_images` has it, with all classes.

    Raises:
        FileNotFoundError: if there is no such folder, or no client in it, or no class in a client.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: client_folders has no folder {root}")
    clients = in_order(_folders(root))
    if not clients:
        raise FileNotFoundError(
            f"data.root: client_folders expects {root}/<client>/<class>/*.png, found no folder"
        )
    files: list[Listed] = []
    names: set[str] = set()
    unused = [f"{entry.name} (in no client's folder)" for entry in root.iterdir()
              if not entry.is_dir()]  # fmt: skip
    for client in clients:
        found = find_images(root / client, name="client_folders")
        files += [replace(each, client=client) for each in found.files]
        names.update(found.class_names)
        unused += [f"{client}/{each}" for each in found.unused]
    for entry in root.iterdir():
        if entry.is_dir() and entry.name[0] == ".":
            unused += [f"{p.relative_to(root)} (in no client's folder)" for p in _walk(entry)]
    if len({bool(each.part) for each in files}) > 1:
        raise ValueError(
            f"data.root: {root}: train and test folders must be at every client or at none"
        )
    return Found(files=tuple(files), class_names=tuple(sorted(names)), unused=tuple(sorted(unused)))


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names, numbers by value and before words."""
    return sorted(
        set(names), key=lambda each: (not each.isdecimal(), each.isdecimal() and int(each), each)
    )


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]


def _walk(folder: Path) -> list[Path]:
    """Every file at any depth; of a folder that is a link, below a class, the link itself."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [each for each in folders if (Path(where) / each).is_symlink()]
        found += [Path(where) / each for each in (*files, *links)]
    return found


def _no_image(path: Path) -> str:
    """Why a file is not used; empty for an image."""
    if path.is_dir():
        return "a link to a folder"
    if path.name[0] == ".":
        return "hidden"
    if not is_image_name(path.name):
        return "no image by its name"
    return "" if path.is_file() else "no file"


def read_table(path: Path) -> Found:
    """The files that a CSV file lists, by their paths from its folder.

    Columns are `file` and `label`, and where they are there `client`, `subject` and `split`,
    separated by commas or semicolons, in any order; others are left aside. `split` is train or
    test; empty, or without the column, content decides as in a folder. Classes are the labels in
    alphabetical order.

    Raises:
        FileNotFoundError: if the CSV file or a file that it lists is not there.
        ValueError: for a missing column or cell, a file that is listed twice or is no image, or a
            client that is named for some files alone; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"data.root: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.root: {path} is not a readable CSV file: {error}") from None
    first = text.split("\n", 1)[0]
    lines = csv.DictReader(text.splitlines(), delimiter=";" if ";" in first else ",")
    columns = [each.strip() for each in lines.fieldnames or ()]
    lines.fieldnames = columns
    for column in _NEEDED:
        if column not in columns:
            raise ValueError(
                f"data.root: {path} must have a column {column}, has {', '.join(columns) or 'none'}"
            )
    files = []
    for row in lines:
        where = f"data.root: {path}, line {lines.line_num}"
        cells = {k: (row.get(k) or "").strip() for k in (*_NEEDED, *_OPTIONAL)}
        for column in _NEEDED:
            if not cells[column]:
                raise ValueError(f"{where}: {column} is empty")
        if cells["split"] not in ("", *_PARTS):
            raise ValueError(f"{where}: split must be train or test, got {cells['split']!r}")
        file = path.parent / cells["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{where}: there is no file {file}")
        if why := _no_image(file):
            raise ValueError(f"{where}: {file} is not used: {why}")
        files.append(
            Listed(
                file=file,
                label=cells["label"],
                part=cells["split"],
                client=cells["client"],
                subject=cells["subject"],
            )
        )
    _check_listed(path, files)
    listed = {os.path.normpath(each.file) for each in files}
    unused = sorted(
        f"{each.relative_to(path.parent)} (not listed)"
        for each in _walk(path.parent)
        if each != path and os.path.normpath(each) not in listed
    )
    return Found(
        files=tuple(files),
        class_names=tuple(sorted({each.label for each in files})),
        unused=tuple(unused),
    )


def _check_listed(path: Path, files: Sequence[Listed]) -> None:
    if not files:
        raise ValueError(f"data.root: {path} lists no file")
    seen: set[str] = set()
    for each in files:
        key = os.path.normpath(each.file)
        if key in seen:
            raise ValueError(f"data.root: {path}: {each.file} is listed twice")
        seen.add(key)
    named = sum(bool(each.client) for each in files)
    if named not in (0, len(files)):
        raise ValueError(
            f"data.root: {path}: client must be named for every file or for none, is for {named} "
            f"of {len(files)}"
        )
