"""Public data sets by name: digits, torchvision's layouts, and what each error line says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpdm.config.names import COLORINGS, DATA_SETS
from fedpdm.data import ImageSet, data_set, load_image_set, normalize
from tests.support.pixels import Pixels, exactly, random_pixels


def known(choices: Iterable[str]) -> str:
    return f"(known: {', '.join(choices)})"


def public_root(*files: str) -> Path:
    """The folder FEDPDM_DATA, or a skip that says which file is not there."""
    root = os.environ.get("FEDPDM_DATA")
    if not root:
        pytest.skip("FEDPDM_DATA is not set")
    for file in files:
        if not (Path(root) / file).exists():
            pytest.skip(f"{file} is not in FEDPDM_DATA")
    return Path(root)


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    train = load_image_set("digits", split="train", coloring="none")
    test = load_image_set("digits", split="test", coloring="none")
    assert (len(train), len(test)) == (1442, 355)
    assert train.images.shape[1:] == (1, 8, 8)
    ours = sorted(image.tobytes() for part in (train, test) for image in part.images)
    scans = np.floor(load_digits().images * 255 / 16 + 0.5).astype(np.uint8)
    theirs = sorted(image.tobytes() for image in scans)
    assert ours == theirs
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.abs(shares - 0.2).max() < 0.01
    # Pinned: another value means that published results no longer repeat.
    assert train.digest()[:16] == "d846fe2874e7291d"
    assert test.digest()[:16] == "055cee38eeebc187"


def test_digits_are_coloured_by_label_unless_told_otherwise() -> None:
    grey = load_image_set("digits", split="test", coloring="none")
    colored = load_image_set("digits", split="test")
    info = data_set("digits")
    assert colored.images.shape[1:] == (info.channels, info.resolution, info.resolution)
    assert (colored.num_classes, colored.background) == (info.num_classes, -1.0)
    assert np.array_equal(colored.labels, grey.labels)
    zeros = colored.images[colored.labels == 2]
    assert (zeros[:, 0] == 0).all()  # class 2 is sky blue, without red
    independent = load_image_set("digits", split="test", coloring="independent")
    part = load_image_set("digits", split="test", coloring="independent", max_images=50)
    everything = {image.tobytes() for image in independent.images}
    assert all(image.tobytes() in everything for image in part.images)
    assert independent.digest() != colored.digest()


def test_digits_resolution_and_max_images() -> None:
    images = load_image_set("digits", split="train", resolution=16, max_images=100)
    assert images.images.shape == (100, 3, 16, 16)
    assert set(np.bincount(images.labels)) <= {9, 10, 11}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "mnits"},
            f"data.name: unknown data set 'mnits'; did you mean 'mnist'? {known(DATA_SETS)}",
        ),
        (
            {"split": "valid"},
            "data.split: unknown split 'valid' (known: train, test)",
        ),
        (
            {"coloring": "by_lable"},
            "data.coloring: unknown colouring 'by_lable'; did you mean 'by_label'? "
            + known(COLORINGS),
        ),
        (
            {"resolution": 0},
            "data.resolution: must be a whole number of at least 1, got 0",
        ),
        (
            {"max_images": 2.5},
            "data.max_images: must be a whole number of at least 1, got 2.5",
        ),
        (
            {"name": "cifar10", "coloring": "independent"},
            "data.coloring: cifar10 has colours already, got independent",
        ),
        (
            {"name": "colored_mnist", "coloring": "none"},
            "data.coloring: colored_mnist cannot be none; use data.name: mnist",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        load_image_set(**{"name": "digits", "split": "train", **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "digits"])
def test_no_root_says_what_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPDM_DATA", raising=False)
    with pytest.raises(ValueError, match=rf"^data.root: {name} needs a folder with ") as caught:
        load_image_set(name, split="train")
    message = str(caught.value)
    assert "set data.root or the environment variable FEDPDM_DATA" in message
    assert ("data.download: true" in message) == (
        name not in ("image_folder", "client_folders", "parquet", "npz")
    )
    assert "\n" not in message


@pytest.mark.parametrize("name", ["mnist", "colored_mnist", "fashion_mnist", "cifar10", "celeba"])
def test_empty_folder_names_the_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^data.root: {name} misses ") as caught:
        load_image_set(name, split="train", root=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "data.download: true" in message
    assert "\n" not in message


def write_idx(path: Path, array: Pixels) -> None:
    """The IDX format: two zeros, 8 for uint8, number of axes, sizes as big-endian int32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(head + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST"), ("colored_mnist", "MNIST")],
)
def test_idx_files(name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / folder / "raw"
    content = {}
    for part, count in (("train", 30), ("t10k", 20)):
        pixels = random_pixels(count, 28, 28, seed=count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
        content[part] = (pixels, labels)
    monkeypatch.setenv("FEDPDM_DATA", str(tmp_path))
    for split, part in (("train", "train"), ("test", "t10k")):
        images = load_image_set(name, split=split)  # type: ignore[arg-type]
        pixels, labels = content[part]
        assert images.labels.tolist() == labels.tolist()
        assert images.background == -1.0
        if name == "colored_mnist":
            assert images.images.shape[1] == 3
            assert (images.images.max(axis=1) == pixels).all()  # one channel of each is 255
        else:
            assert np.array_equal(images.images[:, 0], pixels)
    names = {"fashion_mnist": ("T-shirt/top", "Ankle boot")}.get(name, ("0", "9"))
    assert (images.class_names[0], images.class_names[-1]) == names
    small = load_image_set(name, split="train", resolution=14, max_images=10)
    assert small.images.shape[2:] == (14, 14)
    assert sorted(small.labels) == list(range(10))

    (raw / "t10k-labels-idx1-ubyte").unlink()
    missing = rf"^data.root: {name} misses {folder}/raw/t10k-labels-idx1-ubyte in "
    with pytest.raises(FileNotFoundError, match=missing):
        load_image_set(name, split="train")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x14short")
    with pytest.raises(ValueError, match=rf"^data.root: {name} has files in .* not the original"):
        load_image_set(name, split="test")


CELEBA_FILES = [f"{number:06d}.jpg" for number in range(1, 9)]


def draw_celeba(root: Path) -> dict[str, str]:
    """Eight pictures in CelebA's layout: 178x218, attributes, official partition.

    Returns the text files by name, for their MD5 sums.
    """
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    groups = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # hair, sex
    parts = [0, 0, 0, 0, 0, 2, 2, 1]  # train, test, valid
    files = CELEBA_FILES
    for number, file in enumerate(files):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[20:198] = 30 * number  # the middle square; above and below it stays black
        Image.fromarray(picture).save(base / "img_align_celeba" / file, quality=95)
    names = [f"Attribute_{k}" for k in range(38)]
    names[8:8], names[20:20], names[31] = ["Black_Hair"], ["Male"], "Smiling"
    rows = []
    for file, (hair, sex) in zip(files, groups, strict=True):
        values = [-1] * 40
        values[names.index("Black_Hair")], values[names.index("Male")] = hair, sex
        values[names.index("Smiling")] = hair * sex
        rows.append(f"{file} " + " ".join(f"{value:2d}" for value in values))
    head = f"{len(files)}\n"
    text = {
        "list_attr_celeba.txt": head + " ".join(names) + " \n" + "\n".join(rows),
        "list_bbox_celeba.txt": head
        + "image_id x_1 y_1 width height\n"
        + "\n".join(f"{file}    95  71 226 313" for file in files),
        "list_landmarks_align_celeba.txt": head
        + "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y\n"
        + "\n".join(f"{file} 69  109  106  113   77  142" for file in files),
        "identity_CelebA.txt": "\n".join(f"{file} 7" for file in files),
        "list_eval_partition.txt": "\n".join(map("{} {}".format, files, parts)),
    }
    for file, content in text.items():
        (base / file).write_text(content + "\n")
    return text


def expect_files(text: dict[str, str], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files have fixed MD5 sums; let torchvision expect those of the files in `base`."""
    from torchvision.datasets import CelebA

    sums = {
        file: hashlib.md5((base / file).read_bytes(), usedforsecurity=False).hexdigest()
        for file in text
    }
    expected = [(key, sums.get(file, md5), file) for key, md5, file in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", expected)


def test_celeba_groups_crop_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, files, text = tmp_path / "celeba", CELEBA_FILES, draw_celeba(tmp_path)
    arguments = {"name": "celeba", "root": tmp_path}
    with pytest.raises(ValueError, match=r"^data.root: celeba has files in .* not the original"):
        load_image_set(**arguments, split="train")  # type: ignore[arg-type]

    expect_files(text, base, monkeypatch)
    train = load_image_set(**arguments, split="train")  # type: ignore[arg-type]
    assert train.images.shape == (5, 3, 64, 64)
    assert train.labels.tolist() == [0, 1, 2, 3, 0]
    assert train.class_names[0] == "black hair, male"
    assert train.class_names[3] == "other hair, female"
    assert train.background == 0.0
    for number, image in enumerate(train.images):
        assert np.abs(image.astype(int) - 30 * number).max() <= 4  # nothing black is left
    test = load_image_set(**arguments, split="test", resolution=16)  # type: ignore[arg-type]
    assert (test.images.shape, test.labels.tolist()) == ((2, 3, 16, 16), [3, 1])

    # Only what is asked for is decoded: the damaged image is not in the subset.
    (base / "img_align_celeba" / files[4]).write_bytes(b"no image")
    few = load_image_set(**arguments, split="train", max_images=4)  # type: ignore[arg-type]
    assert sorted(few.labels) == [0, 1, 2, 3]
    with pytest.raises(
        ValueError,
        match=r"^data.root: celeba image 000005.jpg in .*/img_align_celeba is unreadable",
    ):
        load_image_set(**arguments, split="train")  # type: ignore[arg-type]
    (base / "img_align_celeba" / files[4]).unlink()
    folder = base / "img_align_celeba"
    words = exactly(f"data.root: celeba misses image 000005.jpg in {folder}")
    with pytest.raises(FileNotFoundError, match=words):
        load_image_set(**arguments, split="train")  # type: ignore[arg-type]


def test_celeba_majority_and_minority_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_files(draw_celeba(tmp_path), tmp_path / "celeba", monkeypatch)

    def load(**options: object) -> ImageSet:
        return load_image_set("celeba", split="train", root=tmp_path, **options)  # type: ignore[arg-type]

    everything = load()
    pair = load(classes=["black hair, male", "other hair, female"])
    assert pair.class_names == ("black hair, male", "other hair, female")
    assert pair.labels.tolist() == [0, 1, 0]
    assert np.array_equal(pair.images, everything.images[[0, 3, 4]])
    assert load(classes=[3, 0]).labels.tolist() == [1, 0, 1]
    # Smiling was written as hair times sex; of a pair the first attribute is the slower one.
    smiling = load(attributes=["Smiling", "Male"])
    assert smiling.class_names[1:3] == ("smiling, female", "not smiling, male")
    assert smiling.labels.tolist() == [0, 3, 2, 1, 0]
    assert load(attributes=["Male"]).labels.tolist() == [0, 1, 0, 1, 0]
    for options, words in (
        ({"attributes": ["Smilling"]}, "unknown attribute 'Smilling'; did you mean 'Smiling'?"),
        ({"attributes": ["Male", "Male"]}, "'Male' is there twice"),
        ({"attributes": ["Male"] * 5}, "must be 1 to 4 attributes, got 5"),
        ({"attributes": []}, "must be 1 to 4 attributes, got 0"),
    ):
        with pytest.raises(ValueError, match=exactly(f"data.attributes: {words}")):
            load(**options)

    (tmp_path / "celeba" / "list_attr_celeba.txt").unlink()
    missing = rf"^data.root: celeba misses celeba/list_attr_celeba.txt in {tmp_path}; set data.root"
    with pytest.raises(FileNotFoundError, match=missing):
        load()


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    def fail(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried this\nand that")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(
        OSError, match=r"^data.download: mnist could not be fetched into "
    ) as caught:
        load_image_set("mnist", split="train", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_real_mnist() -> None:
    root = public_root("MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte")
    test = load_image_set("mnist", split="test", root=root)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert np.bincount(test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982),
        *(892, 958, 1028, 974, 1009),
    ]
    colored = load_image_set("colored_mnist", split="test", root=root, resolution=8)
    assert colored.images.shape == (10_000, 3, 8, 8)
    around = {
        shift: float(normalize(colored.images, shift=shift).flatten(1).norm(dim=1).median())
        for shift in (0.0, -1.0)
    }
    # docs/method.md section 2 has 12.8 and 4.2 with its own colours: the shift is what matters.
    assert 11.5 < around[0.0] < 13.5
    assert 3.5 < around[-1.0] < 5.5


def test_real_cifar10() -> None:
    root = public_root("cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta")
    test = load_image_set("cifar10", split="test", root=root, max_images=1000)
    assert test.images.shape == (1000, 3, 32, 32)
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert test.class_names[:3] == ("airplane", "automobile", "bird")
    # Ships lie on blue, so the channels are in the order red, green, blue.
    ships = test.images[test.labels == 8].mean(axis=(0, 2, 3))
    assert ships[2] > ships[1] > ships[0]
