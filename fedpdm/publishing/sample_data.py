"""Samples as data that another program can train on: PNG files by class, or one .npz file.

Image i has class i mod K of those that are asked for. Images are drawn in parts; a part's noise
follows from the seed and its first image, so a call that was interrupted goes on where it was, to
the same images, and one that asks for more adds to them. Beside the images lie the settings that
they were drawn with, and what is promised of them.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedpdm.privacy.statement import plain_text
from fedpdm.publishing.source import NO_LABEL, Source
from fedpdm.rng import Purpose, torch_generator
from fedpdm.storage.files import (
    StoreError,
    read_json,
    read_sealed_zip,
    write_atomic,
    write_json,
    write_sealed_zip,
)
from fedpdm.text import json_text, line

__all__ = ["SampleSettings", "folder_names", "sample_files", "sample_npz", "samples_statement"]

PART = 64  # images that are drawn together, with all of their candidates
MOST = 10_000_000  # images of a data set
SETTINGS = "sampling.json"
TABLE = "samples.csv"
_PLAIN = re.compile(r"\w[\w ,()+.-]{0,98}[\w)]|\w")  # names of folders on any system
_SPLITS = ("train", "test")  # folders that readers take for something else


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How samples are drawn: `labels` are classes by number, the rest is as of `sample_grid`."""

    labels: Sequence[int]
    seed: int = 0
    num_steps: int = 25
    guidance: float | None = None
    scheduler: str | None = None
    method: str = "pfdm"

    def check(self, num: int) -> None:
        """`ValueError`, one line, for classes or a number that make no data set."""
        if NO_LABEL in self.labels:
            raise ValueError(
                f"label: {NO_LABEL} is no class, and every image of a data set has one"
            )
        if len({*self.labels}) < len(self.labels):
            raise ValueError(f"label: each class once, got {', '.join(map(str, self.labels))}")
        if not len(self.labels) <= num <= MOST:
            raise ValueError(
                f"num must be in [{len(self.labels)}, {MOST}], at least one for each of "
                f"{len(self.labels)} classes, got {num}"
            )


def sample_files(source: Source, out: Path, *, settings: SampleSettings, num: int) -> int:
    """Draw `num` images to `out`/CLASS/000000.png with a table of them; returns how many are new.

    `out` may hold the first of them already. `ValueError`, one line, for arguments that are out of
    range; `StoreError` for a folder of other things, or of samples drawn otherwise.
    """
    settings.check(num)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is not a directory")
    kept = out / SETTINGS
    if not kept.is_file() and out.is_dir() and any(out.iterdir()):
        raise StoreError(f"{out}: is not empty and holds no samples; choose another")
    known = read_json(kept) if kept.is_file() else {}
    record = _record(source, settings, num, known, where=out)
    folders = folder_names([source.class_name(k) for k in range(source.num_classes)])
    labels = [settings.labels[i % len(settings.labels)] for i in range(num)]
    files = [f"{folders[k]}/{i // len(settings.labels):06d}.png" for i, k in enumerate(labels)]
    drawn = 0
    for start, stop in _parts(source, record["asked"]):
        if all((out / name).is_file() for name in files[start:stop]):
            continue
        images = _draw(source, settings, labels, start, stop)
        if not drawn:  # what cannot be drawn leaves nothing behind
            write_json(kept, record)
            _write_statement(source, settings.method, out / "privacy")
        for name, image in zip(files[start:stop], images, strict=True):
            write_atomic(out / name, _png(image))
        drawn += stop - start
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file", "label", "class"))
    writer.writerows((f, k, line(source.class_name(k))) for f, k in zip(files, labels, strict=True))
    write_atomic(out / TABLE, table.getvalue().encode())
    return drawn


def sample_npz(source: Source, out: Path, *, settings: SampleSettings, num: int) -> int:
    """Draw `num` images into one .npz file; returns how many are new.

    Its arrays are `images` uint8 (N, H, W) or (N, H, W, 3), `labels` int64 (N,), `class_names` and
    `sampling`, the settings as JSON. Until it is complete its parts lie in `out`.parts. It may hold
    the first images already. Errors as of `sample_files`.
    """
    settings.check(num)
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"npz: must end in .npz, got {out}")
    parts = out.with_name(f"{out.name}.parts")
    first, known = _read_npz(out) if out.exists() else (None, {})
    if (parts / SETTINGS).is_file():
        known = read_json(parts / SETTINGS)
    record = _record(source, settings, num, known, where=out)
    labels = [settings.labels[i % len(settings.labels)] for i in range(num)]
    drawn, done = 0, 0 if first is None else len(first)
    images = [] if first is None else [first]
    for start, stop in _parts(source, record["asked"]):
        if stop <= done:
            continue
        path = parts / f"{start:08d}.npz"
        if not path.is_file():
            new = _last(_draw(source, settings, labels, start, stop))
            write_json(parts / SETTINGS, record)
            write_sealed_zip(path, _archive(images=new))
            drawn += stop - start
        images.append(_arrays(path)["images"])
    names = np.array([source.class_name(k) for k in range(source.num_classes)])
    arrays = {"images": np.concatenate(images), "labels": np.array(labels, dtype=np.int64)}
    text = np.array(json_text(record, indent=None))
    write_sealed_zip(out, _archive(**arrays, class_names=names, sampling=text))
    _write_statement(source, settings.method, out.with_suffix(".privacy"))
    shutil.rmtree(parts, ignore_errors=True)
    return drawn


def samples_statement(source: Source, method: str) -> tuple[dict[str, Any], str]:
    """What is promised of samples drawn with this method, in numbers and in words.

    Only draws of the shared model alone are post-processing of what clients released.
    """
    covered = method == "coarse" and bool(source.statement)
    if covered:
        words = (
            f"These images were drawn with the shared model of {source.what} alone. It was made of "
            "what clients released, and nothing else, so the statement below covers them: whoever "
            "has them learns no more about an image than it says."
        )
    else:
        words = (
            f"NO GUARANTEE COVERS THESE IMAGES. They were drawn with the fine model of "
            f"{source.what}, which was trained on that client's raw images without noise. Whoever "
            "has them may learn something about single images, and may find copies of them. To "
            "hand them out is for that client alone to decide. The statement below is about what "
            "the client sent while the models were trained."
        )
    try:
        below = plain_text({"epsilon_distribution": [], **source.statement})
    except KeyError:  # of an earlier version, or none
        below = "No statement lies beside the models, or one of an earlier version: privacy.json.\n"
    record = {
        "method": method,
        "drawn_with": source.what,
        "covered": covered,
        "words": words,
        "statement": dict(source.statement),
    }
    return record, f"{textwrap.fill(words, 88)}\n\n{below}"


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder for each class: its name where that is one on any system, else `class-3`."""
    plain = [name.casefold() for name in names]
    return [
        name
        if _PLAIN.fullmatch(name) and plain.count(key) == 1 and key not in _SPLITS
        else f"class-{number}"
        for number, (name, key) in enumerate(zip(names, plain, strict=True))
    ]


def _record(
    source: Source, settings: SampleSettings, num: int, known: dict[str, Any], *, where: Path
) -> dict[str, Any]:
    """The settings, with the numbers of images that were asked for so far, ascending.

    `StoreError` if what is `known` was drawn otherwise, or if less is asked for than before.
    """
    plain = {**vars(settings), "labels": list(settings.labels), "models_sha256": source.digest()}
    for name, value in plain.items():
        if known and known.get(name) != value:
            what = "models" if name == "models_sha256" else name
            more = "others" if what == "models" else f"{known.get(name)!r}, not {value!r}"
            raise StoreError(f"{where}: holds samples of {what} {more}; choose another")
    asked = [int(each) for each in known.get("asked", ())]
    if asked and num < asked[-1]:
        raise StoreError(f"{where}: num must be at least the {asked[-1]} of before, got {num}")
    return {"drawn_with": source.what, **plain, "asked": sorted({*asked, num})}


def _parts(source: Source, asked: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of what is drawn together: the same however often a call was interrupted."""
    size = source.batch_size(PART)
    cuts = sorted({*range(0, asked[-1], size), *asked})
    return itertools.pairwise(cuts)


def _draw(
    source: Source, settings: SampleSettings, labels: Sequence[int], start: int, stop: int
) -> np.ndarray:
    """Images `start` to `stop`, uint8 (n, C, H, W)."""
    return source.draw(
        labels[start:stop],
        generator=torch_generator(settings.seed, Purpose.SAMPLING, chunk=start),
        title=f"images {start + 1} to {stop} of {len(labels)}",
        num_steps=settings.num_steps,
        guidance=settings.guidance,
        method=settings.method,
    )


def _last(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) as (N, H, W), or (N, H, W, C) with colours."""
    return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


def _png(image: np.ndarray) -> bytes:
    """uint8 (C, H, W), grey or RGB, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(_last(image[None])[0])).save(buffer, format="PNG")
    return buffer.getvalue()


def _archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """A .npz file's arrays; `StoreError` if it is damaged."""
    try:
        with np.load(io.BytesIO(read_sealed_zip(path)), allow_pickle=False) as file:
            return dict(file)
    except StoreError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path}: cannot be read: {line(error)}") from None


def _read_npz(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(images, settings) of a complete file; `StoreError` if it is none of this command."""
    arrays = _arrays(path)
    try:
        return arrays["images"], json.loads(str(arrays["sampling"]))
    except (KeyError, ValueError):
        raise StoreError(f"{path}: holds no samples of this command; choose another") from None


def _write_statement(source: Source, method: str, stem: Path) -> None:
    """`stem`.json and `stem`.txt."""
    record, words = samples_statement(source, method)
    write_json(stem.with_name(f"{stem.name}.json"), record)
    write_atomic(stem.with_name(f"{stem.name}.txt"), words.encode())
