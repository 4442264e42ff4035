"""The reader of a folder of Hugging Face `datasets` in Parquet files. Needs `fedpdm[parquet]`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedpdm.data.pictures import Shown, decode_picture, read_header
from fedpdm.data.rawsplit import Decoded, FileReader, Inventory, RawSplit, Split, split_of
from fedpdm.data.registry import DataSet, Request

__all__ = ["PARQUET", "read_parquet"]

_IMAGES: Final = ("image", "img")
_LABELS: Final = ("label", "labels", "fine_label")


def read_parquet(request: Request) -> RawSplit:
    """Read `train*.parquet` and `test*.parquet` at any depth, or in folders `train` and `test`.

    Files of other splits (`validation*`) are not used. Where no file says its split, all are one
    set, and it is `split_of` each image's bytes, or with `Request.whole` all are training images.
    Columns are those that the files call an image and a class label, else `image` and `label`.
    Images hold their bytes in the files. `data.frames` is refuse or first.

    Raises:
        FileNotFoundError: if there is no such folder, or no Parquet file of the split.
        ValueError: for a file that is not readable or has no images or labels; it is named.
    """
    root, shown = request.path, Shown.of(request)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: parquet has no folder {root}")
    if shown.frames == "all":
        raise ValueError("data.frames: parquet has one image in a row: refuse or first, got all")
    every = sorted(path for path in root.rglob("*") if path.is_file())
    files = {path: _split_name(path, root) for path in every if path.suffix == ".parquet"}
    is_split = bool({"train", "test"} & set(files.values()))
    wanted = {p: part for p, part in files.items() if not is_split or part in ("train", "test")}
    if not wanted or (is_split and request.split not in wanted.values()):
        raise FileNotFoundError(
            f"data.root: parquet expects {root}/.../{request.split}*.parquet, found none"
        )
    rows: list[tuple[Path, Any, bytes, str]] = []
    names: list[str] = []
    for path, part in wanted.items():
        contents, labels, known = _read_file(path)
        names = known or names
        rows += [
            (path, label, content, part) for content, label in zip(contents, labels, strict=True)
        ]
    distinct = sorted({label for _, label, _, _ in rows})
    if not names:
        of_numbers = distinct and isinstance(distinct[-1], int)
        names = [str(k) for k in range(distinct[-1] + 1)] if of_numbers else list(distinct)
    headers = [read_header(_row(path, k), shown, c) for k, (path, _, c, _) in enumerate(rows)]
    chosen = [
        (path, label, content)
        for path, label, content, part in rows
        if _side(part if is_split else "", content, whole=request.whole) == request.split
    ]
    numbers = [label if isinstance(label, int) else names.index(label) for _, label, _ in chosen]
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise ValueError(f"data.root: {root}: labels must be in [0, {len(names)})")
    encoded = tuple((path, content) for path, _, content in chosen)
    unused = tuple(str(path.relative_to(root)) for path in every if path not in wanted)
    return RawSplit(
        labels=np.array(numbers, dtype=np.int64),
        class_names=tuple(names),
        read=FileReader(
            decode=functools.partial(_decode_one_of, encoded, shown),
            channels=1 if all(header.is_grey for header in headers) else 3,
        ),
        inventory=Inventory(unused=unused, set_aside=len(rows) - len(chosen)),
    )


def _split_name(path: Path, root: Path) -> str:
    """The word that a file's name, or else its folder's, begins with."""
    for word in (path.name, path.parent.name if path.parent != root else ""):
        for part in ("train", "test", "valid", "dev"):
            if word.lower().startswith(part):
                return part
    return ""


def _side(part: str, content: bytes, *, whole: bool) -> Split:
    if part in ("train", "test"):
        return "train" if part == "train" else "test"
    return "train" if whole else split_of(content)


def _read_file(path: Path) -> tuple[list[bytes], list[Any], list[str]]:
    """The bytes of all images, their labels, and the class names where the file has them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(
            f"data.root: {path} needs pyarrow: pip install 'fedpdm[parquet]'"
        ) from None
    try:
        schema = parquet.read_schema(path)
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
        image = _column(path, schema.names, features, "Image", _IMAGES)
        label = _column(path, schema.names, features, "ClassLabel", _LABELS)
        table = parquet.read_table(path, columns=[image, label])
        contents = [cell["bytes"] for cell in table[image].to_pylist()]
        labels = table[label].to_pylist()
    except ValueError as error:
        if str(error).startswith("data.root: "):
            raise
        raise ValueError(f"data.root: {path} is not a readable Parquet file: {error}") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data.root: {path} has no images with their bytes: {error}") from None
    for row, (content, value) in enumerate(zip(contents, labels, strict=True)):
        if not isinstance(content, bytes) or not isinstance(value, int | str):
            raise ValueError(f"data.root: {_row(path, row)} has no bytes of an image, or no label")
    return contents, labels, list(features.get(label, {}).get("names") or [])


def _column(
    path: Path, columns: list[str], features: dict[str, Any], kind: str, usual: tuple[str, ...]
) -> str:
    typed = [name for name in columns if features.get(name, {}).get("_type") == kind]
    for name in (*typed, *usual):
        if name in columns:
            return name
    raise ValueError(f"data.root: {path} must have a column {usual[0]}, has {', '.join(columns)}")


def _row(path: Path, row: int) -> Path:
    """How a row is named in errors."""
    return path / f"row {row}"


def _decode_one_of(
    contents: tuple[tuple[Path, bytes], ...], shown: Shown, position: int
) -> Decoded:
    path, content = contents[position]
    return decode_picture(path, 0, shown, content)


PARQUET: Final = DataSet(
    read=read_parquet,
    description="own images, a Hugging Face data set in Parquet files",
    needs="train*.parquet and test*.parquet (data.root is their folder)",
    clients_own=True,
    shows_files=True,
    colorable=True,
)
