"""Splits as people have them: a CSV file of files, one folder per client, MedMNIST's arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from fedpdm.config import ConfigError, config_from_mapping
from fedpdm.data import ImageSet, load_image_set
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.data.open_images import open_public_images
from tests.support.pixels import exactly, random_pixels


def draw(root: Path, *places: str) -> None:
    for place in places:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(4, 4, seed=crc32(place.encode()))).save(path)


def table(root: Path, text: str, encoding: str = "utf-8") -> Path:
    path = root / "list.csv"
    path.write_text(text, encoding=encoding)
    return path


def load(root: Path, split: str = "train", name: str = "image_folder", **options: Any) -> ImageSet:
    return load_image_set(name, split=split, root=root, **options)  # type: ignore[arg-type]


# --- A CSV file -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "encoding"), [(",", "utf-8"), (";", "utf-8-sig")])
def test_a_list_says_label_client_subject_and_split(
    tmp_path: Path, mark: str, encoding: str
) -> None:
    draw(tmp_path, "x/0.png", "x/1.png", "y/2.png", "3.png", "x/stray.png")
    rows = ["file,label,client,age,subject,split", "x/0.png,sick,B,70,anna,train",
            "x/1.png,well,A,71,bert,train", "y/2.png,sick,A,72,anna,test",
            "3.png,sick,A,73,,train"]  # fmt: skip
    path = table(tmp_path, "\n".join(rows).replace(",", mark) + "\n", encoding)
    train, test = load(path), load(path, "test")
    assert train.class_names == test.class_names == ("sick", "well")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0], [0])
    assert train.clients == ("B", "A", "A")
    assert train.subjects == ("anna", "bert", "")
    assert train.subset(np.array([2, 0])).subjects == ("", "anna")
    assert train.inventory.unused == ("x/stray.png (not listed)",)
    assert np.array_equal(train.images[0, 0], random_pixels(4, 4, seed=crc32(b"x/0.png")))


def test_a_subject_is_on_one_side(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(60)]
    draw(tmp_path, *names)
    rows = [f"{name},a,subject {number % 12}" for number, name in enumerate(names)]
    path = table(tmp_path, "\n".join(["file,label,subject", *rows]))
    sides = [load(path, split) for split in ("train", "test")]
    there = [set(side.subjects or ()) for side in sides]
    assert not there[0] & there[1]
    assert len(there[0] | there[1]) == 12
    assert sum(map(len, sides)) == 60
    one = table(tmp_path, "\n".join(["file,label,subject", *(f"{name},a,same" for name in names)]))
    assert len(load(one)) + len(load(one, "test")) == 60  # by content: both sides have images


def test_public_images_may_be_a_list(tmp_path: Path) -> None:
    draw(tmp_path, *(f"{number}.png" for number in range(20)))
    path = table(tmp_path, "file,label\n" + "".join(f"{k}.png,a\n" for k in range(20)))
    assert len(open_public_images(str(path), option="--public-sample")) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a column file, has none$"),
        ("file,class\n0.png,a\n", "must have a column label, has file, class$"),
        ("file,label\n", "lists no file$"),
        ("file,label\n0.png,a\n1.png,\n", ", line 3: label is empty$"),
        ("file,label\n0.png,a\nnone.png,a\n", r", line 3: there is no file .*none.png$"),
        ("file,label\nlist.csv,a\n", r", line 2: .*list.csv is not used: no image by its name$"),
        ("file,label\n0.png,a\n./0.png,b\n", r": .*0.png is listed twice$"),
        ("file,label,split\n0.png,a,val\n", ", line 2: split must be train or test, got 'val'$"),
        (
            "file,label,client\n0.png,a,A\n1.png,a,\n",
            ": client must be named for every file or for none, is for 1 of 2$",
        ),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    draw(tmp_path, "0.png", "1.png")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"^data.root: .*" + message
    ) as caught:
        load(table(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=exactly(f"data.root: there is no file {tmp_path}/n.csv")
    ):
        load(tmp_path / "n.csv")


# --- Clients --------------------------------------------------------------------------------


def test_one_folder_per_client_is_its_split(tmp_path: Path) -> None:
    for client, counts in (("north", (3, 1)), ("south", (2, 4)), ("10", (1, 0))):
        for label, count in zip(("a", "b"), counts, strict=True):
            for split in ("train", "test"):
                folder = f"{client}/{split}/{label}"
                draw(tmp_path, *(f"{folder}/{number}.png" for number in range(count)))
    draw(tmp_path, "stray.png")
    config = config_from_mapping(
        {
            "data": {"name": "client_folders", "root": str(tmp_path)},
            "partition": {"kind": "given", "num_clients": 3},
        }
    )
    images = load_split(config, "train")
    assert images.inventory.unused == ("stray.png (in no client's folder)",)
    parts = build_partitions(config, images)
    held = [[0, 0, 0] for _ in parts]
    for part in parts:
        for index in part.indices:
            held[part.client_id][int(images.labels[index])] += 1
    assert [row[:2] for row in held] == [[1, 0], [3, 1], [2, 4]]  # 10, north, south
    assert parts[1].majority == (0,)
    few = config_from_mapping(
        {"data": {"name": "client_folders"}, "partition": {"kind": "given", "num_clients": 2}}
    )
    with pytest.raises(
        ValueError,
        match=exactly(
            "partition.num_clients: must be 3, the clients of the data (10, north, south), got 2"
        ),
    ):
        build_partitions(few, images)


def test_client_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"client_folders expects .*/<client>/<class>/"):
        load(tmp_path, name="client_folders")
    draw(tmp_path, "a/train/x/0.png", "b/x/1.png")
    with pytest.raises(ValueError, match="train and test folders must be at every client or at no"):
        load(tmp_path, name="client_folders")
    with pytest.raises(ConfigError, match=r"^partition.balanced: given clients keep their images"):
        config_from_mapping({"partition": {"kind": "given", "balanced": True}})


# --- MedMNIST -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_medmnist_files_are_read(tmp_path: Path, channels: int) -> None:
    """As its version 3 writes them: (N, 28, 28) or (N, 28, 28, 3), labels (N, 1) uint8."""
    shape = (28, 28) if channels == 1 else (28, 28, 3)
    counts = {"train": 7, "val": 3, "test": 5}
    arrays: dict[str, Any] = {}
    for split, count in counts.items():
        arrays[f"{split}_images"] = random_pixels(count, *shape, seed=count)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 3)[:, None]
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    train, test = load(path, name="npz"), load(path, "test", "npz")
    assert (len(train), len(test)) == (7, 5)
    assert train.images.shape[1:] == (channels, 28, 28)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.inventory.words() == (
        "5 set aside as test images; 1 file is not used: val_images (3)"
    )
    arrays["train_labels"] = np.zeros((7, 14), np.uint8)  # several findings at once
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(7,\), got uint8 of "):
        load(path, name="npz")


def test_the_whole_of_a_file_without_test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, images=random_pixels(50, 4, 4), labels=np.zeros((50, 1), int))
    assert len(load(path, name="npz", whole=True)) == 50
    part = load(path, name="npz")
    assert part.inventory.set_aside == 50 - len(part) > 0
